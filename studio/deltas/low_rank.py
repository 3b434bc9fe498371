"""A delta as a product of two thin matrices: LoRA, and what other forms are rewritten to.

delta = up down,   up (O, R), down (R, N)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta


@dataclass(frozen=True, eq=False)
class LowRank(WeightDelta):
    """`shape` is the weight's; a convolution's `down` is kept flat."""

    down: Tensor
    up: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scale: float = 1.0) -> LowRank:
        """From tensors as LoRA files have them: down (R, I, k, ...), up (O, R, 1, ...). `up` takes the scale."""
        flat = up.flatten(1)
        return cls(down.flatten(1), flat if scale == 1.0 else flat * scale, (up.shape[0], *down.shape[1:]))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up)

    def scaled(self, factor: float) -> LowRank:
        return self if factor == 1.0 else LowRank(self.down, self.up * factor, self.shape)

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def rows(self, start: int, stop: int) -> Tensor:
        return self.up[start:stop] @ self.down

    def matvec(self, x: Tensor) -> Tensor:
        return self.up @ (self.down @ x)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.down.T @ (self.up.T @ y)

    def low_rank(self) -> LowRank:
        return self

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.down.to(dtype), self.up.to(dtype), self.shape)

    def kernel_factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) as LoRA files have them: down (R, I, k, ...), up (O, R, 1, ...)."""
        return self.down.reshape(-1, *self.shape[1:]), self.up.reshape(*self.up.shape, *[1] * (len(self.shape) - 2))


def concatenated(terms: Sequence[LowRank]) -> LowRank:
    """The sum of several, exactly: the ranks add up."""
    if len(terms) == 1:
        return terms[0]
    return LowRank(torch.cat([t.down for t in terms], 0), torch.cat([t.up for t in terms], 1), terms[0].shape)
