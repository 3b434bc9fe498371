"""A delta as all its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta


@dataclass(frozen=True, eq=False)
class Dense(WeightDelta):
    """`values` has the weight's own shape."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def scaled(self, factor: float) -> Dense:
        return self if factor == 1.0 else Dense(self.values * factor)

    def matrix(self) -> Tensor:
        return self.values.reshape(self.height, -1)

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.values.to(dtype))
