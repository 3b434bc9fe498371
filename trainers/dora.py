"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024): LoRA turns the rows of the weight, m stretches them.

    W' = m V / ||V||,   V = W0 + s B A,   m = ||W0|| at the start,   s = alpha / R

||.|| is the norm of each row, the weights of one output; for a convolution over all axes but the output's, as in PEFT.
It is a constant in the gradient (the paper's section 4.3). The change of the output needs neither W' nor B A densely:

    v(x) = (g - 1) W0 x + g s B A x,   g = m / ||V||,   ||V||^2 = ||W0||^2 + 2 s <W0, B A> + s^2 ||B A||^2

W0 x is the layer's own output less its bias. ||W0|| is stored beside m, hence g is 1, exactly, where B is 0.
O out, I in (times the kernel), R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from studio.errors import PresetError
from studio.functional import CONVOLUTIONS, convolve
from studio.keyed import torch_generator
from studio.method import Origin, RankedMethod, register
from studio.patch import Delta, LayerCall, LayerShape


@register
class Dora(RankedMethod):
    """Weight-decomposed adaptation: LoRA for the direction of each row of the weight, and one number for its length."""

    kind: Literal["dora"] = "dora"
    paper = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353"
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the whole change, as in PEFT.")

    @property
    def has_low_rank_form(self) -> bool:
        return False

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> DoraPatch:
        if shape.groups != 1:
            raise PresetError(f"dora is not defined on '{name}': a convolution with {shape.groups} groups")
        rank = self.rank_at(name, shape)
        down = torch.empty(rank, shape.in_features, *shape.kernel)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=torch_generator("dora", origin.seed, name))
        up = torch.zeros(shape.out_features, rank, *[1] * len(shape.kernel))
        norm = torch.full((shape.out_features,), math.nan) if weight is None else row_norm(weight)
        return DoraPatch(shape, down, up, norm, self.scale_at(name, rank), self.dropout)


def row_norm(weight: Tensor) -> Tensor:
    """||W0||, (O,), summed in fp64."""
    return weight.detach().flatten(1).double().norm(dim=1).float().cpu()


class DoraPatch(Delta):
    """`down` (R, I, k...) is A, `up` (O, R, 1...) is B, `magnitude` (O,) is m; `norm` (O,) is ||W0||, not trained.

    `norm` is NaN until it is known: from the layer, or from a file.
    A row of W0 that is all zeros has no direction: there the update is LoRA's, and m does nothing.
    """

    depends_on_weight = True
    norm: Tensor

    def __init__(
        self, shape: LayerShape, down: Tensor, up: Tensor, norm: Tensor, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.magnitude = nn.Parameter(norm.clone())
        self.register_buffer("norm", norm)
        self.dropout = nn.Dropout(dropout) if dropout else None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def gain(self, weight: Tensor) -> Tensor:
        """g = m / ||V||, (O,); 1 for rows of zeros. Only m has a gradient through it."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            a, b = self.down.flatten(1), self.up.flatten(1) * self.scale
            turned = b @ (a @ a.T) + 2 * (weight.flatten(1).to(a.dtype) @ a.T)  # (O, R): never (O, I)
            squared = self.norm**2
            live = squared != 0
            growth = 1 + (b * turned).sum(1) / squared.where(live, 1)
            length = (self.norm * growth.clamp(min=1e-12).sqrt()).where(live, 1)
        return (self.magnitude / length).where(live, 1)

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        weight = call.layer.get_parameter("weight").detach()
        bias = call.layer.get_parameter("bias").detach() if self.shape.bias else None
        if call.shifted or (self.dropout is not None and self.training):
            x = self.dropout(x) if self.dropout is not None else x
            y, bias = self._through(x, weight), None
        gain = self.gain(weight)
        # g goes into B, and the bias that is in y into the product's own: no further tensor of the output's size.
        up = (gain * self.scale).reshape(-1, *[1] * (self.up.ndim - 1)) * self.up
        offset = None if bias is None else (1 - gain) * bias
        if self.shape.kind == "linear":
            return torch.addcmul(F.linear(F.linear(x, self.down), up, offset), y, gain - 1)
        low = CONVOLUTIONS[self.shape.kind](convolve(self.shape, x, self.down), up, offset)
        return torch.addcmul(low, y, (gain - 1).reshape(-1, *[1] * len(self.shape.kernel)))

    def _through(self, x: Tensor, weight: Tensor) -> Tensor:
        """W0 x."""
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if self.shape.kind == "linear" else convolve(self.shape, x, weight)

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        gain, own = self.gain(weight)[:, None], weight.flatten(1).to(self.up.dtype)
        total = (gain * self.scale * self.up.flatten(1)) @ self.down.flatten(1)
        return total.addcmul_(gain - 1, own).reshape(self.shape.weight)
