"""A delta of few entries: SaRA, and what magnitude pruning leaves.

`index` holds flat positions in the weight, sorted and without doubles; `values` what stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta


@dataclass(frozen=True, eq=False)
class Sparse(WeightDelta):
    index: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values, self.index)

    def scaled(self, factor: float) -> Sparse:
        return self if factor == 1.0 else Sparse(self.index, self.values * factor, self.shape)

    def matrix(self) -> Tensor:
        return self.rows(0, self.height)

    def rows(self, start: int, stop: int) -> Tensor:
        low, high = torch.searchsorted(self.index, torch.tensor([start, stop]) * self.width).tolist()
        block = torch.zeros((stop - start) * self.width, dtype=self.values.dtype)
        block[self.index[low:high] - start * self.width] = self.values[low:high]
        return block.reshape(stop - start, self.width)

    def matvec(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self._coordinates(), x)

    def rmatvec(self, y: Tensor) -> Tensor:
        return torch.sparse.mm(self._coordinates().t(), y)

    def _coordinates(self) -> Tensor:
        places = torch.stack((self.index // self.width, self.index % self.width))
        return torch.sparse_coo_tensor(
            places, self.values, (self.height, self.width), is_coalesced=True, check_invariants=False
        )

    def at(self, index: Tensor) -> Tensor:
        """The values at sorted flat positions; zero where there is no entry."""
        found = torch.zeros(len(index), dtype=self.values.dtype)
        if len(self.index):
            place = torch.searchsorted(self.index, index).clamp(max=len(self.index) - 1)
            hit = self.index[place] == index
            found[hit] = self.values[place[hit]]
        return found

    def to(self, dtype: torch.dtype) -> Sparse:
        return Sparse(self.index, self.values.to(dtype), self.shape)


def united(terms: Sequence[Sparse]) -> Sparse:
    """The sum of several, exactly: entries at the same place add up."""
    if len(terms) == 1:
        return terms[0]
    index, place = torch.unique(torch.cat([term.index for term in terms]), return_inverse=True)
    values = torch.zeros(len(index), dtype=torch.promote_types(terms[0].dtype, terms[1].dtype))
    for term, part in zip(terms, place.split([len(term.index) for term in terms]), strict=True):
        values[part] += term.values.to(values.dtype)  # within a term no place comes twice
    return Sparse(index, values, terms[0].shape)
