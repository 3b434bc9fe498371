"""DARE (Yu et al. 2024) and DELLA (Deep et al. 2024): drop numbers at random and scale up the rest.

Which are dropped is keyed by seed, site and the adapter's content: neither the order of the adapters nor how the work
is split changes it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from studio.deltas import Dense, WeightDelta
from studio.keyed import torch_generator
from studio.merging.agreement import Density, Lambda, mean_of_agreeing
from studio.merging.strategy import Meeting, strategy

CHUNK = 1 << 20  # random numbers drawn at a time; another value would draw others


@strategy("dare", dense=True)
def dare(meeting: Meeting, density: Density = 0.5, lam: Lambda = 1.0) -> WeightDelta:
    """Keep each number with probability `density`, divide the kept by it, and sum: unbiased in the mean."""
    result = meeting.empty().zero_()
    for delta, key in zip(meeting.scaled, meeting.keys, strict=True):
        for start, rows in delta.blocks(CHUNK):
            kept = uniform(rows.shape, "dare", meeting.seed, meeting.site, key, start) < density
            result[start : start + len(rows)] += torch.where(kept, rows / density, torch.zeros_like(rows))
    return Dense((lam * result).reshape(meeting.shape))


@strategy("della", dense=True)
def della(
    meeting: Meeting,
    density: Density = 0.5,
    window: Annotated[float, Field(ge=0, lt=1, description="Spread of the keeping probability over a row.")] = 0.2,
    lam: Lambda = 1.0,
) -> WeightDelta:
    """As DARE, but the larger a number is in its row the likelier it stays; then the mean of those that agree."""
    result = meeting.empty()
    chance = chances(meeting.deltas[0].width, density, window)
    for rows, changes in meeting.row_blocks(CHUNK):
        kept = torch.empty_like(changes)
        for i, key in enumerate(meeting.keys):
            order = changes[i].abs().argsort(dim=1, stable=True).argsort(dim=1, stable=True)
            keep = chance[order]
            drawn = uniform(keep.shape, "della", meeting.seed, meeting.site, key, rows.start)
            kept[i] = torch.where(drawn < keep, changes[i] / keep, torch.zeros_like(drawn))
        result[rows] = lam * mean_of_agreeing(kept)
    return Dense(result.reshape(meeting.shape))


def chances(width: int, density: float, window: float) -> Tensor:
    """(N,) The probability of staying by rank of magnitude in the row: density +- window / 2, within (0, 1]."""
    place = torch.arange(width) / max(1, width - 1) - 0.5
    return (density + window * place).clamp(min=min(density, 1e-3), max=1.0)


def uniform(shape: tuple[int, ...] | torch.Size, *key: object) -> Tensor:
    return torch.rand(shape, generator=torch_generator(*key))
