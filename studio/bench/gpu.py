"""The same cases in earnest on a CUDA device: what its allocator held at the peak, and the time of a step.

Every attention backend that works here has its rows. A trainee is alone on the device while its memory is measured;
its time is taken in turns with PEFT's LoRA, so two networks must fit.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from studio.bench.cases import Case
from studio.bench.rows import Ratio, Row
from studio.bench.speed import gpu_seconds, ratio, take_turns
from studio.bench.trainee import Trainee
from studio.errors import StudioError

PEER = "peft-lora"


def attention_backends() -> list[str]:
    from diffusers.utils import is_xformers_available

    return ["sdpa", "xformers"] if is_xformers_available() else ["sdpa"]


def measure(cases: Sequence[Case], rounds: int) -> Iterator[Row]:
    for case in cases:
        for backend in attention_backends():
            peer: Row | None = None
            for name in case.names:
                row = _row(case, name, backend, rounds, peer)
                peer = peer or row
                yield row


def _row(case: Case, name: str, backend: str, rounds: int, peer: Row | None) -> Row:
    title = f"{case.name}, {backend}"
    try:
        peak, trained = _peak_gib(case, name, backend)
        seconds = _seconds(case, name, backend, rounds)
    except StudioError as error:
        return Row(title, name, note=error.message)
    except torch.OutOfMemoryError:
        return Row(title, name, note="does not fit on this GPU")
    finally:
        _empty()
    figures = {"peak_gib": peak, "step_ms": 1e3 * statistics.median(seconds[name])}
    peak_ratio = peak / peer.figures["peak_gib"] if peer and peer.figures else 1.0
    ratios = {f"{PEER}, peak": Ratio(peak_ratio, peak_ratio, peak_ratio), f"{PEER}, time": ratio(seconds, name, PEER)}
    return Row(title, name, trained, figures, ratios)


def _peak_gib(case: Case, name: str, backend: str) -> tuple[float, int]:
    one = _built(case, name, backend)
    one.step()
    _empty()
    torch.cuda.reset_peak_memory_stats()
    one.step()
    return torch.cuda.max_memory_allocated() / 2**30, one.trained


def _seconds(case: Case, name: str, backend: str, rounds: int) -> dict[str, list[float]]:
    both = {each: _built(case, each, backend) for each in dict.fromkeys((PEER, name))}
    return take_turns({each: one.step for each, one in both.items()}, rounds, gpu_seconds)


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
