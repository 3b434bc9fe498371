"""Exports in the hands of a stranger: diffusers alone, in a fresh process, draws the picture that the studio draws."""

import json
import subprocess
import sys
from itertools import product

import numpy as np
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
import json
import sys
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
torch.set_num_threads(1)
for kind, base, lora, prompt, out, guidance in json.loads(sys.argv[1]):
    pipe = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind].from_pretrained(base)
    pipe.load_lora_weights(lora)
    options = {"guidance_scale": guidance} if guidance else {}
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


def test_plain_diffusers_draws_the_pictures_that_the_studio_draws(tmp_path):
    StableDiffusionXL.tiny().pipe.save_pretrained(tmp_path / "sdxl")
    folders = {"sd": assets_dir() / "bases" / "sticker", "sdxl": tmp_path / "sdxl"}
    drawn, orders = {}, []
    for (kind, folder), (name, config) in product(folders.items(), METHODS.items()):
        base, lora = load_base(str(folder)), tmp_path / f"{kind}-{name}"
        adapter = strong_adapter(base, config)
        assert export_adapter(adapter, base, "diffusers", lora).to_dict()["status"] == "exact"
        request = Request(["a dog"], [7], steps=4)
        alone = base.generate(request)[0]
        with wearing(base, [Use("x", adapter)]):
            drawn[f"{lora}.png"] = alone, base.generate(request)[0]
        orders.append([kind, str(folder), str(lora), "a dog", f"{lora}.png", base.guidance])
    command = [sys.executable, "-P", "-c", PROGRAM, json.dumps(orders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for path, (alone, ours) in drawn.items():
        alone, ours, theirs = (np.asarray(picture).astype(int) for picture in (alone, ours, Image.open(path)))
        assert np.abs(ours - theirs).max() <= 1, path
        assert np.abs(ours - alone).mean() > 2, path
