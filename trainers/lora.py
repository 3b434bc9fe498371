"""LoRA: low-rank adaptation (Hu et al. 2021), on linear and convolution layers and embeddings.

    delta W = s B A,   A (R, I) random, B (O, R) zero at the start,   s = alpha / R

For a k x k convolution A is a k x k convolution to R channels and B a 1 x 1 convolution back (LoCon); for an embedding
B is a table of N rows of width R, and A (R, D) widens them, normal at the start.
B batch, O out, I in, R rank, N entries, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from studio.errors import PresetError
from studio.keyed import torch_generator
from studio.lowrank import LowRankPatch
from studio.method import Origin, RankedMethod, register
from studio.patch import LayerShape


@register
class Lora(RankedMethod):
    """Low-rank adaptation: two thin matrices per layer, both trained."""

    kind: Literal["lora"] = "lora"
    paper = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    kinds = (*RankedMethod.kinds, "embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the down-projection.")

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> LowRankPatch:
        if shape.groups != 1:
            raise PresetError(f"lora is not defined on '{name}': a convolution with {shape.groups} groups")
        rank = self.rank_at(name, shape)
        down = torch.empty(rank, shape.in_features, *shape.kernel)
        generator = torch_generator("lora", origin.seed, name)
        if shape.kind == "embedding":
            down.normal_(generator=generator)
        else:  # PEFT's and Microsoft's start: uniform within +-1/sqrt(fan in)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(shape.out_features, rank, *[1] * len(shape.kernel))
        return LowRankPatch(shape, nn.Parameter(down), nn.Parameter(up), self.scale_at(name, rank), self.dropout)
