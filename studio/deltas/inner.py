"""The inner product of two deltas by the cheapest way that their forms allow. Sums are accumulated in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from studio.deltas.delta import WeightDelta
from studio.deltas.kronecker import Kronecker
from studio.deltas.lazy_sum import Sum
from studio.deltas.low_rank import LowRank
from studio.deltas.sparse import Sparse


def inner(one: WeightDelta, other: WeightDelta) -> float:
    """<one, other> = sum of the products of all entries."""
    for a, b in ((one, other), (other, one)):
        if isinstance(a, Sum):
            return sum(inner(term, b) for term in a.terms)
    for a, b in ((one, other), (other, one)):
        if isinstance(a, LowRank):
            if isinstance(b, LowRank):
                # <U D, V E> = <U^T V, D E^T>: R x R numbers only.
                return _dot(a.up.T @ b.up, a.down @ b.down.T)
            return _dot(a.up, b.matvec(a.down.T))
    for a, b in ((one, other), (other, one)):
        if isinstance(a, Sparse):
            return _dot(a.values, b.at(a.index) if isinstance(b, Sparse) else b.matrix().flatten()[a.index])
    if isinstance(one, Kronecker) and isinstance(other, Kronecker) and one.left.shape == other.left.shape:
        return inner(one.left, other.left) * inner(one.right, other.right)
    return sum(_dot(block, other.rows(start, start + len(block))) for start, block in one.blocks())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.sum(a.double() * b.double()))
