"""Which entries of a base are trained: one magnitude for all layers, found exactly and without sorting.

The bits of a non-negative fp32 number, read as an integer, are ordered as the number is. So the k-th smallest
magnitude of billions of weights takes two histograms: of the upper halves of the bits, then of the lower halves of
those that share the upper one. M entries below the threshold, N in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from studio.keyed import key_of

CHUNK = 1 << 24  # entries looked at together, so that temporary memory stays small
HALF = 16
MASK = (1 << HALF) - 1


def threshold_for(tensors: Sequence[Tensor], count: int) -> float:
    """theta such that `count` of the magnitudes are below it; as near as ties allow, never none. 0 < count < N."""
    upper = _histogram(_bits(tensors), 1 << HALF, lambda bits: bits >> HALF)
    below = upper.cumsum(0)
    high = int(torch.searchsorted(below, count, right=True))  # where the magnitude of rank count + 1 lies
    before = int(below[high - 1]) if high else 0
    lower = _histogram(_bits(tensors), 1 << HALF, lambda bits: bits[bits >> HALF == high] & MASK)
    within = lower.cumsum(0)
    low = int(torch.searchsorted(within, count - before, right=True))
    fewer, more = before + int(within[low - 1] if low else 0), before + int(within[low])
    bits = (high << HALF) + low
    # Below the magnitude itself there are `fewer`, below the next number there are `more`; they differ by its ties.
    ties_in = fewer == 0 or more - count < count - fewer
    return float(torch.tensor(bits + ties_in, dtype=torch.int32).view(torch.float32))


def count_below(tensors: Sequence[Tensor], threshold: float) -> int:
    """How many magnitudes are below the threshold."""
    return sum(int((chunk < threshold).sum()) for chunk in _magnitudes(tensors))


def positions_of(chosen: Tensor) -> Tensor:
    """The flat positions of the True entries, sorted: int32, or int64 for tensors of 2^31 entries and more."""
    return torch.nonzero(chosen.reshape(-1)).squeeze(1).to(index_dtype(chosen.numel()))


def index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < 2**31 else torch.int64


def part_of(positions: Tensor, part: int, parts: int, *key: object) -> Tensor:
    """Those positions that a hash of (key, position) puts into `part` (from 0) of `parts`.

    The same on every machine, whatever else is selected, so that two trainings never share a position.
    """
    numbers = positions.cpu().numpy().astype(np.uint64) + np.uint64(key_of("sara support", *key))
    mine = _mixed(numbers) % np.uint64(parts) == np.uint64(part)
    return positions[torch.from_numpy(mine).to(positions.device)]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014): every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _magnitudes(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(CHUNK):
            yield chunk.float().abs()


def _bits(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (chunk.view(torch.int32) for chunk in _magnitudes(tensors))


def _histogram(chunks: Iterable[Tensor], size: int, key: Callable[[Tensor], Tensor]) -> Tensor:
    total = torch.zeros(size, dtype=torch.int64)
    for chunk in chunks:
        total += torch.bincount(key(chunk), minlength=size).cpu()
    return total
