"""The weighted sum: exact for any adapters, however much they overlap."""

from __future__ import annotations

from studio.deltas import WeightDelta, total
from studio.merging.strategy import Meeting, strategy


@strategy("sum")
def weighted_sum(meeting: Meeting) -> WeightDelta:
    """The sum of all changes at their strengths, exactly: ranks side by side, or dense where that is smaller."""
    return total(meeting.scaled)


@strategy("svd")
def truncated_sum(meeting: Meeting) -> WeightDelta:
    """The sum, brought down to the rank or tolerance asked for by its singular values."""
    return total(meeting.scaled)
