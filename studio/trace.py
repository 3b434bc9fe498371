"""What the events of a run say so far, read a little at a time: a live page never reads a log again.

Nothing here loads torch, so a server that shows runs stays small.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from studio.run import Run

ENDINGS = ("finished", "stopped", "failed")
SPEED_WINDOW = 50  # steps that speed and time left are reckoned from


@dataclass
class Trace:
    """The story of one run. `refresh` reads what was added; `version` changes whenever anything did."""

    folder: Path
    version: int = 0
    total: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ending: dict[str, Any] | None = None
    session_from: int = 0  # index of the first step of the latest process
    _offset: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def run(self) -> Run:
        return Run(self.folder)

    def refresh(self) -> Trace:
        """Takes in the lines that were completed since the last call."""
        with self._lock:
            path = self.run.events_path
            try:
                size = path.stat().st_size
            except OSError:
                return self
            if size < self._offset:
                self._begin_again()
            if size > self._offset:
                self._read(path)
        return self

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        complete = added.rfind(b"\n") + 1  # a line that is being written waits for the next call
        self._offset += complete
        for line in added[:complete].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "kind" in event:
                self._take(event)
                self.version += 1

    def _begin_again(self) -> None:
        fresh = Trace(self.folder)
        for name in ("total", "steps", "validations", "samples", "checkpoints", "warnings", "ending", "session_from"):
            setattr(self, name, getattr(fresh, name))
        self._offset, self.version = 0, self.version + 1

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        lists = {
            "step": self.steps,
            "validation": self.validations,
            "sample": self.samples,
            "checkpoint": self.checkpoints,
        }
        if kind in lists:
            lists[kind].append(event)
        elif kind == "warning" and event.get("text") not in self.warnings:
            self.warnings.append(str(event.get("text", "")))
        self.total = int(event.get("steps") or self.total)
        if kind == "resumed":
            start = event.get("from_step", 0)
            for events in lists.values():
                events[:] = [e for e in events if e.get("step", 0) <= start]
        if kind in ("started", "resumed"):
            self.session_from = len(self.steps)
        self.ending = event if kind in ENDINGS else None if kind in ("started", "resumed", "step") else self.ending

    # -- what follows from it ----------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def state(self) -> str:
        """preparing, training, finished, stopped, failed; or `broken off` when its process has gone without a word."""
        if self.ending is not None:
            return str(self.ending["kind"])
        if not self.run.is_live():
            return "broken off"
        return "training" if len(self.steps) > self.session_from else "preparing"

    def seconds_per_step(self) -> float | None:
        """Wall-clock seconds from step to step lately, the median, so that sampling does not count."""
        times = [e["time"] for e in self.steps[self.session_from :][-SPEED_WINDOW:]]
        gaps = sorted(b - a for a, b in pairwise(times))
        return gaps[len(gaps) // 2] if gaps else None

    def seconds_left(self) -> float | None:
        each = self.seconds_per_step()
        return None if each is None or not self.total else each * max(0, self.total - self.step)


_known: dict[Path, Trace] = {}
_known_lock = threading.Lock()


def trace_of(folder: Path) -> Trace:
    """The up-to-date trace of a run; what was read of it before is kept."""
    folder = folder.resolve()
    with _known_lock:
        trace = _known.setdefault(folder, Trace(folder))
    return trace.refresh()
