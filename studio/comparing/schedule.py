"""Doing jobs: a process for each command, some at a time, stopped and gone on with at any moment."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.comparing.jobs import Job
from studio.errors import RequestError
from studio.files import disk_error
from studio.paths import data_root

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 120  # for a stopped training to write its checkpoint


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or why there is none."""

    job: Job
    result: dict[str, Any] | None
    error: str = ""


class _Running:
    """A job in progress: one command after the other, their output in its log."""

    def __init__(self, job: Job, environment: dict[str, str], lock: int) -> None:
        self.job, self.environment, self.lock = job, environment, lock
        self.commands = job.commands()
        self.began = time.monotonic()
        job.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.job.log_path.open("ab") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then stops its children in order.
            return subprocess.Popen(
                self.commands.pop(0),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.lock,),  # if this program is killed, the folder stays locked until its children end
            )

    def outcome(self) -> Outcome | None:
        """None while it goes on."""
        code = self.process.poll()
        if code is None:
            return None
        if code != 0:
            return Outcome(self.job, None, f"{_last_error(self.job.log_path)} (exit {code}; see {self.job.log_path})")
        if self.commands:
            self.process = self._start()
            return None
        result = self.job.store(time.monotonic() - self.began)
        shutil.rmtree(self.job.run_folder / "checkpoints", ignore_errors=True)
        return Outcome(self.job, result)

    def stop(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def run_jobs(
    jobs: Sequence[Job], at_once: int, home: Path, lock: int, stop: Callable[[], bool] = lambda: False
) -> Iterator[Outcome]:
    """Does what has no result yet, and yields each outcome. A job whose needs have failed fails too.

    On `stop`, trainings write a checkpoint and end; nothing more is started. `home` is the studio's home of all
    processes, so that a study leaves no traces in the user's library and ledger; `lock` comes from `alone_in`.
    """
    done = {job.name for job in jobs if job.result() is not None}
    waiting = [job for job in jobs if job.name not in done]
    failed: set[str] = set()
    running: list[_Running] = []
    environment = _environment(home, at_once)
    try:
        while (waiting or running) and not stop():
            for job in [job for job in waiting if failed & set(job.needs)]:
                waiting.remove(job)
                failed.add(job.name)
                yield Outcome(job, None, "a training that it needs has failed")
            ready = [job for job in waiting if set(job.needs) <= done]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running.append(_Running(job, environment, lock))
            for one in list(running):
                outcome = one.outcome()
                if outcome is not None:
                    running.remove(one)
                    (done if outcome.result is not None else failed).add(one.job.name)
                    yield outcome
            time.sleep(POLL_SECONDS)
    finally:
        _end(running)


def _end(running: list[_Running]) -> None:
    for one in running:
        one.stop(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            one.stop(signal.SIGKILL)
            one.process.wait()


def _environment(home: Path, at_once: int) -> dict[str, str]:
    """Several processes take one thread each: two threads each on two cores are a hundred times slower."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {**os.environ, "STUDIO_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
    return own | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1].removeprefix("error: ")


def seconds_left(jobs: Sequence[Job], at_once: int) -> float | None:
    """About how long what has no result will take, by the jobs of its kind that have; None where there are none."""
    results = {job.name: job.result() for job in jobs}
    known: dict[str, list[float]] = {}
    for result in filter(None, results.values()):
        known.setdefault(result["kind"], []).append(result["seconds"])
    missing = [job for job in jobs if results[job.name] is None]
    if not known:
        return None if missing else 0.0
    typical = statistics.mean(value for values in known.values() for value in values)
    each = [statistics.median(known[job.kind]) if job.kind in known else typical for job in missing]
    return sum(each) / at_once


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Inside, no other `studio compare` works on this folder; yields the lock. Raises RequestError, DiskError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise disk_error(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"another comparison works in '{folder}'", "wait for it, or give --work DIR") from None
        yield file.fileno()


def default_out(name: str) -> Path:
    """Where a study is published: with the docs of a checkout, else here."""
    return data_root() / "docs" / "results" / name if (data_root() / "docs").is_dir() else Path("results") / name
