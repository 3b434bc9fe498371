"""A delta as the entrywise product of two low-rank ones: LoHa (Hyeon-Woo et al. 2022, FedPara).

delta = (U_1 D_1) o (U_2 D_2) = (U_1 * U_2)(D_1 * D_2): the Khatri-Rao products, rank r_1 r_2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Hadamard(WeightDelta):
    one: LowRank
    other: LowRank

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.one.shape

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.one.tensors(), *self.other.tensors())

    def scaled(self, factor: float) -> Hadamard:
        return Hadamard(self.one.scaled(factor), self.other)

    def matrix(self) -> Tensor:
        return self.one.matrix() * self.other.matrix()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.one.rows(start, stop) * self.other.rows(start, stop)

    def matvec(self, x: Tensor) -> Tensor:
        return self._cheaper().matvec(x)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self._cheaper().rmatvec(y)

    def _cheaper(self) -> WeightDelta:
        from studio.deltas.dense import Dense

        low = self.one.rank * self.other.rank * (self.height + self.width) < self.numel
        return self.low_rank() if low else Dense(self.dense())

    def to(self, dtype: torch.dtype) -> Hadamard:
        return Hadamard(self.one.to(dtype), self.other.to(dtype))

    def low_rank(self) -> LowRank:
        up = (self.one.up[:, :, None] * self.other.up[:, None, :]).flatten(1)
        down = (self.one.down[:, None, :] * self.other.down[None, :, :]).flatten(0, 1)
        return LowRank(down, up, self.shape)
