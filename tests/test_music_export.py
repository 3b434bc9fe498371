"""LoRA on MusicGen leaves as a PEFT folder that plain PEFT reads; inserted modules do not leave at all."""

import pytest
import torch
from peft import PeftModel

from studio.adapter import Card, new_adapter
from studio.attachment import attach
from studio.bases.musicgen import MusicGen
from studio.errors import ExportRefused
from studio.exporting import export_adapter
from studio.method import method_from


def adapter_on(base, config):
    method = method_from(config)
    sites = method.sites(base)
    card = Card(
        method=method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: site.shape for name, site in sites.items()},
        trigger="tune",
    )
    adapter = new_adapter(card, {name: site.module for name, site in sites.items()})
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return sites, adapter


def lora(base):
    return adapter_on(
        base,
        {
            "kind": "lora",
            "rank": 4,
            "alpha": 6.0,
            "rank_pattern": {"q_proj": 2, "fc1": 3},
            "target_modules": ["linear", "text-encoder"],
        },
    )


@torch.no_grad()
def test_plain_peft_computes_what_the_attached_lora_computes(tmp_path):
    base = MusicGen.tiny()
    sites, adapter = lora(base)
    codes = torch.randint(0, 32, (2, 4, 12), generator=torch.Generator().manual_seed(1))
    bare = base.losses(codes, base.encode_prompts(["a cat", "dog"]))
    with attach(sites, adapter.by_site()):
        expected = base.losses(codes, base.encode_prompts(["a cat", "dog"]))
    report = export_adapter(adapter, base, "peft", tmp_path / "lora")
    assert report.to_dict()["status"] == "exact"
    other = MusicGen.tiny()
    loaded = PeftModel.from_pretrained(other.denoiser, tmp_path / "lora")
    other.pipe.musicgen = loaded.base_model.model
    found = other.losses(codes, other.encode_prompts(["a cat", "dog"]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-2)


def test_the_same_adapter_gives_the_same_folder(tmp_path):
    base = MusicGen.tiny()
    _, adapter = lora(base)
    for name in ("one", "two"):
        export_adapter(adapter, base, "peft", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("target", ["peft", "diffusers", "checkpoint"])
def test_inserted_modules_are_refused(target, tmp_path):
    base = MusicGen.tiny()
    _, adapter = adapter_on(base, {"kind": "music-linear", "bottleneck": 4})
    with pytest.raises(ExportRefused):
        export_adapter(adapter, base, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["diffusers", "checkpoint"])
def test_formats_of_diffusers_are_refused_for_musicgen(target, tmp_path):
    base = MusicGen.tiny()
    with pytest.raises(ExportRefused):
        export_adapter(lora(base)[1], base, target, tmp_path / "out")
