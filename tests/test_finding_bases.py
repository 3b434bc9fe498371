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
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from original_layout import mmdit_tensors, original_tensors
from safetensors.torch import load_file, save_file

from studio.adapter import load_adapter
from studio.attachment import attach
from studio.base import Request
from studio.bases import checkpoint, folder, hub, published, registry
from studio.bases.outline import outline
from studio.bases.registry import ALIASES, bases, bundled, families, load_base
from studio.bases.sd3 import StableDiffusion3
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import AdapterError, BaseError, DiskError
from studio.exporting import export_adapter
from studio.training import Order, plan

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
        ('{"_class_name": ["my_pipeline", "Mine"]}', "wants code of its own"),
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
    "sd3-medium": {"transformer": 2_028_328_000},
    "sd35-medium": {"transformer": 2_243_171_520},
    "sd35-large": {"transformer": 8_056_627_520},
}
SD3 = [layout for layout in checkpoint.LAYOUTS if layout.family == "sd3"]
for one in SD3:
    PUBLISHED[one.name] |= {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840}
PUBLISHED_FILES = [  # what Stability AI's files of SD3 and 3.5 hold beside T5: layout, CLIPs or not, bytes in all
    ("sd3-medium", False, 4_337_667_306),
    ("sd3-medium", True, 5_973_224_240),
    ("sd35-medium", False, 5_107_104_286),
    ("sd35-large", False, 16_460_379_262),
]
SITES = {
    "sd15": {"attention": 128, "cross-attention": 64, "linear": 184, "conv": 98, "text-encoder": 48, "all": 282},
    "sd21": {"attention": 128, "cross-attention": 64, "linear": 216, "conv": 66, "text-encoder": 92, "all": 282},
    "sdxl": {"attention": 560, "cross-attention": 280, "linear": 743, "conv": 51, "text-encoder": 176, "all": 794},
    "sd3-medium": {"attention": 191, "linear": 340, "conv": 1, "text-encoder": 176, "all": 341},
    "sd35-medium": {"attention": 243, "linear": 392, "conv": 1, "text-encoder": 176, "all": 393},
    "sd35-large": {"attention": 303, "linear": 536, "conv": 1, "text-encoder": 176, "all": 537},
}


@pytest.fixture(scope="module", params=checkpoint.LAYOUTS, ids=lambda layout: layout.name)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def networks(layout, tmp_path_factory):
    return networks_without_values(layout, tmp_path_factory.mktemp("real") / "configs")


def networks_without_values(layout, configs):
    """The real networks of a layout on the meta device, from the configurations that we build."""
    parts = published.configurations(layout.name)
    published.write_configurations(parts, families()[layout.family].pipeline_class, configs)
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


def test_built_configurations_are_the_published_models(layout, networks):
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in vars(networks).items()}
    assert counts == PUBLISHED[layout.name]


def test_sites_of_the_published_models(layout, networks):
    family = families()[layout.family]
    base = family(layout.name, types.SimpleNamespace(components=vars(networks)))
    assert {group: len(base.select([group])) for group in family.groups} == SITES[layout.name]


@pytest.mark.parametrize("layout", SD3, indirect=True)
def test_sd3_transformers_come_from_the_names_that_diffusers_converts(networks):
    tensors = {f"model.diffusion_model.{name}": value for name, value in mmdit_tensors(networks.transformer).items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    expected = networks.transformer.state_dict()
    assert {name: value.shape for name, value in converted.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("layout", SD3, indirect=True)
def test_sd3_files_have_the_published_sizes(layout, networks):
    tensors = original_tensors(networks)
    for clips, published_bytes in ((clips, size) for name, clips, size in PUBLISHED_FILES if name == layout.name):
        held = [value for name, value in tensors.items() if clips or not name.startswith("text_encoders.")]
        header = published_bytes - sum(2 * value.numel() for value in held)  # all in 16 bits
        assert 100 * len(held) < header < 200 * len(held)  # a name, a shape, two offsets


def test_published_layout_is_recognised_and_incomplete_ones_refused(layout, networks):
    shapes = {name: tuple(value.shape) for name, value in original_tensors(networks).items()}
    assert checkpoint.recognise(shapes, {}, "file") is layout

    def faults(changed, header=()):
        with pytest.raises(BaseError) as refusal:
            checkpoint.recognise(changed, dict(header), "some.safetensors")
        return f"{refusal.value.message} | {refusal.value.hint}"

    def without(prefix):
        return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}

    assert "no autoencoder" in faults(without("first_stage_model."))
    for prefix in layout.text_prefixes:
        assert "no text encoder" in faults(without(prefix))
        assert layout.whole in faults(without(prefix))
    is_sd3 = layout.family == "sd3"
    block = "joint_blocks.7." if is_sd3 else "middle_block.1."
    assert "another build" in faults(without(f"model.diffusion_model.{block}"))
    entry = "model.diffusion_model." + ("x_embedder.proj.weight" if is_sd3 else "input_blocks.0.0.weight")
    wide = (shapes[entry][0], 2 * layout.channels + 1, *shapes[entry][2:])
    assert "inpainting" in faults(shapes | {entry: wide})
    assert "8-bit" in faults(shapes | {entry.replace(".weight", ".scale_weight"): ()})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "an adapter"),
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", "an adapter"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network of a diffusers folder"),
        ("joint_blocks.0.x_block.mlp.fc1.weight", "the transformer of Stable Diffusion 3 alone"),
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


def as_one_file(base, folder):
    """The base again, opened from a file under the original names; Stable Diffusion 3's T5 is left unread in it."""
    tensors = {name: value.contiguous() for name, value in original_tensors(base.pipe).items()}
    if base.family == "sd3":
        base.pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    base.pipe.save_pretrained(folder / "configs")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "one.safetensors")
    return type(base).from_checkpoint(folder / "one.safetensors", folder / "configs", "one", torch.float32)


def tiny_as_published(family):
    base = family.tiny()
    if base.family == "sd3":
        projection = base.pipe.text_encoder.text_projection.weight
        projection.data = torch.eye(len(projection))
    return base


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL, StableDiffusion3])
def test_checkpoint_of_one_file_is_the_same_base_as_its_folder(family, tmp_path):
    base = tiny_as_published(family)
    loaded = as_one_file(base, tmp_path)
    assert loaded.identity().architecture == base.identity().architecture
    assert loaded.identity().values == base.identity().values
    request = Request(["a photo of a cat"], [1], steps=2)
    assert loaded.generate(request)[0].tobytes() == base.generate(request)[0].tobytes()


def test_sd3_without_t5_trains_draws_and_is_exported(tmp_path, pictures):
    loaded = as_one_file(tiny_as_published(StableDiffusion3), tmp_path)
    loaded.pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(
        f"description: test\nbase: {tmp_path / 'base'}\nmethod: {{kind: lora, rank: 2}}\ndata: {{path: {pictures}}}\n"
        "steps: 2\nlearning_rate: 0.1\nsample_every: 0\n"
    )
    assert [*plan(Order(str(tmp_path / "recipe.yaml"), run=tmp_path / "run")).events()][-1].kind == "finished"
    adapter = load_adapter(tmp_path / "run" / "adapter.safetensors")
    request = Request(["a photo of a cat"], [1], steps=2)
    before = loaded.generate(request)[0].tobytes()
    with attach({name: loaded.sites()[name] for name in adapter.by_site()}, adapter.by_site()):
        adapted = loaded.generate(request)[0]
    assert adapted.tobytes() != before
    report = export_adapter(adapter, loaded, "checkpoint", tmp_path / "exported")
    assert report.status == "exact"
    assert "text_encoder_3=None, tokenizer_3=None" in report.warnings[0]
    exported = load_base(report.path)
    assert exported.pipe.text_encoder_3 is None
    merged = exported.generate(request)[0]
    assert abs(np.asarray(merged, float) - np.asarray(adapted, float)).max() <= 1


def test_metadata_of_a_checkpoint_says_what_it_predicts(monkeypatch, tmp_path):
    layout = checkpoint.LAYOUTS[2]
    monkeypatch.setattr(checkpoint, "recognise", lambda *_: layout)
    file = tmp_path / "v.safetensors"
    save_file({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, file, {"modelspec.license": "mine"})
    found = checkpoint.read_checkpoint(file)
    assert (found.prediction_type, found.zero_snr, found.licence) == ("v_prediction", True, "mine")
    scheduler = published.configurations(layout.name, found.prediction_type, found.zero_snr)["scheduler"][2]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"]
    save_file({"x": torch.zeros(1)}, file, {"modelspec.prediction_type": "epsilon"})
    assert checkpoint.read_checkpoint(file).prediction_type == "epsilon"
    second = published.configurations("sd21", "epsilon")
    assert (second["unet"][2]["sample_size"], second["scheduler"][2]["prediction_type"]) == (64, "epsilon")
    second = published.configurations("sd21")
    assert (second["unet"][2]["sample_size"], second["scheduler"][2]["prediction_type"]) == (96, "v_prediction")


def test_clip_tokenizer_gives_clips_own_tokens(tmp_path):
    tokenizer = published.clip_tokenizer()
    assert len(tokenizer) == 49_408
    # The ids that CLIP's authors and every Stable Diffusion tutorial print for this sentence.
    assert tokenizer("A photo  of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("").input_ids == [49406, 49407]
    published.clip_tokenizer("!").save_pretrained(tmp_path)
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
@pytest.mark.parametrize("layout", checkpoint.LAYOUTS[:-1], ids=lambda layout: layout.name, indirect=True)
def test_checkpoint_of_real_size_opens_offline(layout, networks, tmp_path):
    """Zeros in the real shapes: 2 to 8 GiB of memory, no disk."""
    shapes = {name: value.shape for name, value in original_tensors(networks).items()}
    if layout.family == "sd3":
        shapes["text_encoders.t5xxl.transformer.shared.weight"] = (32128, 4096)
    write_zeros(shapes, tmp_path / "real.safetensors")
    base = load_base(tmp_path / "real.safetensors", dtype="bf16")
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in base.modules.items()}
    assert counts == PUBLISHED[layout.name]
    assert not any(p.is_meta for module in base.modules.values() for p in module.parameters())
    assert base.resolution == {"sd15": 512, "sd21": 768}.get(layout.name, 1024)
    length = 77 + 256 if layout.family == "sd3" else 77
    assert base.encode_prompts(["a cat"], (512, 512))["text"].shape == (1, length, layout.text_width)
    assert [note for note in base.notes if "real.safetensors" in note] == base.notes
    assert len(base.notes) == (layout.name not in ("sd15", "sdxl"))


def test_sd3_file_says_that_t5_is_left_out():
    medium = SD3[0]
    without, with_t5 = (checkpoint.Checkpoint(medium, None, False, "", has_t5).notes("x") for has_t5 in (False, True))
    assert "it has no T5" in without[0]
    assert "left unread" in with_t5[0]


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


# -- outlines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "sticker_video"])
def test_an_outline_has_the_layers_of_the_base_and_none_of_its_numbers(tmp_path, family):
    families()[family].tiny().pipe.save_pretrained(tmp_path / "base")
    drawn, whole = outline(str(tmp_path / "base")), load_base(tmp_path / "base")
    assert {name: site.shape for name, site in drawn.sites().items()} == {n: s.shape for n, s in whole.sites().items()}
    assert drawn.identity().model_copy(update={"values": whole.identity().values, "licence": ""}) == (
        whole.identity().model_copy(update={"licence": ""})
    )
    assert all(parameter.is_meta for part in drawn.components.values() for parameter in part.parameters())


@pytest.mark.parametrize(("name", "linear", "weights"), [("sd15", 184, 859_520_964), ("sdxl", 743, 2_567_463_684)])
def test_outlines_of_published_models_need_neither_download_nor_memory(name, linear, weights):
    base = outline(name)
    assert sum(parameter.numel() for parameter in base.denoiser.parameters()) == weights
    kinds = [site.shape.kind for site in base.sites().values() if site.component == "unet"]
    assert kinds.count("linear") == linear
    assert base.name == name


def test_what_is_not_known_of_a_base_is_not_held_against_it_but_where_it_must_be_known(tiny_base_folder):
    drawn, whole = outline(str(tiny_base_folder)), load_base(tiny_base_folder)
    assert drawn.check(whole.identity()) == whole.check(drawn.identity()) == ""
    with pytest.raises(AdapterError, match="depends on the weights"):
        drawn.check(whole.identity(), needs_values=True)
