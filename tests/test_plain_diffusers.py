"""Exports in the hands of a stranger: diffusers alone, in a fresh process, draws the picture that the studio draws."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from studio.adapter import Card, new_adapter
from studio.base import Request
from studio.bases.registry import load_base
from studio.bases.sdxl import StableDiffusionXL
from studio.exporting import export_adapter
from studio.generation import Use, wearing
from studio.method import method_from
from studio.paths import assets_dir

PROGRAM = """
import sys
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
kind, base, lora, prompt, out, *guidance = sys.argv[1:]
torch.set_num_threads(1)
pipe = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind].from_pretrained(base)
pipe.load_lora_weights(lora)
options = {"guidance_scale": float(guidance[0])} if guidance else {}
pipe(prompt, generator=torch.Generator("cpu").manual_seed(7), num_inference_steps=4, **options).images[0].save(out)
assert not [name for name in sys.modules if name.split(".")[0] in ("studio", "trainers")]
"""
METHODS = {
    "mixed ranks and convolutions": {
        "kind": "lora",
        "rank": 4,
        "alpha": 2.0,
        "rank_pattern": {"to_q": 2, "*conv1": 3},
        "alpha_pattern": {"to_k": 8.0},
        "target_modules": ["attention", "conv"],
    },
    "orthogonal": {"kind": "orthogonal", "rank": 6},
}


def strong_adapter(base, config):
    method = method_from(config)
    sites = {name: site.shape for name, site in base.select(method.target_modules).items()}
    adapter = new_adapter(Card(method=method.model_dump(mode="json"), base=base.identity(), sites=sites, concept="c"))
    generator = torch.Generator().manual_seed(0)
    for terms in adapter.patches.values():
        torch.nn.init.normal_(terms["main"].up, std=0.4, generator=generator)
    return adapter


@pytest.mark.parametrize("config", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_plain_diffusers_draws_the_picture_that_the_studio_draws(kind, config, tmp_path):
    folder = assets_dir() / "bases" / "sticker"
    if kind == "sdxl":
        folder = tmp_path / "sdxl"
        StableDiffusionXL.tiny().pipe.save_pretrained(folder)
    base = load_base(str(folder))
    adapter = strong_adapter(base, config)
    report = export_adapter(adapter, base, "diffusers", tmp_path / "lora")
    assert report.to_dict()["status"] == "exact"
    request = Request(["a dog"], [7], steps=4)
    alone = np.asarray(base.generate(request)[0]).astype(int)
    with wearing(base, [Use("x", adapter)]):
        ours = np.asarray(base.generate(request)[0]).astype(int)
    command = [
        sys.executable,
        "-P",
        "-c",
        PROGRAM,
        kind,
        str(folder),
        str(tmp_path / "lora"),
        "a dog",
        str(tmp_path / "theirs.png"),
        *([str(base.guidance)] if base.guidance is not None else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.asarray(Image.open(tmp_path / "theirs.png")).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - alone).mean() > 2
