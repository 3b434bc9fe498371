"""Changing a few entries of a layer's parameters, and putting them back bit for bit.

One journal per layer keeps the original values of every entry that some patch writes to, so that patches may come, go
and change their strength in any order: what stands in the parameter is always original + sum_i s_i delta_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.errors import AdapterError
from studio.patch import InPlace


@dataclass
class _Stash:
    """The entries of one parameter that are written to, sorted, and their original values."""

    positions: Tensor
    values: Tensor


class Journal:
    """The original values behind the in-place patches of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.stashes: dict[str, _Stash] = {}

    @torch.no_grad()
    def rewrite(self, terms: Sequence[tuple[InPlace, float | Tensor]]) -> None:
        """Makes the layer's parameters what these patches at these strengths say. No terms: the originals."""
        writes = [(patch.writes(), _number(weight)) for patch, weight in terms]
        for name in {*self.stashes, *(name for own, _ in writes for name in own)}:
            self._rewrite(name, [(*own[name], weight) for own, weight in writes if name in own])
        torch.clear_autocast_cache()  # it may remember a cast of the old values

    def original(self, name: str, positions: Tensor) -> Tensor:
        """The layer's own values of a parameter at sorted positions, whatever is written there now."""
        parameter, stash = self.layer.get_parameter(name), self.stashes.get(name)
        positions = positions.to(parameter.device)
        values = read(parameter, positions)
        if stash is None or not len(stash.positions):
            return values
        places = torch.searchsorted(stash.positions, positions).clamp(max=len(stash.positions) - 1)
        return torch.where(stash.positions[places] == positions, stash.values[places], values)

    def _rewrite(self, name: str, terms: list[tuple[Tensor, Tensor, float]]) -> None:
        parameter = getattr(self.layer, name)
        stash = self.stashes.get(name)
        union = _union([positions for positions, _, _ in terms])
        if stash is None or union is None or not _same(stash.positions, union):
            if stash is not None:
                write(parameter, stash.positions, stash.values)
                del self.stashes[name]
            if union is None:
                return
            stash = self.stashes[name] = _Stash(union, read(parameter, union))
        total = stash.values.float()
        for positions, values, weight in terms:
            if len(positions) == len(total):
                total = torch.add(total, values.to(total.device), alpha=weight)
            else:
                total.index_add_(0, torch.searchsorted(stash.positions, positions), weight * values.to(total.device))
        write(parameter, stash.positions, total.to(parameter.dtype))


def read(parameter: Tensor, positions: Tensor) -> Tensor:
    """The entries at flat positions, in the parameter's dtype. A copy."""
    return parameter.detach().reshape(-1).index_select(0, positions)


def write(parameter: Tensor, positions: Tensor, values: Tensor) -> None:
    """Sets the entries at flat positions, whatever the memory layout, behind autograd's back."""
    data = parameter.data
    if data.is_contiguous():
        data.view(-1).scatter_(0, positions.long(), values)
    else:  # channels_last: flat positions count the shape's order, not the memory's
        data.index_put_(tuple(torch.unravel_index(positions.long(), data.shape)), values)


def _number(weight: float | Tensor) -> float:
    if isinstance(weight, Tensor) and weight.numel() != 1:
        raise AdapterError(
            "a sparse adapter changes the weights themselves, so its strength cannot differ from place to place"
        )
    return float(weight)


def _union(positions: list[Tensor]) -> Tensor | None:
    if not positions:
        return None
    return positions[0] if len(positions) == 1 else torch.unique(torch.cat(positions))


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool((one == other).all()))
