"""A delta as a Kronecker product: LoKr (Yeh et al. 2023).

delta = L (x) R,   L (a, c), R (b, d, k, ...),   shape (a b, c d, k, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Kronecker(WeightDelta):
    """Both factors are deltas themselves, in any form."""

    left: WeightDelta
    right: WeightDelta

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        (a, c), (b, d, *kernel) = self.left.shape, self.right.shape
        return (a * b, c * d, *kernel)

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.left.tensors(), *self.right.tensors())

    def scaled(self, factor: float) -> Kronecker:
        return self if factor == 1.0 else Kronecker(self.left.scaled(factor), self.right)

    def matrix(self) -> Tensor:
        return torch.kron(self.left.matrix(), self.right.matrix())

    def rows(self, start: int, stop: int) -> Tensor:
        b = self.right.height
        first, last = start // b, -(-stop // b)
        return torch.kron(self.left.rows(first, last), self.right.matrix())[start - first * b : stop - first * b]

    def matvec(self, x: Tensor) -> Tensor:
        """(L (x) R) x without the product: R on the inner axis, then L on the outer one."""
        return _apply(x, self.left.matvec, self.right.matvec, self.left.width, self.right.width)

    def rmatvec(self, y: Tensor) -> Tensor:
        return _apply(y, self.left.rmatvec, self.right.rmatvec, self.left.height, self.right.height)

    def to(self, dtype: torch.dtype) -> Kronecker:
        return Kronecker(self.left.to(dtype), self.right.to(dtype))

    def low_rank(self) -> LowRank | None:
        """(U (x) V)(D (x) E) where at least one factor is low-rank: the ranks multiply."""
        left, right = self.left.low_rank(), self.right.low_rank()
        if left is None and right is None:
            return None
        one, other = left or _trivial(self.left), right or _trivial(self.right)
        return LowRank(torch.kron(one.down, other.down), torch.kron(one.up, other.up), self.shape)


def _apply(
    x: Tensor,
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    outer_size: int,
    inner_size: int,
) -> Tensor:
    count = x.shape[1]
    y = inner(x.reshape(outer_size, inner_size, count).permute(1, 0, 2).reshape(inner_size, -1))
    size = y.shape[0]
    z = outer(y.reshape(size, outer_size, count).permute(1, 0, 2).reshape(outer_size, -1))
    return z.reshape(z.shape[0] * size, count)


def _trivial(delta: WeightDelta) -> LowRank:
    """Any matrix as itself times the identity, on its shorter side."""
    matrix = delta.matrix()
    tall = matrix.shape[0] > matrix.shape[1]
    eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return LowRank(eye if tall else matrix, matrix if tall else eye, delta.shape)
