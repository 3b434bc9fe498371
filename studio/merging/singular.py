"""Merging in the space of singular vectors: TSV-M (Gargiulo et al. 2025) and KnOTS (Stoica et al. 2025).

Both are exact for one adapter and give a low-rank result. O out, N columns, R rank, K adapters.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from studio.deltas import LowRank, WeightDelta, thin_svd
from studio.merging.agreement import Density, Lambda, mean_of_agreeing
from studio.merging.strategy import Meeting, strategy


@strategy("tsv")
def tsv(
    meeting: Meeting,
    keep: Annotated[
        float, Field(gt=0, le=1, description="Share of each adapter's singular vectors that are kept.")
    ] = 1.0,
    lam: Lambda = 1.0,
) -> WeightDelta:
    """Singular vectors of all adapters side by side, made orthogonal to each other before they are put together."""
    parts = [thin_svd(delta) for delta in meeting.thin()]
    room = min(meeting.deltas[0].height, meeting.deltas[0].width)
    counts = [max(1, round(keep * len(part.singular))) for part in parts]
    if sum(counts) > room:  # no more orthogonal vectors than that
        counts = [max(1, count * room // sum(counts)) for count in counts]
    left = torch.cat([part.left[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
    right = torch.cat([part.right[:count] for part, count in zip(parts, counts, strict=True)], 0)
    singular = torch.cat([part.singular[:count] for part, count in zip(parts, counts, strict=True)])
    return LowRank(nearest_orthonormal(right.T).T, nearest_orthonormal(left) * (lam * singular), meeting.shape)


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is closest (Procrustes): P Q^T of the SVD P S Q^T."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


@strategy("knots")
def knots(meeting: Meeting, density: Density = 0.3, lam: Lambda = 1.0) -> WeightDelta:
    """All changes side by side share one set of output vectors; what each adapter reads is merged by TIES."""
    parts = meeting.thin()
    basis, readings = aligned(parts)
    size = readings.abs()
    if density < 1:
        kept = max(1, round(density * size[0].numel()))
        floor = size.flatten(1).kthvalue(size[0].numel() - kept + 1, dim=1).values
        readings = torch.where(size >= floor[:, None, None], readings, torch.zeros_like(readings))
    return LowRank(lam * mean_of_agreeing(readings), basis, meeting.shape)


def aligned(parts: list[LowRank]) -> tuple[Tensor, Tensor]:
    """[D_1 ... D_K] = U S [V_1 ... V_K]: U S (O, R) and the V_i (K, R, N), from the factors."""
    up, upper = torch.linalg.qr(torch.cat([part.up for part in parts], 1))
    rows, lowers = zip(*(torch.linalg.qr(part.down.T) for part in parts), strict=True)  # down_i = L_i^T Q_i^T
    ranks = [part.rank for part in parts]
    core = torch.cat([block @ lower.T for block, lower in zip(upper.split(ranks, 1), lowers, strict=True)], 1)
    p, s, q = torch.linalg.svd(core, full_matrices=False)
    kept = s > s[0] * 1e-7 if len(s) and s[0] > 0 else torch.ones_like(s, dtype=torch.bool)
    widths = [lower.shape[0] for lower in lowers]
    readings = [block @ row.T for block, row in zip(q[kept].split(widths, 1), rows, strict=True)]
    return (up @ p[:, kept]) * s[kept], torch.stack(readings)
