"""TIES (Yadav et al. 2023): trim small changes, elect a sign for each number, take the mean of those that agree.

The thresholds are per weight and adapter, not over the whole model, so that modules can be merged one by one.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from studio.deltas import Dense, WeightDelta
from studio.merging.strategy import Meeting, strategy

Density = Annotated[float, Field(gt=0, le=1, description="Fraction of the numbers that are kept, by magnitude.")]
Lambda = Annotated[float, Field(description="Strength of the result.")]


@strategy("ties", dense=True)
def ties(meeting: Meeting, density: Density = 0.3, lam: Lambda = 1.0) -> WeightDelta:
    """Trim, elect a sign, average those that agree: what adapters dispute goes to the stronger side."""
    thresholds = torch.stack([magnitude_at(delta, density) for delta in meeting.scaled])[:, None, None]
    result = meeting.empty()
    for rows, changes in meeting.row_blocks():
        kept = torch.where(changes.abs() >= thresholds, changes, torch.zeros_like(changes))
        result[rows] = lam * mean_of_agreeing(kept)
    return Dense(result.reshape(meeting.shape))


def magnitude_at(delta: WeightDelta, density: float) -> Tensor:
    """The magnitude that this fraction of all numbers reaches; exact, by selection. Zero for density 1."""
    kept = max(1, round(density * delta.numel))
    if kept == delta.numel:
        return torch.zeros((), dtype=delta.dtype)
    size = delta.matrix().abs().flatten()  # never in place: a dense delta hands out its own numbers
    return size.kthvalue(delta.numel - kept + 1).values


def mean_of_agreeing(changes: Tensor) -> Tensor:
    """(K, ...) -> (...): the mean of the changes that have the sign of their sum; zeros have no say."""
    elected = changes.sum(0).sign()
    agree = (changes.sign() == elected) & (changes != 0)
    count = agree.sum(0).clamp(min=1)
    return torch.where(agree, changes, torch.zeros_like(changes)).sum(0) / count
