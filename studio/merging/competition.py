"""PCB (Du et al. 2024, Parameter Competition Balancing): numbers compete within and between the adapters.

    within  = exp(K n(|t_i|)^2),   between = tanh(t_i sum_j t_j),   score = within between

with n scaling to [0, 1] over the weight. The best share of the scores, scaled to [0, 1], weigh a mean of the changes.
Per weight and adapter, where the authors take the whole model as one vector.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from studio.deltas import Dense, WeightDelta
from studio.merging.agreement import Lambda
from studio.merging.strategy import Meeting, strategy


@strategy("pcb", dense=True)
def pcb(
    meeting: Meeting,
    keep: Annotated[float, Field(gt=0, le=1, description="Share of each adapter's numbers that win.")] = 0.2,
    lam: Lambda = 1.0,
) -> WeightDelta:
    """Numbers that are large in their adapter and agree with the others win; the mean of the winners by score."""
    deltas = meeting.scaled
    whole = torch.zeros(deltas[0].height, deltas[0].width, dtype=deltas[0].dtype)
    for delta in deltas:
        whole += delta.matrix()
    result, weight = torch.zeros_like(whole), torch.zeros_like(whole)
    for delta in deltas:
        change = delta.matrix()
        share = _winners(_scores(change, whole, meeting.count), keep)
        result += share * change
        weight += share
    return Dense((lam * result / weight.clamp(min=1e-12)).reshape(meeting.shape))


def _scores(change: Tensor, whole: Tensor, count: int) -> Tensor:
    within = torch.exp(count * _unit(change.abs()).square())
    return within * torch.tanh(change * whole)


def _winners(scores: Tensor, keep: float) -> Tensor:
    """Scaled to [0, 1], and 0 below the share that wins."""
    kept = max(1, round(keep * scores.numel()))
    floor = scores.flatten().kthvalue(scores.numel() - kept + 1).values if kept < scores.numel() else scores.min()
    # One below the floor takes its value, so the last winner gets a weight of zero as in the authors' code; where all
    # scores are alike, all win.
    return _unit(scores.clamp(min=float(floor)), alike=1.0)


def _unit(values: Tensor, alike: float = 0.0) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.full_like(values, alike)
