"""What a training cost, as its run folder tells: parameters, bytes, memory, seconds.

Names of columns are those of PEFT's comparison of methods for image generation, where the figure is the same.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from studio import library
from studio.adapter import Adapter
from studio.run import Run


def training_cost(adapter: Adapter, path: Path) -> dict[str, Any]:
    """By column; `file_size` and memory in bytes, times in seconds. Without a run, what it would tell is left out.

    `accelerator_memory_max` is the most memory that torch held on a GPU, and on a CPU the most that the process held.
    `step_seconds` is the median, so that pictures drawn in between and a busy machine count little.
    """
    cost: dict[str, Any] = {
        "num_trainable_params": sum(parameter.numel() for parameter in adapter.parameters()),
        "file_size": path.stat().st_size,
        "steps": adapter.card.steps,
    }
    run = run_of(path)
    return cost if run is None else cost | _told_by(run)


def run_of(path: Path) -> Run | None:
    """The run that made an adapter's file: the folder it lies in, or the one that the library remembers."""
    for folder in (path.parent, Path(library.facts_of(path).get("run") or path.parent)):
        if (folder / "events.jsonl").exists():
            return Run(folder)
    return None


def _told_by(run: Run) -> dict[str, Any]:
    history = run.history()
    steps = [event for event in history if event["kind"] == "step"]
    started = next((event for event in history if event["kind"] == "started"), {})
    finished: dict[str, Any] = next((event for event in reversed(history) if event["kind"] == "finished"), {})
    cost: dict[str, Any] = {}
    if "trained_parameters" in started:
        cost["num_trainable_params"] = started["trained_parameters"]
    if "seconds" in finished:
        cost["train_time"] = round(finished["seconds"] + _before(history), 3)
    if steps:
        cost["accelerator_memory_max"] = round(max(event["peak_memory_gib"] for event in steps) * 2**30)
        last = steps[-max(1, len(steps) // 10) :]
        cost["train_loss"] = round(statistics.mean(event["loss"] for event in last), 5)
    gaps = [after["time"] - before["time"] for before, after in pairwise(steps)]
    if gaps:
        cost["step_seconds"] = round(statistics.median(gaps), 4)
    return cost


def _before(history: list[dict[str, Any]]) -> float:
    """Seconds that the earlier parts of a resumed training took, each as far as its steps count."""
    starts = [number for number, event in enumerate(history) if event["kind"] in ("started", "resumed")]
    return sum(history[end - 1]["time"] - history[start]["time"] for start, end in pairwise(starts))
