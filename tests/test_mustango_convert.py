"""The converter of the published Mustango: every tensor to its place, nothing else opened, nothing left random."""

import json
import re

import pytest
import torch
from original_layout import vae_tensors
from test_mustango import with_predictors

from studio.base import Request
from studio.bases.mustango import Mustango
from studio.bases.mustango.building import published
from studio.bases.mustango.convert import (
    BEATS,
    CHORDS,
    MAIN,
    RULES,
    SOUND,
    convert,
    read_tensors,
    renamed,
    write_pipeline,
)
from studio.bases.registry import load_base
from studio.cli import run as studio
from studio.errors import BaseError
from studio.music.score import Score


def published_tensors(networks):
    """The files of a Mustango as its authors write them, by name: from their side, with their tables and copies."""
    main = {}
    for name, value in networks["unet"].state_dict().items():
        for part, word in (("text", "attentions"), ("beat", "attentions2"), ("chord", "attentions3")):
            name = re.sub(rf"attentions\.(\d+)\.{part}\.", rf"{word}.\1.", name)
        main[f"unet.{name}"] = value
    main |= {f"text_encoder.{name}": value for name, value in networks["text_encoder"].state_dict().items()}
    chords, table = networks["chord_encoder"].state_dict(), torch.zeros(50, 1, 16)
    main |= {"FME.translation_bias": chords["root_bias"], "PE.pe": table}
    main |= {"beat_embedding_layer.PE.pe": table, "chord_embedding_layer.PE.pe": table}
    main["chord_embedding_layer.FME.translation_bias"] = chords["root_bias"]
    for kind, encoder in (("beat", networks["beat_encoder"]), ("chord", networks["chord_encoder"])):
        for name in ("weight", "bias"):
            main[f"{kind}_embedding_layer.{kind}_ffn.{name}"] = encoder.state_dict()[f"ffn.{name}"]
    sound = vae_tensors(networks["vae"])
    for name, value in networks["vocoder"].state_dict().items():
        if name not in ("mean", "scale"):
            sound[f"vocoder.{name.replace('upsampler', 'ups')}"] = value
    files = {MAIN: main, SOUND: sound}
    if "beat_predictor" in networks:
        files[BEATS] = networks["beat_predictor"].state_dict()
        files[CHORDS] = networks["chord_predictor"].state_dict()
    return files


def write(files, folder):
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.clone() for key, value in tensors.items()}, folder / name)
    return folder


def empty_like(base):
    """The networks of a base without their weights."""
    from studio.bases.mustango.building import PICO_HIFIGAN, PICO_MUNET, PICO_VAE, hifigan, mel_vae, munet, untied
    from studio.bases.mustango.encoders import BeatEncoder, ChordEncoder

    with torch.device("meta"):
        parts = {"unet": munet(PICO_MUNET), "vae": mel_vae(PICO_VAE), "vocoder": hifigan(PICO_HIFIGAN)}
        parts |= {"beat_encoder": BeatEncoder(16), "chord_encoder": ChordEncoder(16)}
        for name in ("text_encoder", "beat_predictor", "chord_predictor"):
            module = base.modules[name]
            parts[name] = type(module)(module.config)
    untied(parts["chord_predictor"])
    return parts


@pytest.fixture(scope="module")
def base():
    base = with_predictors(Mustango.tiny())
    head = base.modules["chord_predictor"].lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1, requires_grad=False)  # FLAN-T5's is its own
    return base


def test_what_is_converted_plays_what_was_published(base, tmp_path):
    source = write(published_tensors(base.modules), tmp_path / "published")
    tokenizers = dict.fromkeys(("tokenizer", "beat_tokenizer", "chord_tokenizer"), base.pipe.tokenizer)
    out = write_pipeline(source, tmp_path / "out", empty_like(base), tokenizers, base.pipe.config.mel, 128)
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    loaded = load_base(out)
    assert loaded.licence.startswith("apache-2.0")
    for name, module in base.modules.items():
        own, other = module.state_dict(), loaded.modules[name].state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name
    assert loaded.pipe.complete(Score("a cat")) == base.pipe.complete(Score("a cat"))
    request = Request(["a cat"], [1], steps=2, seconds=0.2)
    assert torch.equal(loaded.generate(request)[0].wave, base.generate(request)[0].wave)
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_every_published_tensor_has_a_place_of_its_shape():
    networks = published()
    found = {}
    for name, tensors in published_tensors(networks).items():
        found |= renamed(tensors, RULES[name], name)
    for part, network in networks.items():
        state = network.state_dict()
        assert {key for key in state if (part, key) not in (("vocoder", "mean"), ("vocoder", "scale"))} == set(
            found[part]
        )
        for key, value in found[part].items():
            assert value.squeeze().shape == state[key].squeeze().shape


def test_a_file_of_anything_but_tensors_is_not_opened(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    for number, content in enumerate(({"unet.a": Harmful()}, [torch.zeros(1)], {"a": 3})):
        torch.save(content, tmp_path / f"{number}.bin")
        with pytest.raises(BaseError, match="tensors"):
            read_tensors(tmp_path / f"{number}.bin")
    assert not (tmp_path / "written").exists()
    (tmp_path / "cut.bin").write_bytes((tmp_path / "1.bin").read_bytes()[:100])
    with pytest.raises(BaseError, match=r"cut\.bin"):
        read_tensors(tmp_path / "cut.bin")


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape"])
def test_files_of_another_network_are_refused(base, tmp_path, fault):
    files = published_tensors(base.modules)
    if fault == "missing":
        del files[MAIN]["unet.mid_block.attentions2.0.norm.weight"]
    elif fault == "foreign":
        files[MAIN]["group_in.weight"] = torch.zeros(2)
    else:
        files[SOUND]["vocoder.conv_pre.weight"] = torch.zeros(2, 2, 7)
    source = write(files, tmp_path / "published")
    with pytest.raises(BaseError):
        write_pipeline(source, tmp_path / "out", empty_like(base), {}, {}, 128)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_needs(tmp_path, capsys):
    assert studio(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no ldm/pytorch_model_ldm.bin" in capsys.readouterr().err
    for name in (MAIN, SOUND):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BaseError, match="no tokenizer"):
        convert(tmp_path, tmp_path / "out", tokenizer=str(tmp_path / "nothing"), predictors=False)
    with pytest.raises(BaseError) as refusal:
        load_base(tmp_path)
    assert "studio convert" in refusal.value.hint
