"""The nearest matrix of a given rank (Eckart and Young 1936), where a format holds only low-rank updates.

delta (O, I k...)  ~  up (O, R) @ down (R, I k...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.errors import ExportRefused
from studio.exporting.site_delta import SiteDelta

DEFAULT_RANK = 32


@dataclass(frozen=True)
class Factors:
    """One site's low-rank form, in fp32: down (R, I, k...), up (O, R, 1...)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """The delta that they make, in fp64."""
        return product(self.down, self.up)


def product(down: Tensor, up: Tensor) -> Tensor:
    """up @ down in fp64, in the weight's shape."""
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(up.shape[0], *down.shape[1:])


def truncated(delta: Tensor, rank: int) -> Factors:
    """The best factors of at most this rank, from the eigenvectors of the smaller Gram matrix, in fp64.

    A truncated SVD, at a fraction of its time: the small singular values, which squaring makes inexact, are cut off.
    """
    matrix = delta.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    energies, vectors = torch.linalg.eigh(gram)
    kept = vectors[:, -min(rank, len(energies)) :].flip(1)
    singular = energies[-kept.shape[1] :].flip(0).clamp(min=0).sqrt()
    # Both factors get the root of the singular values, which suits fp16; noise near zero is not blown up.
    balance = singular.sqrt().clamp(min=1e-4 * float(singular[0]) ** 0.5 or 1.0)
    up, down = (kept, kept.T @ matrix) if wide else (matrix @ kept, kept.T)
    up, down = (up * balance, down / balance[:, None]) if wide else (up / balance, down * balance[:, None])
    ones = [1] * (delta.ndim - 2)
    return Factors(down.reshape(-1, *delta.shape[1:]).float(), up.reshape(*up.shape, *ones).float())


def low_rank_factors(deltas: Mapping[str, SiteDelta], rank: int | None, allow_approximate: bool) -> dict[str, Factors]:
    """Factors for every site: exact where the adapter has them within `rank`, else (only on request) the nearest.

    Raises ExportRefused, naming the first site that has no exact form and how many there are.
    """
    exact = {name: _exact(site, rank) for name, site in deltas.items()}
    missing = [name for name, factors in exact.items() if factors is None]
    if missing and not allow_approximate:
        bound = f" of rank {rank}" if rank else ""
        raise ExportRefused(
            f"'{missing[0]}' ({_of(len(missing), len(deltas))}) has no exact low-rank form{bound}",
            "use --to checkpoint or --to diff, or --allow-approximate with a --rank",
        )
    return {
        name: f if f is not None else truncated(deltas[name].dense(), rank or DEFAULT_RANK) for name, f in exact.items()
    }


def _exact(site: SiteDelta, rank: int | None) -> Factors | None:
    pair = site.low_rank()
    return Factors(*pair) if pair is not None and (rank is None or pair[0].shape[0] <= rank) else None


def _of(count: int, total: int) -> str:
    return f"{count} of {total} layers"
