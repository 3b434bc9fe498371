"""A base is found by bundled name, alias, folder, file or hub id; what cannot be used is refused in one line."""

import json
import shutil
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from original_layout import original_tensors
from safetensors.torch import load_file, save_file

from studio.base import Request
from studio.bases import checkpoint, folder, hub, registry
from studio.bases.registry import ALIASES, bases, bundled, families, load_base
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import BaseError, DiskError

ROOT = Path(registry.__file__).resolve().parents[2]
CARD = "---\nlicense: apache-2.0\ntags: [x]\n---\n# A base\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline folder; tests that damage it copy it first."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    StableDiffusion.tiny().pipe.save_pretrained(path)
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def assets(saved, tmp_path, monkeypatch):
    """An assets folder of its own, with one bundled base, `pico`."""
    shutil.copytree(saved, tmp_path / "assets" / "bases" / "pico")
    monkeypatch.setattr(registry, "assets_dir", lambda: tmp_path / "assets")
    return tmp_path / "assets"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The local cache of a model hub, empty."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache, repo, source):
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(source, place / "snapshots" / ("0" * 40)))


def refused(name, *words):
    with pytest.raises(BaseError) as refusal:
        load_base(name)
    told = f"{refusal.value.message} | {refusal.value.hint}"
    assert "\n" not in told
    assert all(word in told for word in words), told
    return told


# -- by name ---------------------------------------------------------------------------------------------------------


def test_bundled_base_is_found_by_its_name(assets):
    base = load_base("pico")
    assert (base.name, base.family, base.licence) == ("pico", "stable_diffusion", "apache-2.0")
    assert base.identity().licence == "apache-2.0"
    assert list(bundled()) == ["pico"]


def test_bundled_name_comes_before_a_folder_of_that_name(assets, copied, monkeypatch):
    (copied / "README.md").write_text(CARD.replace("apache-2.0", "other-licence"))
    copied.rename(copied.parent / "pico")
    monkeypatch.chdir(copied.parent)
    assert load_base("pico").licence == "apache-2.0"
    assert load_base("./pico").licence == "other-licence"


def test_alias_opens_from_the_cache_without_a_hub(hub_cache, saved):
    put_in_cache(hub_cache, ALIASES["sd15"].repo, saved)
    assert load_base("sd15").name == "sd15"
    assert load_base(ALIASES["sd15"].repo).name == ALIASES["sd15"].repo
    row = next(row for row in bases() if row["name"] == "sd15")
    assert row["offline"]
    assert row["bytes"] == sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())


def test_folder_comes_before_a_hub_id_of_that_name(hub_cache, copied, monkeypatch):
    (copied.parent / "owner").mkdir()
    copied.rename(copied.parent / "owner" / "name")
    monkeypatch.chdir(copied.parent)
    assert load_base("owner/name").name == str(copied.parent / "owner" / "name")


def test_unknown_name_names_the_nearest(assets):
    assert "did you mean 'pico'?" in refused("picco", "unknown base 'picco'")
    assert "did you mean 'sdxl'?" in refused("sd-xl")


def test_hub_id_offline_is_refused_at_once(hub_cache):
    started = time.monotonic()
    refused("owner/name", "'owner/name'", "hub", "cannot be reached")
    refused("sd15", ALIASES["sd15"].repo, "cannot be reached")
    assert time.monotonic() - started < 5


def test_half_downloaded_base_in_the_cache_does_not_count(hub_cache, saved):
    place = put_in_cache(hub_cache, "owner/name", saved)
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused("owner/name", "whole in the hub's cache")


@pytest.mark.parametrize("name", ["./nothing", "a/b/c", "missing.safetensors", "~/nowhere", "models/x.ckpt"])
def test_path_that_is_not_there_is_called_that(name):
    refused(name, "there is no file or folder")


def test_every_alias_has_a_family_and_a_licence():
    for alias in ALIASES.values():
        assert alias.family in families()
        assert alias.licence
        assert alias.repo.count("/") == 1


def test_bases_lists_bundled_and_aliases(assets, hub_cache):
    rows = {row["name"]: row for row in bases()}
    assert set(rows) == {"pico", *ALIASES}
    assert rows["pico"]["kind"] == "bundled"
    assert rows["pico"]["medium"] == "image"
    assert rows["pico"]["bytes"] > 100_000
    assert rows["pico"]["offline"]
    assert not rows["sdxl"]["offline"]
    assert json.loads(json.dumps(rows)) == rows


def test_every_bundled_base_opens():
    for name in bundled():
        base = load_base(name)
        assert base.licence
        assert base.name == name


# -- folders ---------------------------------------------------------------------------------------------------------


def test_precision_is_full_on_a_cpu_and_can_be_chosen(saved):
    def dtypes(base):
        return {p.dtype for module in base.modules.values() for p in module.parameters()}

    assert dtypes(load_base(saved, device="cpu")) == {torch.float32}
    assert dtypes(load_base(saved, dtype="bf16", device="cpu")) == {torch.bfloat16}
    assert dtypes(load_base(saved, dtype=torch.float16, device="cpu")) == {torch.float16}
    with pytest.raises(BaseError, match="precision"):
        load_base(saved, dtype="fp64")


def test_folder_stored_in_half_precision_draws_in_full(saved, copied):
    pipe = load_base(saved).pipe
    pipe.to(torch.float16).save_pretrained(copied)
    base = load_base(copied)
    assert {p.dtype for module in base.modules.values() for p in module.parameters()} == {torch.float32}
    assert base.generate(Request(["a cat"], [0], steps=1))
    assert load_base(saved).check(base.identity(), needs_values=True) == ""


def test_folder_with_only_the_fp16_variant_opens(copied):
    for file in copied.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert folder.open_folder(copied).variant == "fp16"
    assert load_base(copied).family == "stable_diffusion"


def test_censor_in_a_folder_is_not_loaded(copied):
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (copied / "model_index.json").write_text(json.dumps(index))
    assert load_base(copied).pipe.safety_checker is None


def test_folder_without_index_is_refused_and_the_right_one_named(copied):
    refused(copied / "unet", "no model_index.json", f"give '{copied}'")
    refused(copied.parent, "no model_index.json", f"did you mean '{copied}'")
    lone = copied / "vae"
    (copied / "model_index.json").unlink()
    refused(lone, "no model_index.json", "give the file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no pipeline class"),
        ("{}", "no pipeline class"),
        ('{"_class_name": "FluxPipeline"}', "a family that the studio does not know"),
        ('{"_class_name": ["my_pipeline", "Mine"]}', "no pipeline class"),
        ('{"_class_name": "StableDiffusionPipeline", "unet": ["my_code", "MyUNet"]}', "wants code of its own"),
        ('{"_class_name": "StableDiffusionPipeline", "nothing": ["diffusers", "X"]}', "'nothing' is missing"),
        ('{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "NoSuchClass"]}', "cannot be loaded"),
    ],
)
def test_index_that_cannot_be_used_is_refused(copied, content, words):
    (copied / "model_index.json").write_text(content)
    refused(copied, words)


def test_truncated_weights_are_refused(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copied, str(file), "damaged or truncated")


def test_empty_and_missing_weights_are_refused(copied):
    file = copied / "text_encoder" / "model.safetensors"
    file.write_bytes(b"")
    refused(copied, str(file), "damaged or truncated")
    file.unlink()
    refused(copied, "text_encoder", "no weights")


def test_weights_that_lack_a_tensor_are_refused(copied):
    for part, file in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        path = copied / part / f"{file}.safetensors"
        whole = path.read_bytes()
        tensors = load_file(path)
        save_file(dict(list(tensors.items())[1:]), path, {"format": "pt"})
        refused(copied, part, next(iter(tensors)).split(".")[-2])
        path.write_bytes(whole)


def test_missing_shard_is_refused(copied):
    part = copied / "unet"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model-00001-of-00002.safetensors")
    refused(copied, "1 of 2 weight files")


def test_weights_of_another_shape_are_refused(copied):
    config = json.loads((copied / "unet" / "config.json").read_text())
    config["block_out_channels"] = [16, 48]
    (copied / "unet" / "config.json").write_text(json.dumps(config))
    refused(copied, "cannot be loaded")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickled_weights_in_a_folder_are_refused(copied, name):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copied / "unet" / name).write_bytes(b"PK\x03\x04 a zip, as torch.save writes it")
    refused(copied, "pickle", "run code")


@pytest.mark.parametrize("name", ["old.ckpt", "old.pt", "old.bin", "disguised.safetensors"])
def test_pickled_checkpoint_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    refused(tmp_path / name, "pickle", "run code", name)


def test_licence_is_read_from_the_front_matter(tmp_path):
    def licence(text):
        (tmp_path / "README.md").write_text(text)
        return folder.licence_in(tmp_path)

    assert licence(CARD) == "apache-2.0"
    assert licence("---\nlicense: other\nlicense_name: my-terms\n---\n") == "my-terms"
    assert licence("# no front matter\nlicense: mit") == ""
    assert licence("---\n: [broken\n---\n") == ""


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_only_safetensors_of_one_precision_are_downloaded():
    names = [
        "model_index.json",
        "README.md",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "safety_checker/model.safetensors",
    ]
    index = {"_class_name": "X", "safety_checker": ["stable_diffusion", "Y"], "image_encoder": [None, None]}
    index |= {part: ["diffusers", "Z"] for part in ("scheduler", "tokenizer", "text_encoder", "unet")}
    full = hub.wanted_files("owner/name", names, index, half=False)
    half = hub.wanted_files("owner/name", names, index, half=True)
    never = {name for name in names if name.endswith((".bin", ".msgpack")) or "non_ema" in name or "safety" in name}
    never.add("v1-5-pruned.safetensors")
    assert set(full) == set(names) - never - {"text_encoder/model.fp16.safetensors"}
    assert set(half) == set(names) - never - {"text_encoder/model.safetensors"}


def test_what_goes_wrong_with_the_hub_is_told_in_one_line():
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    transport_error = type("TransportError", (Exception,), {})
    for error in (LocalEntryNotFoundError("x"), OfflineModeIsEnabled("x"), transport_error("x")):
        assert "cannot be reached" in hub.explain("owner/name", error).message
    assert isinstance(hub.explain("owner/name", OSError(28, "No space left on device")), DiskError)
    assert hub.explain("owner/name", ZeroDivisionError()) is None


# -- checkpoints of one file -----------------------------------------------------------------------------------------

PUBLISHED = {  # parameters
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
SITES = {
    "sd15": {"attention": 128, "cross-attention": 64, "linear": 184, "conv": 98, "text-encoder": 48, "all": 282},
    "sd21": {"attention": 128, "cross-attention": 64, "linear": 216, "conv": 66, "text-encoder": 92, "all": 282},
    "sdxl": {"attention": 560, "cross-attention": 280, "linear": 743, "conv": 51, "text-encoder": 176, "all": 794},
}


@pytest.fixture(params=checkpoint.LAYOUTS, ids=lambda layout: layout.name)
def layout(request):
    return request.param


def networks_without_values(layout, configs):
    """The real networks of a layout on the meta device, from the configurations that we build."""
    parts = checkpoint.configurations(layout)
    checkpoint.write_configurations(parts, families()[layout.family].pipeline_class, configs)
    networks = {}
    for name, (library, class_name, _) in parts.items():
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        if not issubclass(cls, torch.nn.Module):
            continue
        with torch.device("meta"):
            if library == "diffusers":
                networks[name] = cls.from_config(cls.load_config(configs / name))
            else:
                networks[name] = cls(cls.config_class.from_pretrained(configs / name))
    return types.SimpleNamespace(**networks)


def test_built_configurations_are_the_published_models(layout, tmp_path):
    networks = vars(networks_without_values(layout, tmp_path))
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts == PUBLISHED[layout.name]


def test_sites_of_the_published_models(layout, tmp_path):
    family = families()[layout.family]
    base = family(layout.name, types.SimpleNamespace(components=vars(networks_without_values(layout, tmp_path))))
    assert {group: len(base.select([group])) for group in family.groups} == SITES[layout.name]


def test_published_layout_is_recognised_and_incomplete_ones_refused(layout, tmp_path):
    tensors = original_tensors(networks_without_values(layout, tmp_path))
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert checkpoint.recognise(shapes, {}, "file") is layout

    def faults(changed, header=()):
        with pytest.raises(BaseError) as refusal:
            checkpoint.recognise(changed, dict(header), "some.safetensors")
        return refusal.value.message

    def without(prefix):
        return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}

    assert "no autoencoder" in faults(without("first_stage_model."))
    for prefix in layout.text_prefixes:
        assert "no text encoder" in faults(without(prefix))
    assert "another build" in faults(without("model.diffusion_model.middle_block.1."))
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    assert "inpainting" in faults(shapes | {entry: (320, 9, 3, 3)})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "an adapter"),
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", "an adapter"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network of a diffusers folder"),
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "of Stable Diffusion 3"),
        ("something", "other names"),
    ],
)
def test_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, key, words):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "file.safetensors")
    refused(tmp_path / "file.safetensors", words)


def test_truncated_checkpoint_is_refused(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    refused(tmp_path / "cut.safetensors", "damaged or truncated")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "no base")


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_checkpoint_of_one_file_is_the_same_base_as_its_folder(family, tmp_path):
    base = family.tiny()
    base.pipe.save_pretrained(tmp_path / "configs")
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()
    save_file({k: v.contiguous() for k, v in original_tensors(base.pipe).items()}, tmp_path / "one.safetensors")
    loaded = family.from_checkpoint(tmp_path / "one.safetensors", tmp_path / "configs", "one", torch.float32)
    assert loaded.identity().architecture == base.identity().architecture
    assert loaded.identity().values == base.identity().values
    request = Request(["a photo of a cat"], [1], steps=2)
    assert loaded.generate(request)[0].tobytes() == base.generate(request)[0].tobytes()


def test_metadata_of_a_checkpoint_says_what_it_predicts(monkeypatch, tmp_path):
    layout = checkpoint.LAYOUTS[2]
    monkeypatch.setattr(checkpoint, "recognise", lambda *_: layout)
    file = tmp_path / "v.safetensors"
    save_file({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, file, {"modelspec.license": "mine"})
    found = checkpoint.read_checkpoint(file)
    assert (found.prediction_type, found.zero_snr, found.licence) == ("v_prediction", True, "mine")
    scheduler = checkpoint.configurations(layout, found.prediction_type, found.zero_snr)["scheduler"][2]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"]
    save_file({"x": torch.zeros(1)}, file, {"modelspec.prediction_type": "epsilon"})
    assert checkpoint.read_checkpoint(file).prediction_type == "epsilon"
    second = checkpoint.configurations(checkpoint.LAYOUTS[1], "epsilon")
    assert (second["unet"][2]["sample_size"], second["scheduler"][2]["prediction_type"]) == (64, "epsilon")
    second = checkpoint.configurations(checkpoint.LAYOUTS[1])
    assert (second["unet"][2]["sample_size"], second["scheduler"][2]["prediction_type"]) == (96, "v_prediction")


def test_clip_tokenizer_gives_clips_own_tokens(tmp_path):
    tokenizer = checkpoint.clip_tokenizer()
    assert len(tokenizer) == 49_408
    # The ids that CLIP's authors and every Stable Diffusion tutorial print for this sentence.
    assert tokenizer("A photo  of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("").input_ids == [49406, 49407]
    checkpoint.clip_tokenizer("!").save_pretrained(tmp_path)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert (again.model_max_length, again.pad_token_id) == (77, 0)
    padded = again("cat", padding="max_length").input_ids
    assert padded == [49406, 2368, 49407, *[0] * 74]


def write_zeros(shapes, file):
    """A safetensors file of fp16 zeros that takes no place on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


@pytest.mark.slow
def test_checkpoint_of_real_size_opens_offline(layout, tmp_path):
    """Zeros in the real shapes: 2 to 7 GiB of memory, no disk."""
    tensors = original_tensors(networks_without_values(layout, tmp_path / "configs"))
    write_zeros({name: value.shape for name, value in tensors.items()}, tmp_path / "real.safetensors")
    base = load_base(tmp_path / "real.safetensors", dtype="bf16")
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in base.modules.items()}
    assert counts == PUBLISHED[layout.name]
    assert not any(p.is_meta or p.any() for module in base.modules.values() for p in module.parameters())
    assert base.resolution == {"sd15": 512, "sd21": 768, "sdxl": 1024}[layout.name]
    assert base.encode_prompts(["a cat"], (512, 512))["text"].shape == (1, 77, layout.text_width)
    assert bool(base.notes) == (layout.name == "sd21")


# -- manners ---------------------------------------------------------------------------------------------------------


def in_a_fresh_process(code, *arguments):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_registry_imports_nothing_heavy():
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, studio.bases.registry; print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_process(code).stdout == "[]\n"


def test_loading_and_drawing_is_silent(saved, tmp_path):
    code = (
        "import sys; from studio.bases.registry import load_base; from studio.base import Request\n"
        "base = load_base(sys.argv[1]); base.generate(Request(['a cat'], [0], steps=1))\n"
        "base.pipe.save_pretrained(sys.argv[2])"
    )
    result = in_a_fresh_process(code, saved, tmp_path / "again")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert load_file(tmp_path / "again" / "vae" / "diffusion_pytorch_model.safetensors")
