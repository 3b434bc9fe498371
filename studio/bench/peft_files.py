"""PEFT's own merging of LoRA files, as a process: `python -m studio.bench.peft_files cat A B ... --out FILE`.

The files are diffusers'. `cat` puts ranks side by side, which is exact; `svd` brings the sum down to rank 32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

RANK = 32


class Bare(nn.Module):
    """Layers at given paths, for PEFT to hang adapters on; all their weights are one number in memory."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for path, (height, width) in shapes.items():
            place: nn.Module = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in place._modules:
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            with torch.device("meta"):
                layer = nn.Linear(width, height, bias=False)
            layer.weight = nn.Parameter(torch.zeros(1, 1).expand(height, width), requires_grad=False)
            place.add_module(last, layer)


def main() -> None:
    from peft import LoraConfig, LoraModel, get_peft_model_state_dict

    parser = argparse.ArgumentParser(prog="python -m studio.bench.peft_files")
    parser.add_argument("combination", choices=["cat", "svd"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shapes, rank = _shapes(options.files[0])
    names = [f"a{number}" for number in range(len(options.files))]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(shapes))
    model = LoraModel(Bare(shapes), config, names[0], low_cpu_mem_usage=True)
    for name, file in zip(names, options.files):
        if name != names[0]:
            model.peft_config[name] = config
            model.inject_adapter(model.model, name, low_cpu_mem_usage=True)
        own = {f"{key[5:-7]}.{name}.weight": value for key, value in load_file(file).items()}  # unet. ... .weight
        if model.model.load_state_dict(own, strict=False, assign=True).unexpected_keys:
            raise SystemExit(f"error: PEFT has no place for some of '{file}'")
    how: dict[str, Any] = {"svd_rank": RANK, "svd_full_matrices": False} if options.combination == "svd" else {}
    model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type=options.combination, **how)
    merged = get_peft_model_state_dict(model, adapter_name="sum")
    save_file({name: value.contiguous() for name, value in merged.items()}, options.out)


def _shapes(file: Path) -> tuple[dict[str, tuple[int, int]], int]:
    shapes: dict[str, list[int]] = {}
    rank = 0
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (it cannot be iterated)
            path, _, part = key.removeprefix("unet.").rpartition(".lora_")
            height, width = opened.get_slice(key).get_shape()
            rank = height if part.startswith("A") else width
            place = shapes.setdefault(path, [0, 0])
            place[1 if part.startswith("A") else 0] = width if part.startswith("A") else height
    return {path: (height, width) for path, (height, width) in shapes.items()}, rank


if __name__ == "__main__":
    main()
