"""The nearest low-rank matrix to a delta (Eckart and Young 1936), from its factors where it has any.

delta = P diag(s) Q,   P (O, R) and Q^T (N, R) orthonormal, s falling
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.low_rank import LowRank

GRAM_FLOOR = 1e-6  # relative singular values below this are noise when they come from a Gram matrix


@dataclass(frozen=True)
class ThinSvd:
    """P (O, R), s (R,), Q (R, N)."""

    left: Tensor
    singular: Tensor
    right: Tensor


@dataclass(frozen=True)
class Compressed:
    """`error` = |delta - kept| / |delta| in the Frobenius norm, `energy` = |kept|^2 / |delta|^2."""

    delta: LowRank
    error: float
    energy: float


def thin_svd(delta: WeightDelta) -> ThinSvd:
    """All singular values. A low-rank delta is never built: QR of both factors, then the SVD of an R x R matrix."""
    low = delta.low_rank()
    if low is None or low.rank >= min(low.height, low.width):
        return ThinSvd(*torch.linalg.svd(delta.matrix(), full_matrices=False))
    left, upper = torch.linalg.qr(low.up)
    right, lower = torch.linalg.qr(low.down.T)
    p, s, q = torch.linalg.svd(upper @ lower.T)
    return ThinSvd(left @ p, s, q @ right.T)


def compress(delta: WeightDelta, rank: int | None = None, tolerance: float | None = None) -> Compressed:
    """The nearest delta of at most this rank, or the thinnest whose relative error is at most the tolerance.

    Given both, the rank bounds what the tolerance asks for, and the error says what came of it.
    """
    low = delta.low_rank()
    if low is not None and low.rank < min(low.height, low.width):
        return _truncated(thin_svd(low), delta.shape, rank, tolerance)
    if tolerance is not None and tolerance < GRAM_FLOOR:
        return _truncated(thin_svd(delta), delta.shape, rank, tolerance)
    return _by_gram(delta, rank, tolerance)


def _truncated(svd: ThinSvd, shape: tuple[int, ...], rank: int | None, tolerance: float | None) -> Compressed:
    energies = svd.singular.double().square()
    kept = _how_many(energies, rank, tolerance)
    root = svd.singular[:kept].sqrt()  # both factors alike, which suits fp16
    low = LowRank(svd.right[:kept] * root[:, None], svd.left[:, :kept] * root, shape)
    return Compressed(low, *_quality(energies, kept))


def _by_gram(delta: WeightDelta, rank: int | None, tolerance: float | None) -> Compressed:
    """From the eigenvectors of the smaller Gram matrix, in fp64: a third of an SVD's time and memory."""
    matrix = delta.matrix()
    wide = matrix.shape[0] <= matrix.shape[1]
    energies, vectors = torch.linalg.eigh(_gram(matrix if wide else matrix.T))
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    floor = float(energies[0]) * GRAM_FLOOR**2
    kept = min(_how_many(energies, rank, tolerance), max(1, int((energies > floor).sum())))
    basis, root = vectors[:, :kept].to(matrix.dtype), energies[:kept].sqrt().sqrt().clamp(min=1e-30).to(matrix.dtype)
    if wide:
        low = LowRank((basis.T @ matrix) / root[:, None], basis * root, delta.shape)
    else:
        low = LowRank(basis.T * root[:, None], (matrix @ basis) / root, delta.shape)
    return Compressed(low, *_quality(energies, kept))


def _gram(matrix: Tensor, columns: int = 4096) -> Tensor:
    """M M^T in fp64, by runs of columns so that no second copy of M is made."""
    total = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for start in range(0, matrix.shape[1], columns):
        part = matrix[:, start : start + columns].double()
        total += part @ part.T
    return total


def _how_many(energies: Tensor, rank: int | None, tolerance: float | None) -> int:
    count = len(energies) if rank is None else min(rank, len(energies))
    if tolerance is not None:
        lost = energies.flip(0).cumsum(0).flip(0)  # lost[i]: the energy from i on
        enough = (lost <= tolerance**2 * lost[0]).nonzero()
        count = min(count, int(enough[0]) if len(enough) else len(energies))
    return max(1, count)


def _quality(energies: Tensor, kept: int) -> tuple[float, float]:
    whole, lost = float(energies.sum()), float(energies[kept:].sum())
    return ((lost / whole) ** 0.5, 1 - lost / whole) if whole else (0.0, 1.0)
