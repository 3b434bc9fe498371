"""The low-rank patch that LoRA, Orthogonal Adaptation and every imported LoRA file share.

v(x) = s B (A x),   delta W = s B A        A (R, I, k...), B (O, R, 1...), s a number;   embedding: A (R, D), B (N, R)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.functional import CONVOLUTIONS, convolve, look_up
from studio.patch import Delta, LayerCall, LayerShape


class LowRankPatch(Delta):
    """`down` is A, `up` is B; each is trained if it is a Parameter and frozen if it is a plain tensor."""

    down: Tensor
    up: Tensor

    def __init__(self, shape: LayerShape, down: Tensor, up: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        for name, value in (("down", down), ("up", up)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.dropout = nn.Dropout(dropout) if dropout else None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        if self.shape.kind == "embedding":
            return F.linear(look_up(x, self.up, call), self.down.T * self.scale)
        if self.dropout is not None:
            x = self.dropout(x)
        up = self.up if self.scale == 1.0 else self.up * self.scale  # cheaper than scaling the output
        if self.shape.kind == "linear":
            return F.linear(F.linear(x, self.down), up)
        return CONVOLUTIONS[self.shape.kind](convolve(self.shape, x, self.down), up)

    def delta(self, weight: Tensor) -> Tensor:
        down, up = self.low_rank()
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape.weight).to(weight.device)

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.down.detach().double().float(), (self.up.detach() * self.scale).double().float()
