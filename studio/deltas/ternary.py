"""A matrix of signs and one number per row: -s, 0 or s (after Yadav et al. 2023, ComPEFT).

Five signs share a byte (3^5 = 243), 1.6 bits a number. Which entries are kept is decided by magnitude over the whole
matrix; the scale of a row is the mean magnitude of its kept entries, the least-squares choice (ComPEFT takes one
multiple of the standard deviation instead).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta

PER_BYTE = 5
_POWERS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16)


@dataclass(frozen=True, eq=False)
class Ternary(WeightDelta):
    """`packed` (O, ceil(N / 5)) uint8, `scales` (O,)."""

    scales: Tensor
    packed: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, density: float) -> Ternary:
        """The nearest such matrix that keeps this fraction of the entries of largest magnitude."""
        matrix = values.reshape(values.shape[0], -1)
        size = matrix.abs()
        kept = max(1, round(density * size.numel()))
        threshold = torch.kthvalue(size.flatten(), size.numel() - kept + 1).values
        signs = torch.where((size >= threshold) & (size > 0), matrix.sign(), torch.zeros_like(matrix))
        counts = signs.abs().sum(1)
        scales = (size * signs.abs()).sum(1) / counts.clamp(min=1)
        return cls(scales, pack(signs.to(torch.int16)), tuple(values.shape))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.scales, self.packed)

    def scaled(self, factor: float) -> Ternary:
        return self if factor == 1.0 else Ternary(self.scales * factor, self.packed, self.shape)

    def matrix(self) -> Tensor:
        return self.rows(0, self.height)

    def rows(self, start: int, stop: int) -> Tensor:
        return unpack(self.packed[start:stop], self.width).to(self.dtype) * self.scales[start:stop, None]

    def to(self, dtype: torch.dtype) -> Ternary:
        return Ternary(self.scales.to(dtype), self.packed, self.shape)


def pack(signs: Tensor) -> Tensor:
    """Signs -1, 0, 1 (O, N) as base-3 digits, five to a byte."""
    padding = -signs.shape[1] % PER_BYTE
    digits = torch.nn.functional.pad(signs + 1, (0, padding)).unflatten(1, (-1, PER_BYTE))
    return (digits * _POWERS).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack`: (O, width) of int16."""
    digits = (packed.to(torch.int16)[..., None] // _POWERS) % 3
    return digits.flatten(1)[:, :width] - 1
