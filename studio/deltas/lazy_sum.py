"""A sum of deltas in whatever forms, kept apart until somebody needs it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.dense import Dense
from studio.deltas.low_rank import LowRank, concatenated
from studio.deltas.sparse import Sparse, united


@dataclass(frozen=True, eq=False)
class Sum(WeightDelta):
    """At least two terms of one shape."""

    terms: tuple[WeightDelta, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.terms[0].shape

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(value for term in self.terms for value in term.tensors())

    def scaled(self, factor: float) -> Sum:
        return Sum(tuple(term.scaled(factor) for term in self.terms))

    def matrix(self) -> Tensor:
        return self.rows(0, self.height)

    def rows(self, start: int, stop: int) -> Tensor:
        first, *others = self.terms
        block = first.rows(start, stop).clone()
        for term in others:
            block += term.rows(start, stop)
        return block

    def matvec(self, x: Tensor) -> Tensor:
        return torch.stack([term.matvec(x) for term in self.terms]).sum(0)

    def rmatvec(self, y: Tensor) -> Tensor:
        return torch.stack([term.rmatvec(y) for term in self.terms]).sum(0)

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple(term.to(dtype) for term in self.terms))

    def low_rank(self) -> LowRank | None:
        parts = [term.low_rank() for term in self.terms]
        found = [part for part in parts if part is not None]
        return concatenated(found) if len(found) == len(parts) else None


def total(terms: Sequence[WeightDelta]) -> WeightDelta:
    """The sum in the fewest terms without loss: low-rank ones side by side, sparse ones united, dense ones added."""
    flat = [part for term in terms for part in (term.terms if isinstance(term, Sum) else (term,))]
    shapes = {term.shape for term in flat}
    if len(shapes) != 1:
        raise ValueError(f"deltas of different shapes cannot be added: {sorted(shapes)}")
    thin = [term for term in flat if isinstance(term, LowRank)]
    sparse = [term for term in flat if isinstance(term, Sparse)]
    full = [term.values for term in flat if isinstance(term, Dense)]
    rest = [term for term in flat if not isinstance(term, LowRank | Sparse | Dense)]
    together: list[WeightDelta] = []
    if thin:
        together.append(concatenated(thin))
    if sparse:
        together.append(united(sparse))
    if full:
        together.append(Dense(sum(full[1:], start=full[0])))
    together += rest
    return together[0] if len(together) == 1 else Sum(tuple(together))


def smallest(delta: WeightDelta) -> WeightDelta:
    """The same delta in the smallest of its own form, low-rank, and dense, as numbers are counted."""
    low = delta.low_rank()
    forms: list[WeightDelta] = [delta, *([low] if low is not None else [])]
    best = min(forms, key=lambda form: sum(value.numel() for value in form.tensors()))
    if sum(value.numel() for value in best.tensors()) >= delta.numel and not isinstance(best, Dense):
        return Dense(delta.dense())
    return best
