"""What is added to one weight, in whatever form it is cheapest to keep.

A weight of shape (O, I, k, ...) is also seen as a matrix (O, N) with N = I k ...; a weight of one axis (a norm's) as
(O, 1). Every form knows its matrix, its product with vectors and its size; most never build the matrix.
O out, N columns, C vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from studio.deltas.low_rank import LowRank

BLOCK_NUMBERS = 1 << 22  # of a matrix that is walked through by rows: 16 MiB in fp32


class WeightDelta(ABC):
    """A change of one weight. Values are never written to: every operation gives a new delta.

    `shape` is the weight's own shape.
    """

    shape: tuple[int, ...]

    @property
    def height(self) -> int:
        """O: the rows of the matrix."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """N: the columns of the matrix."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        return width

    @property
    def numel(self) -> int:
        return self.height * self.width

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept in memory, values before indices."""

    @abstractmethod
    def scaled(self, factor: float) -> WeightDelta:
        """This delta times a number, in the same form."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The delta as a matrix (O, N)."""

    def dense(self) -> Tensor:
        """The delta in the weight's own shape."""
        return self.matrix().reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of the matrix, (stop - start, N)."""
        return self.matrix()[start:stop]

    def matvec(self, x: Tensor) -> Tensor:
        """The matrix times x, (N, C) -> (O, C)."""
        return self.matrix() @ x

    def rmatvec(self, y: Tensor) -> Tensor:
        """The matrix transposed times y, (O, C) -> (N, C)."""
        return self.matrix().T @ y

    def gram_apply(self, second_moment: Tensor) -> Tensor:
        """The matrix times a second moment of inputs (N, N) -> (O, N)."""
        return self.matvec(second_moment)

    def low_rank(self) -> LowRank | None:
        """The same delta as a product of two thin matrices, exactly; None where the form gives no such rewriting."""
        return None

    def to(self, dtype: torch.dtype) -> WeightDelta:
        """The same delta with its values in another precision."""
        raise TypeError(f"{type(self).__name__} has one precision")

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[0].dtype

    @property
    def nbytes(self) -> int:
        """What it takes in memory, in bytes."""
        return sum(value.numel() * value.element_size() for value in self.tensors())

    def blocks(self, numbers: int = BLOCK_NUMBERS) -> Iterator[tuple[int, Tensor]]:
        """The matrix in runs of rows of about so many numbers, each with its first row."""
        step = max(1, numbers // max(1, self.width))
        for start in range(0, self.height, step):
            yield start, self.rows(start, min(start + step, self.height))

    def inner(self, other: WeightDelta) -> float:
        """The sum of the products of all entries."""
        from studio.deltas.inner import inner

        return inner(self, other)

    def norm(self) -> float:
        """The Frobenius norm."""
        return max(self.inner(self), 0.0) ** 0.5

    def __add__(self, other: WeightDelta) -> WeightDelta:
        from studio.deltas.lazy_sum import total

        return total([self, other])

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        return self + other.scaled(-1.0)

    def __mul__(self, factor: float) -> WeightDelta:
        return self.scaled(factor)

    __rmul__ = __mul__

    def __neg__(self) -> WeightDelta:
        return self.scaled(-1.0)
