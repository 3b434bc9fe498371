"""What the command line prints: progress, tables, errors. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from studio.errors import StudioError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
LINE_EVERY_SECONDS = 5.0


def print_error(error: StudioError) -> None:
    sys.stderr.write(f"error: {_one_line(error.message)}\n")
    if error.hint:
        sys.stderr.write(f"hint: {_one_line(error.hint)}\n")


def outcome(work: Callable[[], object]) -> int:
    """The exit code of a program that does `work`: 0; an error's own, after one line; 130 where Ctrl-C ended it."""
    try:
        work()
    except StudioError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("broken off")
        return 130
    return 0


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], unbroken: str = "") -> None:
    """`unbroken` names a column of short words, whose lines are kept whole where others can give way."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:  # nothing is cut short: names are there to be copied
        table.add_column(column, overflow="fold", no_wrap=column == unbroken)
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    out.print(table, soft_wrap=False)


def say(text: str, style: str | None = None) -> None:
    """A line on stderr."""
    err.print(text, style=style, markup=False, soft_wrap=True)


def file_size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after a checkpoint; the second one ends at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopSignal:
        self.previous = {s: signal.signal(s, self._received) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        say("stopping: saving a checkpoint (once more ends at once)")

    def __call__(self) -> bool:
        return self.number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class TrainingProgress:
    """A bar on a terminal, else a line every few seconds: step, loss, speed, time left, peak memory."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.step = total, start
        self.loss: float | None = None
        self.last_line = 0.0
        self.began, self.first = time.monotonic(), start
        self.bar: Progress | None = None
        if err.is_terminal:
            columns = (
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(TextColumn("{task.description}"), *columns, console=err, expand=True)
            self.bar.start()
            self.task = self.bar.add_task("training", total=total, completed=start, facts="")

    def show(self, event: Any) -> None:
        if event.kind == "progress":
            self._preparing(event.data)
        elif event.kind == "step":
            self.loss = event.data["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * event.data["loss"]
            self._step(event.step, event.data)

    def _preparing(self, data: dict[str, Any]) -> None:
        text = f"{data['what']} {data['done'] + 1}/{data['total']}"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            self.last_line = time.monotonic()
            say(text)

    def _step(self, step: int, data: dict[str, Any]) -> None:
        if self.loss == data["loss"]:  # the first step: what was encoded and drawn before it is no measure of speed
            self.began, self.first = time.monotonic(), step
        facts = f"loss {self.loss:.4f}  {data['samples_per_second']:.1f} samples/s  {data['peak_memory_gib']:.2f} GiB"
        if self.bar:
            self.bar.update(self.task, completed=step, description="training", facts=facts)
        elif time.monotonic() - self.last_line > LINE_EVERY_SECONDS or step == self.total:
            self.last_line = time.monotonic()
            each = (self.last_line - self.began) / max(1, step - self.first)
            say(f"step {step}/{self.total}  {facts}  about {each * (self.total - step):.0f} s left")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class CountProgress:
    """The same for anything that is counted, such as pictures drawn."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.last_line = what, total, time.monotonic()
        self.bar: Progress | None = None
        if err.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(what, total=total)

    def show(self, done: int, total: int | None = None) -> None:
        """`total` is for what is only counted on the way."""
        self.total = total or self.total
        if self.bar:
            self.bar.update(self.task, completed=done, total=self.total)
        elif time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            self.last_line = time.monotonic()
            say(f"{self.what} {done}/{self.total}")

    def show_of(self, done: int, total: int) -> None:
        """For work that says along the way how much there is."""
        self.total = total
        if self.bar:
            self.bar.update(self.task, total=total)
        self.show(done)

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
