"""The changes of all regions at one layer, each where its region is.

    y = W x + sum_i m_i v_i(x)      low-rank:  sum_i m_i B_i A_i x = [B_1 B_2 ...] ([m_1; m_2; ...] [A_1; A_2; ...] x)

so low-rank changes of any number are one product down, a mask for each of its R channels, one product up. Other patches
keep their own terms, input terms too, and those are masked. What SaRA writes into a weight is added to the output
instead: a weight is the same everywhere. m_i are the masks of a partition, hence the same adapter everywhere is the
plain adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.deltas.patches import FixedBias, layer_with
from studio.functional import CONVOLUTIONS, convolve
from studio.patch import Delta, InPlace, LayerCall, LayerShape, Patch
from studio.regions.canvas import Canvas


class RegionPatch(Patch):
    """`terms` are (part, patch, strength) for a layer of this shape; `text` tells that it reads the texts."""

    down: Tensor
    up: Tensor

    def __init__(
        self, canvas: Canvas, shape: LayerShape, layer: Any, terms: list[tuple[int, Patch, float]], text: bool = False
    ) -> None:
        super().__init__()
        self.canvas, self.shape, self.text = canvas, shape, text
        downs, ups, owners = [], [], []
        self.others: Any = nn.ModuleList()
        self.parts: list[tuple[int, float]] = []  # of the others
        for part, patch, strength in terms:
            factors = _low_rank_factors(patch, shape, layer)
            if factors is None:
                self.others.append(_Written(patch) if isinstance(patch, InPlace) else patch)
                self.parts.append((part, strength))
            else:
                downs.append(factors[0])
                ups.append(factors[1] if strength == 1 else factors[1] * strength)
                owners += [part] * len(factors[0])
        self.owners = tuple(owners)
        if owners:  # Parameters, by which the attachment knows the precision to compute in
            self.down = nn.Parameter(torch.cat(downs), requires_grad=_says_trained(terms, "down"))
            self.up = nn.Parameter(torch.cat(ups, 1), requires_grad=_says_trained(terms, "up"))

    def input_term(self, x: Tensor, call: LayerCall) -> Tensor | None:
        return self._masked([patch.input_term(x, call) for patch in self.others], None)

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor | None:
        return self._masked([patch.output_term(x, y, call) for patch in self.others], self._low_rank(x))

    def _low_rank(self, x: Tensor) -> Tensor | None:
        if not self.owners:
            return None
        linear = self.shape.kind == "linear"
        low = F.linear(x, self.down) if linear else convolve(self.shape, x, self.down)
        low = low * self.canvas.over(low, self.owners, self.text)
        return F.linear(low, self.up) if linear else CONVOLUTIONS[self.shape.kind](low, self.up)

    def _masked(self, terms: list[Tensor | None], total: Tensor | None) -> Tensor | None:
        for term, (part, strength) in zip(terms, self.parts, strict=True):
            if term is not None:
                term = term * (strength * self.canvas.over(term, (part,), self.text))
                total = term if total is None else total + term
        return total


def _says_trained(terms: list[tuple[int, Patch, float]], name: str) -> bool:
    """Whether this factor of any patch is trained: torch picks a product's kernel by it, even without gradients."""
    factors = [getattr(patch, name, None) for _, patch, _ in terms]
    return any(isinstance(factor, Tensor) and factor.requires_grad for factor in factors)


def _low_rank_factors(patch: Patch, shape: LayerShape, layer: Any) -> tuple[Tensor, Tensor] | None:
    """(down, up) of a change that is low-rank at this layer."""
    if shape.kind not in ("linear", *CONVOLUTIONS) or shape.groups != 1 or not isinstance(patch, Delta):
        return None
    return patch.low_rank_of(layer.weight.detach())


class _Written(Patch):
    """What an in-place patch would write, as an output term: a second product with the change as it stands densely."""

    def __init__(self, patch: InPlace) -> None:
        super().__init__()
        self.patch = patch

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor | None:
        weight = call.layer.get_parameter("weight")
        writes = self.patch.writes()
        term = layer_with(self.patch.shape, call, x, self.patch.delta(weight)) if "weight" in writes else None
        bias = self.patch.bias_delta()
        if bias is not None:
            shift = FixedBias(self.patch.shape, bias.to(y.device)).output_term(x, y, call)
            term = shift if term is None else term + shift
        return term
