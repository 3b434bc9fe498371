"""The same cases in earnest on a CUDA device: what its allocator holds at the peak of a step, and the time of a step.

Every attention backend that works here has its rows. A contender is alone on the device while its memory is measured;
while it is timed, those that it is compared with take turns with it, so their networks must fit together.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from studio.bench.cases import Case, compared_with
from studio.bench.rows import Ratio, Row
from studio.bench.speed import gpu_seconds, ratio, take_turns
from studio.bench.trainee import Trainee
from studio.errors import StudioError


def attention_backends() -> list[str]:
    from diffusers.utils import is_xformers_available

    return ["sdpa", "xformers"] if is_xformers_available() else ["sdpa"]


def peak_rows(cases: Sequence[Case]) -> Iterator[Row]:
    for case in cases:
        for backend in attention_backends():
            peaks: dict[str, float] = {}
            for name in case.names:
                yield _or_note(_peak_row, case, name, backend, peaks)


def _peak_row(case: Case, name: str, backend: str, peaks: dict[str, float]) -> Row:
    one = _built(case, name, backend)
    one.step()
    _empty()
    torch.cuda.reset_peak_memory_stats()
    one.step()
    peaks[name] = peak = torch.cuda.max_memory_allocated() / 2**30
    ratios = {peer: Ratio(*[peak / peaks[peer]] * 3) for peer in compared_with(name, peaks)}
    return Row(_title(case, backend), name, one.trained, {"peak_gib": peak}, ratios)


def time_rows(cases: Sequence[Case], rounds: int) -> Iterator[Row]:
    for case in cases:
        for backend in attention_backends():
            for name in case.names:
                yield _or_note(_time_row, case, name, backend, rounds)


def _time_row(case: Case, name: str, backend: str, rounds: int) -> Row:
    peers = [peer for peer in compared_with(name, case.names) if peer != "full"]
    there = {each: _built(case, each, backend) for each in (name, *peers)}
    seconds = take_turns({each: one.step for each, one in there.items()}, rounds, gpu_seconds)
    figures = {"step_ms": 1e3 * statistics.median(seconds[name])}
    ratios = {peer: ratio(seconds, name, peer) for peer in peers}
    return Row(_title(case, backend), name, there[name].trained, figures, ratios)


def _or_note(measure: Callable[..., Row], case: Case, name: str, backend: str, more: Any) -> Row:
    try:
        return measure(case, name, backend, more)
    except StudioError as error:
        return Row(_title(case, backend), name, note=error.message)
    except torch.OutOfMemoryError:
        return Row(_title(case, backend), name, note="does not fit on this GPU")
    finally:
        _empty()


def _title(case: Case, backend: str) -> str:
    return f"{case.name}, {backend} on the GPU"


def _built(case: Case, name: str, backend: str) -> Trainee:
    with torch.device("cuda"):
        workload = case.make()
        network: Any = workload.module
        if backend == "xformers" and hasattr(network, "enable_xformers_memory_efficient_attention"):
            network.enable_xformers_memory_efficient_attention()
        return case.trainee(name, workload)


def _empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()
