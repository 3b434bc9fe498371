"""Step time, as ratios of contenders that take turns in one process.

On a CPU what is timed is this process's processor time on one thread, so that other programs disturb it less; on a GPU
the time between two events on the stream. A ratio is taken within each round, where both had the same neighbours; the
median over rounds is shown with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from studio.bench.rows import Ratio

Clock = Callable[[Callable[[], object]], float]


def processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def gpu_seconds(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in "12")
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock = processor_seconds,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each contender by round, after two that are not counted. The order shifts by one each round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            took = clock(contenders[name])
            if number >= 0:
                seconds[name].append(took)
        on_round(number + 3)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, peer: str) -> Ratio:
    each = [a / b for a, b in zip(seconds[name], seconds[peer], strict=True)]
    if len(each) < 2:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)
