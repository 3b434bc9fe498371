"""A delta as a small core and one matrix per axis (Tucker 1966): FLoRA's and TLoRA's cores, LoCon's `lora_mid`.

delta = G x_1 F_1 x_2 F_2 ...,   G (r_1, r_2, ...), F_a (size of axis a, r_a)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Tucker(WeightDelta):
    """`factors` has a matrix for each of the leading axes of the core; later axes of the core are taken as they are."""

    core: Tensor
    factors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*(factor.shape[0] for factor in self.factors), *self.core.shape[len(self.factors) :])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.core, *self.factors)

    def scaled(self, factor: float) -> Tucker:
        return self if factor == 1.0 else Tucker(self.core * factor, self.factors)

    def matrix(self) -> Tensor:
        return self._output_side().matrix()

    def rows(self, start: int, stop: int) -> Tensor:
        return self._output_side().rows(start, stop)

    def matvec(self, x: Tensor) -> Tensor:
        return self.low_rank().matvec(x)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.low_rank().rmatvec(y)

    def to(self, dtype: torch.dtype) -> Tucker:
        return Tucker(self.core.to(dtype), tuple(factor.to(dtype) for factor in self.factors))

    def low_rank(self) -> LowRank:
        """Rank r_1, or the product of the other ranks where that is smaller."""
        inputs = self.core[0].numel()
        return self._output_side() if self.core.shape[0] <= inputs else self._input_side()

    def _output_side(self) -> LowRank:
        down = _along(self.core, self.factors[1:], first_axis=1)
        return LowRank(down.flatten(1), self.factors[0], self.shape)

    def _input_side(self) -> LowRank:
        core = self.core.flatten(1)
        basis = torch.eye(core.shape[1], dtype=core.dtype, device=core.device).reshape(-1, *self.core.shape[1:])
        return LowRank(_along(basis, self.factors[1:], first_axis=1).flatten(1), self.factors[0] @ core, self.shape)


def _along(core: Tensor, factors: tuple[Tensor, ...], first_axis: int) -> Tensor:
    """The core with a matrix applied to each axis from `first_axis` on."""
    for axis, factor in enumerate(factors, first_axis):
        core = torch.movedim(torch.tensordot(core, factor, ([axis], [1])), -1, axis)
    return core
