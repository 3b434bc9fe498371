"""How much several low-rank deltas of one weight have in common, all pairs at once, from two small matrices.

With all factors side by side, U (O, K R) and D (K R, N) for K deltas padded with zeros to the largest rank R,
everything below is read off the blocks of U^T U and D D^T: (O + N) (K R)^2 multiplications, and K^2 R^3 for the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.deltas.low_rank import LowRank


class Overlaps:
    """Pairwise measures of deltas of one shape, each a symmetric (K, K) matrix in fp64."""

    def __init__(self, deltas: Sequence[LowRank]) -> None:
        rank = max(delta.rank for delta in deltas)
        self.count, self.rank = len(deltas), rank
        up = torch.cat([F.pad(delta.up, (0, rank - delta.rank)) for delta in deltas], 1)
        down = torch.cat([F.pad(delta.down, (0, 0, 0, rank - delta.rank)) for delta in deltas], 0)
        self.outputs = self._blocks(up.T @ up)  # U_i^T U_j
        self.inputs = self._blocks(down @ down.T)  # D_i D_j^T

    def _blocks(self, matrix: Tensor) -> Tensor:
        """(K R, K R) -> (K, K, R, R)."""
        return matrix.double().reshape(self.count, self.rank, self.count, self.rank).transpose(1, 2).contiguous()

    @cached_property
    def inner(self) -> Tensor:
        """<delta_i, delta_j>."""
        return (self.outputs * self.inputs).sum((2, 3))

    @cached_property
    def norms(self) -> Tensor:
        """(K,) Frobenius norms."""
        return self.inner.diagonal().clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """<delta_i, delta_j> / (|delta_i| |delta_j|)."""
        return self._normalised(self.inner)

    @cached_property
    def input_crossing(self) -> Tensor:
        """|delta_i delta_j^T|."""
        return _crossed(self.outputs, self.inputs)

    @cached_property
    def output_crossing(self) -> Tensor:
        """|delta_i^T delta_j|."""
        return _crossed(self.inputs, self.outputs)

    @property
    def input_overlap(self) -> Tensor:
        """|delta_i delta_j^T| / (|delta_i| |delta_j|): whether they read the same input directions."""
        return self._normalised(self.input_crossing)

    @property
    def output_overlap(self) -> Tensor:
        """|delta_i^T delta_j| / (|delta_i| |delta_j|): whether they write to the same output directions."""
        return self._normalised(self.output_crossing)

    def _normalised(self, matrix: Tensor) -> Tensor:
        scale = self.norms[:, None] * self.norms[None, :]
        return torch.where(scale > 0, matrix / scale.clamp(min=1e-300), torch.zeros_like(matrix))

    # -- input spaces --------------------------------------------------------------------------------------------

    @cached_property
    def _whiteners(self) -> tuple[Tensor, Tensor]:
        """W (K, R, R) with W G W^T = 1 on the range of G = D D^T and 0 elsewhere; the dimensions (K,) of the ranges."""
        energies, vectors = torch.linalg.eigh(_diagonal(self.inputs))
        kept = energies > energies[:, -1:].clamp(min=1e-300) * 1e-12
        scale = torch.where(kept, energies.clamp(min=1e-300).rsqrt(), torch.zeros_like(energies))
        return (vectors * scale[:, None]).transpose(1, 2), kept.sum(1)

    def _cosines(self, i: Tensor, j: Tensor) -> Tensor:
        """(pairs, R): of the principal angles of the pairs (i, j), falling."""
        whiteners, _ = self._whiteners
        return torch.linalg.svdvals(whiteners[i] @ self.inputs[i, j] @ whiteners[j].transpose(1, 2)).clamp(max=1.0)

    def principal_angles(self, i: int, j: int) -> Tensor:
        """Between the input spaces of two deltas, in radians, rising: (min rank,)."""
        dimensions = self._whiteners[1]
        cosines = self._cosines(torch.tensor([i]), torch.tensor([j]))[0]
        return cosines[: int(min(dimensions[i], dimensions[j]))].acos()

    @cached_property
    def smallest_angle(self) -> Tensor:
        """(K, K) The smallest principal angle between the input spaces, in radians; 0 for a delta and itself."""
        found = torch.zeros(self.count, self.count, dtype=torch.float64)
        if self.count > 1:
            i, j = torch.triu_indices(self.count, self.count, 1)
            found[i, j] = found[j, i] = self._cosines(i, j)[:, 0].acos()
        return found


def _crossed(own: Tensor, between: Tensor) -> Tensor:
    """|F_i B_ij F_j^T| from the Gram matrices G_i = F_i^T F_i: sqrt trace(G_i B_ij G_j B_ij^T)."""
    grams = _diagonal(own)
    square = ((grams[:, None] @ between) * (between @ grams[None, :])).sum((2, 3))
    return square.clamp(min=0).sqrt()


def _diagonal(blocks: Tensor) -> Tensor:
    """(K, K, R, R) -> (K, R, R)."""
    index = torch.arange(len(blocks))
    return blocks[index, index]
