"""Exports, read by programs that know nothing of us. B batch, O out, I in, R rank."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from studio.adapter import Card, new_adapter
from studio.attachment import attach
from studio.base import Request
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import AdapterError, ExportRefused, RequestError, WorkError
from studio.exporting import diff, export_adapter
from studio.exporting.approximation import product, truncated
from studio.exporting.job import Job
from studio.exporting.proof import prove_by_formula, prove_in_diffusers
from studio.lowrank import LowRankPatch
from studio.method import method_from
from studio.patch import Delta, LayerShape
from studio.words import WordAttachment

MIXED = {  # scales other than 1, and several ranks, on linear layers, convolutions and the text encoder
    "kind": "lora",
    "rank": 4,
    "alpha": 6,
    "rank_pattern": {"to_q": 2, "conv1": 3, "proj_in": 1, "*q_proj": 5},
    "alpha_pattern": {"to_v": 1},
    "target_modules": ["all", "text-encoder"],
}
WORD, PROMPT = "<my-cat>", "a photo of <my-cat>"
PROMPT_SEED, STEPS = 5, 3


def trained(base, config, words=0, scale=0.2, seed=0):
    """An adapter whose `up` matrices are as if trained: random instead of zero."""
    method = method_from(config)
    shapes = {name: site.shape for name, site in base.select(method.target_modules).items()}
    card = Card(method=method.model_dump(mode="json"), base=base.identity(), sites=shapes, trigger=WORD, concept="cat")
    adapter = new_adapter(card)
    generator = torch.Generator().manual_seed(seed)
    for terms in adapter.patches.values():
        terms["main"].up.data.normal_(0, scale, generator=generator)
    for encoder in base.text_encoder_names if words else ():
        width = base.components[encoder].get_input_embeddings().weight.shape[1]
        adapter.words[encoder] = {WORD: torch.randn(words, width, generator=generator)}
    return adapter


def fingerprint(base):
    digest = hashlib.sha256()
    for module in base.modules.values():
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest(), len(base.pipe.tokenizer)


def names_beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny()


@pytest.fixture(scope="module")
def adapter(base):
    return trained(base, MIXED, words=2)


@pytest.fixture(scope="module")
def exports(base, adapter, tmp_path_factory):
    """Reports of the same adapter as diffusers' LoRA and as a checkpoint, and the base's hash before."""
    folder, before = tmp_path_factory.mktemp("exports"), fingerprint(base)
    reports = {to: export_adapter(adapter, base, to, folder / f"as-{to}") for to in ("diffusers", "checkpoint")}
    return reports, before


@pytest.fixture
def linear_adapter(base):
    return trained(base, {"kind": "lora", "rank": 2, "target_modules": ["mid_block*to_q", "mid_block*conv1"]})


@pytest.mark.parametrize("to", ["diffusers", "checkpoint"])
def test_mixed_ranks_on_every_kind_of_layer_are_exact(exports, adapter, to):
    report = exports[0][to]
    assert report.status == "exact"
    assert {row.site for row in report.rows} == set(adapter.patches)
    assert min(row.norm for row in report.rows) > 0
    assert report.max_error < 1e-5
    assert 0.999999 < report.energy_kept < 1.000001


def test_plain_diffusers_draws_our_picture(base, adapter, exports, tmp_path):
    base.pipe.save_pretrained(tmp_path / "base")
    folder, checkpoint = exports[0]["diffusers"].path, exports[0]["checkpoint"].path
    script = Path(__file__).with_name("plain_diffusers_pictures.py")
    arguments = (tmp_path / "base", folder, folder / "my-cat.safetensors", checkpoint, PROMPT, PROMPT_SEED, STEPS)
    outcome = subprocess.run(
        [sys.executable, "-P", script, *map(str, arguments), tmp_path],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    words = WordAttachment(base, adapter.words)
    with attach(base.sites(), adapter.by_site()):
        ours = np.asarray(base.generate(Request([PROMPT], [PROMPT_SEED], steps=STEPS))[0]) / 255
    words.detach()
    theirs = {name: np.load(tmp_path / f"{name}.npy") for name in ("lora", "base", "checkpoint")}
    assert abs(theirs["base"] - theirs["lora"]).max() > 0.1  # the adapter does something
    assert abs(theirs["lora"] - ours).max() <= 0.501 / 255 + 1e-4  # ours is rounded to bytes
    assert abs(theirs["checkpoint"] - theirs["lora"]).max() < 1e-4


def test_metadata_are_the_five_arguments_that_every_peft_knows(exports):
    with safe_open(exports[0]["diffusers"].path / "pytorch_lora_weights.safetensors", "pt") as file:
        configs = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = list(file.keys())
    fields = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    assert set(configs) == {f"{component}.{name}" for component in ("unet", "text_encoder") for name in fields}
    assert configs["unet.r"] == configs["unet.lora_alpha"] == 4
    assert configs["unet.rank_pattern"] == configs["unet.alpha_pattern"]
    assert configs["unet.rank_pattern"][r"^mid_block\.resnets\.0\.conv1"] == 3
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_exports_leave_the_base_as_it_was(base, exports):
    assert fingerprint(base) == exports[1]


def test_report_lies_beside_the_files(exports):
    report = exports[0]["diffusers"]
    facts = json.loads((report.path / "export.json").read_text())
    assert facts["status"] == "exact"
    assert facts["files"] == ["my-cat.safetensors", "pytorch_lora_weights.safetensors"]
    assert len(facts["layers"]) == len(report.rows)


def test_half_precision_checkpoint_keeps_the_text_encoder_whole_and_no_path(tiny_base_folder, tmp_path):
    base = StableDiffusion("tiny", DiffusionPipeline.from_pretrained(tiny_base_folder))
    adapter = trained(base, {"kind": "lora", "rank": 2, "target_modules": ["mid_block*to_q", "*layers.0*q_proj"]})
    report = export_adapter(adapter, base, "checkpoint", tmp_path / "out", dtype=torch.float16)
    assert report.status == "approximate"
    assert 1e-5 < report.max_error < 0.1
    assert "float16 rounds" in report.warnings[0]
    text = load_file(tmp_path / "out/text_encoder/model.safetensors")
    unet = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in text.values()} == {torch.float32}
    assert {value.dtype for value in unet.values()} == {torch.float16}
    site = next(name for name in adapter.patches if name.startswith("text_encoder"))
    weight = base.sites()[site].module.weight.detach()
    merged = weight + adapter.patches[site]["main"].delta(weight)
    stored = next(value for name, value in text.items() if name.endswith(f"{site.split('.', 1)[1]}.weight"))
    assert torch.allclose(stored, merged, atol=1e-7)
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    assert len(texts) > 5
    assert not any(str(tiny_base_folder) in text for text in texts)


def test_sdxl_kohya_file_is_exact_in_diffusers_and_by_its_formula(tmp_path):
    base = StableDiffusionXL.tiny()
    # The first encoder without `out_proj`: then plain diffusers would load fc1 and drop q_proj without a word.
    targets = ["all", "text_encoder.*q_proj", "text_encoder.*fc1", "text_encoder_2*"]
    config = {"kind": "orthogonal", "rank": 3, "rank_pattern": {"to_k": 2}, "target_modules": targets}
    adapter = trained(base, config, words=2)
    report = export_adapter(adapter, base, "kohya", tmp_path / "cat")
    assert report.status == "exact"
    assert {row.site for row in report.rows} == set(adapter.patches)
    assert report.path == tmp_path / "cat" / "cat.safetensors"
    assert report.path.exists()
    tensors = load_file(report.path)
    assert len({float(value) for name, value in tensors.items() if name.endswith(".alpha")}) == 1
    assert {name.split("_", 2)[1] for name in tensors} == {"unet", "te1", "te2"}
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    with safe_open(report.path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "lora_adapter_metadata" not in header
    assert not any(word in json.dumps(header) for word in ("dataset", "tag_frequency", str(tmp_path)))
    words = load_file(tmp_path / "cat" / "my-cat.safetensors")
    assert torch.equal(words["clip_l"], adapter.words["text_encoder"][WORD])
    assert torch.equal(words["clip_g"], adapter.words["text_encoder_2"][WORD])


def test_dense_diff_is_the_sum_of_all_terms(base, linear_adapter, tmp_path):
    name = next(iter(linear_adapter.patches))
    first = linear_adapter.patches[name]["main"]
    second = LowRankPatch(first.shape, torch.randn_like(first.down), torch.randn_like(first.up), 0.5)
    linear_adapter.patches[name]["second"] = second
    report = export_adapter(linear_adapter, base, "diff", tmp_path / "cat.safetensors")
    assert report.status == "exact"
    assert names_beside(report.path).count("cat.safetensors") == 1
    key = f"lora_{name.replace('.', '_')}.diff"
    weight = base.sites()[name].module.weight
    assert torch.allclose(load_file(report.path)[key], first.delta(weight) + second.delta(weight), atol=1e-6)


def test_terms_on_one_site_become_one_lora_of_their_ranks(base, linear_adapter):
    for terms in linear_adapter.patches.values():
        main = terms["main"]
        terms["second"] = LowRankPatch(main.shape, torch.randn_like(main.down), torch.randn_like(main.up), 0.5)
    job = Job(linear_adapter, base, "x")
    for name, factors in job.factors().items():
        assert factors.rank == 4
        assert torch.allclose(factors.product(), job.deltas[name].dense(), atol=1e-6)


def test_same_adapter_gives_the_same_bytes(base, linear_adapter, tmp_path):
    paths = [tmp_path / folder / "cat.safetensors" for folder in ("one", "two")]
    for path in paths:
        export_adapter(linear_adapter, base, "diff", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


class Rotation(Delta):
    """A full-rank change: W (Q - 1) for a rotation Q."""

    depends_on_weight = True

    def __init__(self, shape):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        skew = 0.1 * torch.randn(shape.in_features, shape.in_features, generator=generator)
        self.register_buffer("skew", skew - skew.T)

    def delta(self, weight):
        rotation = torch.linalg.matrix_exp(self.skew)
        return weight @ (rotation - torch.eye(len(rotation)))


def rotating(base, *others):
    """Rotations at two layers of the UNet, and LoRA at others."""
    adapter = trained(
        base, {"kind": "lora", "target_modules": ["mid_block*attn1.to_q", "mid_block*attn1.to_k", *others]}
    )
    for name in adapter.patches:
        if "attn1" in name:
            adapter.patches[name] = {"main": Rotation(base.sites()[name].shape)}
    return adapter


@pytest.fixture
def rotation(base):
    return rotating(base)


@pytest.fixture(scope="module")
def approximation(base, tmp_path_factory):
    """An approximate LoRA, with exact layers of the text encoder outside its attention."""
    adapter = rotating(base, "text_encoder*fc1")
    out = tmp_path_factory.mktemp("approximation") / "lora"
    return adapter, export_adapter(adapter, base, "diffusers", out, rank=8, allow_approximate=True)


def test_full_rank_change_is_refused_as_lora_and_exact_as_diff(base, rotation, tmp_path):
    for to in ("diffusers", "kohya"):
        with pytest.raises(ExportRefused, match=r"attn1.to_[qk]' \(2 of 2 layers\) has no exact low-rank form"):
            export_adapter(rotation, base, to, tmp_path / "lora")
    assert export_adapter(rotation, base, "diff", tmp_path / "dense").status == "exact"
    assert names_beside(tmp_path / "lora") == ["dense"]


def test_approximation_on_request_is_the_best_of_its_rank_and_says_what_it_lost(base, approximation):
    adapter, report = approximation
    assert report.status == "approximate"
    for row in report.rows:
        if "attn1" not in row.site:
            assert row.error < 1e-5
            continue
        delta = adapter.patches[row.site]["main"].delta(base.sites()[row.site].module.weight.detach())
        singular = torch.linalg.svdvals(delta.double())
        lost = float(singular[8:].square().sum() / singular.square().sum())
        assert row.rank == 8
        assert row.error == pytest.approx(lost**0.5, rel=1e-4)
        assert row.energy_kept == pytest.approx(1 - lost, rel=1e-4)
    assert 0.05 < report.total_error < 0.95
    assert report.to_dict()["energy_kept"] == pytest.approx(1 - report.total_error**2, rel=1e-4)


def test_text_encoder_without_attention_layers_is_still_loaded(approximation):
    adapter, report = approximation
    assert {row.site for row in report.rows if row.error < 1e-5} == {name for name in adapter.patches if "fc1" in name}
    tensors = load_file(report.path / "pytorch_lora_weights.safetensors")
    silent = [value for name, value in tensors.items() if "out_proj" in name]
    assert len(silent) == 2  # by an attention layer, its loader recognises the text encoder's file
    assert not any(value.any() for value in silent)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 4, 3, 3), (40, 2, 3, 3)])
def test_truncation_is_the_best_low_rank_matrix(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = truncated(delta, 3)
    best = torch.linalg.svdvals(delta.flatten(1))[3:].square().sum().sqrt()
    assert factors.down.shape == (3, *shape[1:])
    assert float((product(factors.down, factors.up) - delta).norm()) == pytest.approx(float(best), rel=1e-5)
    assert not truncated(torch.zeros(shape), 3).product().any()


def test_rank_below_the_adapters_own_is_an_approximation(base, linear_adapter, tmp_path):
    with pytest.raises(ExportRefused, match="no exact low-rank form of rank 1"):
        export_adapter(linear_adapter, base, "diffusers", tmp_path / "lora", rank=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dilation": (2, 2), "padding": (2, 2)}, "dilation"),
        ({"groups": 4}, "4 groups"),
        ({"padding_mode": "reflect"}, "'reflect'"),
    ],
)
def test_convolutions_that_peft_gets_wrong_are_refused(change, words, tmp_path):
    base = StableDiffusion.tiny()
    block = base.pipe.unet.mid_block.resnets[0]
    old = block.conv1
    options = {"padding": 1, **change}
    block.conv1 = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, **options).requires_grad_(False)
    name = "unet.mid_block.resnets.0.conv1"
    adapter = trained(base, {"kind": "lora", "target_modules": ["mid_block*to_q"]})
    shape = base.sites()[name].shape
    rank_two = torch.randn(2, *shape.weight[1:]), torch.randn(shape.out_features, 2, 1, 1)
    adapter.patches[name] = {"main": LowRankPatch(shape, *rank_two)}
    for to in ("diffusers", "kohya"):
        with pytest.raises(ExportRefused, match=rf"resnets.0.conv1' .*{words}.*\(1 of 3 layers\)"):
            export_adapter(adapter, base, to, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_patches_that_are_no_change_of_weights_are_refused(base, linear_adapter, tmp_path):
    from studio.patch import Patch

    name = next(iter(linear_adapter.patches))
    linear_adapter.patches[name]["block"] = Patch()
    with pytest.raises(ExportRefused, match="no change of weights"):
        export_adapter(linear_adapter, base, "diff", tmp_path / "x")


def test_adapter_for_another_architecture_is_refused(linear_adapter, tmp_path):
    with pytest.raises(AdapterError, match="built otherwise"):
        export_adapter(linear_adapter, StableDiffusionXL.tiny(), "diff", tmp_path / "x")


def test_weight_dependent_change_needs_its_own_base(rotation, tmp_path):
    with pytest.raises(AdapterError, match="depends on the weights"):
        export_adapter(rotation, StableDiffusion.tiny(seed=9), "diff", tmp_path / "x")


def test_word_that_the_base_knows_is_refused(base, linear_adapter, tmp_path):
    linear_adapter.words = {"text_encoder": {"cat</w>": torch.randn(1, 32)}}
    with pytest.raises(ExportRefused, match="already a token"):
        export_adapter(linear_adapter, base, "diffusers", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_infinite_delta_is_refused(base, linear_adapter, tmp_path):
    next(iter(linear_adapter.patches.values()))["main"].up.data[0] = float("inf")
    with pytest.raises(AdapterError, match="not finite"):
        export_adapter(linear_adapter, base, "diff", tmp_path / "x")


def test_numbers_beyond_half_precision_are_refused(base, linear_adapter, tmp_path):
    next(iter(linear_adapter.patches.values()))["main"].up.data[:] = 1e6
    with pytest.raises(ExportRefused, match="float16 cannot hold"):
        export_adapter(linear_adapter, base, "diff", tmp_path / "x", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_reported(base, linear_adapter, tmp_path, dtype):
    report = export_adapter(linear_adapter, base, "diff", tmp_path / "x", dtype=dtype)
    assert report.status == "approximate"
    assert 1e-5 < report.max_error < torch.finfo(dtype).eps


def test_adapter_of_zeros_is_exported_with_a_warning(base, tmp_path):
    adapter = trained(base, {"kind": "lora", "rank": 2, "target_modules": ["mid_block*to_q"]}, scale=0)
    report = export_adapter(adapter, base, "diff", tmp_path / "x")
    assert report.status == "exact"
    assert report.warnings == ["the adapter changes nothing: every delta is zero"]
    assert report.total_error == 0


def test_existing_output_is_replaced_only_if_forced_and_an_export(base, linear_adapter, tmp_path):
    out = tmp_path / "room" / "lora"
    out.mkdir(parents=True)
    export_adapter(linear_adapter, base, "diff", out)  # an empty folder is as good as none
    (out / "stale").write_text("x")
    with pytest.raises(RequestError, match="already there"):
        export_adapter(linear_adapter, base, "diff", out)
    assert (out / "stale").exists()
    export_adapter(linear_adapter, base, "diff", out, force=True)
    assert not (out / "stale").exists()
    assert names_beside(out) == ["lora"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_text("x")
    with pytest.raises(RequestError, match="no export"):
        export_adapter(linear_adapter, base, "diff", tmp_path / "photos", force=True)
    assert (tmp_path / "photos/me.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "difusers"}, "unknown export format"),
        ({"to": "diff", "rank": 4}, "rank 4"),
        ({"to": "diffusers", "rank": 0}, "rank 0"),
        ({"to": "diff", "dtype": torch.float64}, "float64"),
        ({"to": "checkpoint", "out": "x.safetensors"}, "is a folder"),
    ],
)
def test_wrong_requests_are_refused(base, linear_adapter, tmp_path, options, words):
    options = {"out": "x", **options}
    out = tmp_path / options.pop("out")
    with pytest.raises(RequestError, match=words) as error:
        export_adapter(linear_adapter, base, out=out, **options)
    assert error.value.hint
    assert not out.exists()


def test_words_beside_a_single_file_are_refused(base, adapter, tmp_path):
    with pytest.raises(RequestError, match="files of their own"):
        export_adapter(adapter, base, "kohya", tmp_path / "cat.safetensors")


def test_file_that_reads_back_otherwise_is_not_left_behind(base, linear_adapter, tmp_path, monkeypatch):
    write = diff.write_model
    monkeypatch.setattr(
        diff,
        "write_model",
        lambda path, tensors, header: write(path, {k: 1.001 * v for k, v in tensors.items()}, header),
    )
    with pytest.raises(WorkError, match=r"is wrong by 1\.0e-03"):
        export_adapter(linear_adapter, base, "diff", tmp_path / "room" / "x")
    assert list((tmp_path / "room").iterdir()) == []


def test_layer_that_no_reader_finds_fails_the_proof(base, linear_adapter, tmp_path):
    report = export_adapter(linear_adapter, base, "diff", tmp_path / "x.safetensors")
    tensors = load_file(report.path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, tmp_path / "less.safetensors")
    job = Job(linear_adapter, base, "x")
    with pytest.raises(WorkError, match=f"1 of {len(job.deltas)} layers are not there"):
        prove_by_formula(job, tmp_path / "less.safetensors", lambda site: job.deltas[site].dense())


def test_wrong_alpha_in_the_metadata_fails_the_proof(base, adapter, exports, tmp_path):
    source = exports[0]["diffusers"].path / "pytorch_lora_weights.safetensors"
    with safe_open(source, "pt") as file:
        header = file.metadata()
    configs = json.loads(header["lora_adapter_metadata"])
    configs["text_encoder.lora_alpha"] *= 2
    header["lora_adapter_metadata"] = json.dumps(configs)
    save_file(load_file(source), tmp_path / source.name, header)
    job = Job(adapter, base, "x")
    with pytest.raises(WorkError, match=r"read back by diffusers, 'text_encoder\..*' is wrong by 1\.0e"):
        prove_in_diffusers(job, tmp_path, [], lambda site: job.deltas[site].dense())


def test_layer_shape_of_sites_is_that_of_the_delta(base, adapter):
    for name, site in Job(adapter, base, "x").deltas.items():
        assert isinstance(site.shape, LayerShape)
        assert site.dense().shape == base.sites()[name].module.weight.shape
