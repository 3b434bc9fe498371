"""The parts of the benchmark, each a table and the bars that it is held against."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from studio.bench import bars, cases, files, gpu, merge, video
from studio.bench.cases import Case
from studio.bench.memory import Footprint, fake_patches, footprint
from studio.bench.rows import Ratio, Row, judge, markdown
from studio.bench.speed import ratio, take_turns
from studio.bench.trainee import Trainee
from studio.bench.workload import Workload
from studio.errors import RequestError, StudioError

PARTS = ("memory", "speed", "merge", "files", "video")
Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Result:
    part: str
    machine: str
    rows: list[Row]
    verdicts: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"part": self.part, "machine": self.machine, "rows": rows, "bars": self.verdicts}

    def to_markdown(self) -> str:
        return f"## {self.part}\n\n{self.machine}\n\n{markdown(self.rows, self.verdicts)}"


def run(part: str, chosen: str = "", rounds: int = 15, progress: Progress = lambda *_: None) -> Result:
    """Measures one part; `chosen` is a part of the names of the cases wanted. Raises RequestError."""
    if part == "merge":
        with _one_thread():
            rows = merge.measure(rounds)
        return Result(part, machine(), rows, judge(bars.MERGE, rows))
    if part == "files":
        if not any(chosen in case.name for case in files.CASES):
            raise _no_case(part, chosen, [case.name for case in files.CASES])
        rows = files.measure(chosen, min(rounds, 3), progress)  # processes of seconds, and hardly any spread
        return Result(part, machine(), rows, judge(bars.FILES, rows))
    if part == "video":
        with _one_thread():
            rows = video.measure(rounds, progress)
        return Result(part, machine(), rows, judge(video.BARS, rows))
    on_gpu = torch.cuda.is_available()
    known = cases.MEMORY if part == "memory" else (*cases.SPEED, *(cases.MEMORY if on_gpu else ()))
    wanted = [case for case in known if chosen in case.name]
    if not wanted:
        raise _no_case(part, chosen, [case.name for case in known])
    if part == "memory":
        rows = list(memory_rows(wanted, progress))
        if on_gpu:
            rows += gpu.peak_rows(wanted)
        return Result(part, machine(), rows, judge(bars.MEMORY, rows))
    if on_gpu:
        rows = list(gpu.time_rows(wanted, rounds))
    else:
        with _one_thread():
            rows = [row for case in wanted for row in speed_rows(case, rounds, progress)]
    return Result(part, machine(), rows, judge(bars.SPEED, rows))


def _no_case(part: str, chosen: str, names: Sequence[str]) -> RequestError:
    return RequestError(f"no case of 'bench {part}' has '{chosen}' in its name", "; ".join(names))


# -- memory --------------------------------------------------------------------------------------------------------


def memory_rows(wanted: Sequence[Case], progress: Progress = lambda *_: None) -> Iterator[Row]:
    """A row per trainee, from fake tensors: the same on every machine."""
    total, done = sum(len(case.names) for case in wanted), 0
    for case in wanted:
        peaks: dict[str, int] = {}
        for name in case.names:
            progress(f"{case.name}: {name}", done, total)
            done += 1
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            try:
                found = footprint(mode, case.make, partial(_on_fakes, case, name, mode))
            except StudioError as error:
                yield Row(case.name, name, note=error.message)
                continue
            peaks[name] = found.peak
            yield _memory_row(
                case.name, name, found, {peer: found.peak / peaks[peer] for peer in cases.compared_with(name, peaks)}
            )


def _on_fakes(case: Case, name: str, mode: FakeTensorMode, workload: Workload) -> Trainee:
    return case.trainee(name, workload, fake_patches(mode))


def _memory_row(case: str, name: str, found: Footprint, ratios: dict[str, float]) -> Row:
    figures = {
        "peak_gib": found.peak / 2**30,
        "bytes_per_entry": found.kept / found.trained,
        "with_gradients": found.kept_with_gradients / found.trained,
    }
    return Row(case, name, found.trained, figures, {peer: Ratio(r, r, r) for peer, r in ratios.items()})


# -- speed ---------------------------------------------------------------------------------------------------------


def speed_rows(case: Case, rounds: int, progress: Progress = lambda *_: None) -> list[Row]:
    """All trainees of a case, each on a network of its own, taking turns."""
    rows, there = [], {}
    for name in case.names:
        torch.manual_seed(0)
        try:
            there[name] = case.trainee(name, case.make())
        except StudioError as error:
            rows.append(Row(case.name, name, note=error.message))
    steps = {name: one.step for name, one in there.items()}
    seconds = take_turns(steps, rounds, on_round=lambda n: progress(case.name, n - 1, rounds + 2))
    for name, one in there.items():
        ratios = {peer: ratio(seconds, name, peer) for peer in cases.compared_with(name, there)}
        rows.append(Row(case.name, name, one.trained, {"step_ms": 1e3 * statistics.median(seconds[name])}, ratios))
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine() -> str:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    return f"{device}; {platform.machine()}, {platform.system()}; torch {torch.__version__}"
