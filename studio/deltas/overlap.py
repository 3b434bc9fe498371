"""How much several low-rank deltas of one weight have in common, all pairs at once, from two small matrices.

With all factors side by side, U (O, R) and D (R, N), R the sum of the ranks, everything below is read off the blocks of
U^T U and D D^T: (O + N) R^2 multiplications for K adapters, whatever K.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from studio.deltas.low_rank import LowRank


class Overlaps:
    """Pairwise measures of deltas of one shape, each a symmetric (K, K) matrix in fp64."""

    def __init__(self, deltas: Sequence[LowRank]) -> None:
        self.ranks = [delta.rank for delta in deltas]
        up = torch.cat([delta.up for delta in deltas], 1)
        down = torch.cat([delta.down for delta in deltas], 0)
        self.outputs = (up.T @ up).double()  # U_i^T U_j
        self.inputs = (down @ down.T).double()  # D_i D_j^T

    def _blocks(self, matrix: Tensor) -> list[list[Tensor]]:
        return [list(row.split(self.ranks, 1)) for row in matrix.split(self.ranks, 0)]

    @cached_property
    def inner(self) -> Tensor:
        """<delta_i, delta_j>."""
        products = self._blocks(self.outputs * self.inputs)
        return torch.stack([torch.stack([block.sum() for block in row]) for row in products])

    @cached_property
    def norms(self) -> Tensor:
        """(K,) Frobenius norms."""
        return self.inner.diagonal().clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """<delta_i, delta_j> / (|delta_i| |delta_j|)."""
        return self._normalised(self.inner)

    @cached_property
    def input_overlap(self) -> Tensor:
        """|delta_i delta_j^T| / (|delta_i| |delta_j|): whether they read the same input directions."""
        return self._normalised(self._crossed(self.outputs, self.inputs))

    @cached_property
    def output_overlap(self) -> Tensor:
        """|delta_i^T delta_j| / (|delta_i| |delta_j|): whether they write to the same output directions."""
        return self._normalised(self._crossed(self.inputs, self.outputs))

    def _crossed(self, own: Tensor, between: Tensor) -> Tensor:
        """|F_i B_ij F_j^T| from the Gram matrices G_i = F_i^T F_i: sqrt trace(G_i B_ij G_j B_ij^T)."""
        grams, crossings = self._blocks(own), self._blocks(between)
        count = len(self.ranks)
        found = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i, count):
                square = torch.sum((grams[i][i] @ crossings[i][j]) * (crossings[i][j] @ grams[j][j]))
                found[i, j] = found[j, i] = square.clamp(min=0).sqrt()
        return found

    def _normalised(self, matrix: Tensor) -> Tensor:
        scale = self.norms[:, None] * self.norms[None, :]
        return torch.where(scale > 0, matrix / scale.clamp(min=1e-300), torch.zeros_like(matrix))

    def principal_angles(self, i: int, j: int) -> Tensor:
        """Between the input spaces of two deltas, in radians, rising: (min rank,)."""
        grams = self._blocks(self.inputs)
        cosines = torch.linalg.svdvals(_whitener(grams[i][i]) @ grams[i][j] @ _whitener(grams[j][j]).T)
        return cosines.clamp(max=1.0).acos()


def _whitener(gram: Tensor) -> Tensor:
    """W with W G W^T = I on the range of G."""
    energies, vectors = torch.linalg.eigh(gram)
    kept = energies > energies[-1].clamp(min=1e-300) * 1e-12
    return (vectors[:, kept] / energies[kept].sqrt()).T
