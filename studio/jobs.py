"""Trainings as processes of their own, and the queue of those that wait for a device.

A job is one command line, `python -m studio train ... --run DIR`, or another one that needs a device for long and
leaves a file, such as `evaluate`, in a session of its own, so that it outlives the
server that began it. Everything known of it lies in `$STUDIO_HOME/jobs/ID.json`, beside what it printed, `ID.log`: the
server has nothing to remember, and another one, later, finds the running job by its process id and starting time.
Whoever calls `advance` moves the queue on; a lock on the folder makes that safe from several processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from studio import library
from studio.errors import RequestError
from studio.files import disk_error, slug, slugify, write_atomically
from studio.paths import studio_home
from studio.process import identity, is_alive
from studio.run import Run
from studio.trace import trace_of

ROOT = Path(__file__).resolve().parent.parent  # what `python -m studio` needs on its path
POLL_SECONDS = 1.0
KEPT = 200  # records of jobs that are over


@dataclass(frozen=True)
class Job:
    """A training that waits, runs or is over. `arguments` follow `python -m studio`; `process` is an `identity`.

    One that leaves a file has `result`: it is finished when that was written after the job was added. Its `run` is then
    only the folder of that file.
    """

    id: str
    arguments: tuple[str, ...]
    run: str
    order: float
    added: float
    phase: str = "queued"  # queued, started, over, cancelled
    device: str = ""
    process: dict[str, Any] | None = None
    exit_code: int | None = None
    stop_asked: bool = False
    paused_by: dict[str, Any] | None = None
    result: str = ""
    title: str = ""

    @property
    def is_training(self) -> bool:
        return not self.result

    @property
    def name(self) -> str:
        return Path(self.run).name if self.is_training else self.title

    @property
    def log(self) -> Path:
        return jobs_dir() / f"{self.id}.log"

    def state(self) -> str:
        """queued, cancelled, starting, preparing, training, paused, stopping, finished, stopped, failed, broken off;
        one that leaves a file is `working` instead of preparing and training."""
        if self.phase in ("queued", "cancelled"):
            return self.phase
        if self.phase == "started" and is_alive(self.process):
            if self.paused_by is not None:
                return "paused"
            if self.stop_asked:
                return "stopping"
            if not self.is_training:
                return "working"
            state = trace_of(Path(self.run)).state()
            return state if state in ("preparing", "training") else "starting"
        state = trace_of(Path(self.run)).state() if self.is_training else "finished" if self._has_result() else ""
        if state in ("finished", "stopped"):
            return state
        return "failed" if state == "failed" or self.fault() else "stopped" if self.stop_asked else "broken off"

    def _has_result(self) -> bool:
        try:
            return Path(self.result).stat().st_mtime >= self.added
        except OSError:
            return False

    def said_last(self) -> str:
        """The last line that it printed: how far it is, for one that leaves a file."""
        try:
            lines = self.log.read_text(errors="replace")[-2000:].split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        except OSError:
            return ""

    def fault(self) -> str:
        """What went wrong, in the job's own words: its `error:` and `hint:` lines; or ""."""
        try:
            lines = self.log.read_text(errors="replace")[-20_000:].splitlines()
        except OSError:
            return ""
        last = {word: line for word in ("error:", "hint:") for line in lines if line.startswith(word)}
        return " ".join(line.split(": ", 1)[-1].rstrip(".") + "." for line in last.values()) if "error:" in last else ""


# -- the records -----------------------------------------------------------------------------------------------


def jobs_dir() -> Path:
    return studio_home() / "jobs"


def jobs() -> list[Job]:
    """All jobs that are remembered, in the order of the queue. Read again only when a record was written."""
    folder = jobs_dir()
    try:
        changed = folder.stat().st_mtime_ns  # records are renamed into place, which changes the folder
    except OSError:
        return []
    kept = tuple(_listed)
    if kept[:2] == (folder, changed):
        return list(kept[2])
    found = []
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            content = json.loads(path.read_text())
            found.append(Job(**{**content, "arguments": tuple(content["arguments"])}))
    found.sort(key=lambda job: (job.order, job.added))
    if time.time_ns() - changed > SETTLED_NANOSECONDS:  # another change might bear the same time
        _listed[:] = [folder, changed, found]
    return list(found)


SETTLED_NANOSECONDS = 100_000_000
_listed: list[Any] = []  # the folder, when it changed, the jobs


def find(name: str) -> Job:
    """A job by its id. Raises RequestError."""
    found = next((job for job in jobs() if job.id == name), None)
    if found is None:
        raise RequestError(f"there is no job '{name}'")
    return found


def job_of_run(folder: Path) -> Job | None:
    """The latest training that worked, works or will work on this run."""
    own = str(folder.resolve())
    same = [job for job in jobs() if job.is_training and job.run == own]
    return max(same, key=lambda job: job.added, default=None)


def _store(job: Job) -> Job:
    write_atomically(jobs_dir() / f"{job.id}.json", json.dumps(asdict(job)))
    return job


@contextmanager
def _locked() -> Iterator[None]:
    """Only one process or thread changes the queue at a time."""
    try:
        jobs_dir().mkdir(parents=True, exist_ok=True)
        with (jobs_dir() / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise disk_error(jobs_dir(), error) from error


# -- what a user asks for ----------------------------------------------------------------------------------------


def submit(arguments: Sequence[str], run: Path, result: Path | None = None, title: str = "") -> Job:
    """Puts a training at the end of the queue; `run` must be the folder that `arguments` name with --run.

    Another command has a `result`, the file that it leaves in `run`, and a title to be shown.
    """
    with _locked():
        known = jobs()
        last = max((job.order for job in known), default=0.0)
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{slugify(run.name)[:40]}"
        name = next(n for n in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))) if n not in {j.id for j in known})
        left, order = str(result.resolve()) if result else "", tuple(map(str, arguments))
        return _store(
            Job(slug(name), order, str(run.resolve()), last + 1, time.time(), result=left, title=title or run.name)
        )


def resume(run: Path) -> Job:
    """Queues the rest of a run. Raises RequestError if it is at work or has no checkpoint."""
    if Run(run).is_live() or any(_waits_or_runs(job) for job in jobs() if Path(job.run) == run.resolve()):
        raise RequestError(f"'{run.name}' is waiting or at work already")
    Run(run).newest_checkpoint()
    return submit(["train", "--resume", "--run", str(run.resolve())], run)


def _waits_or_runs(job: Job) -> bool:
    return job.phase == "queued" or (job.phase == "started" and is_alive(job.process))


def cancel(name: str) -> Job:
    """Takes a waiting job out of the queue; asks a running one to save a checkpoint and stop."""
    with _locked():
        found = find(name)
        if found.phase == "queued":
            return _store(replace(found, phase="cancelled"))
        if found.phase != "started" or not is_alive(found.process) or found.stop_asked:
            return found  # a second signal would end it without its checkpoint
        found = _store(replace(found, stop_asked=True))
        assert found.process is not None
        os.kill(found.process["pid"], signal.SIGTERM)
        return found


def stop_run(folder: Path) -> None:
    """Asks whatever works on a run to save a checkpoint and stop."""
    found = job_of_run(folder)
    if found is not None and _waits_or_runs(found):
        cancel(found.id)
    else:
        Run(folder).request("stop")


def move(name: str, places: int) -> None:
    """Moves a waiting job up (negative) or down the queue."""
    with _locked():
        waiting = [job for job in jobs() if job.phase == "queued"]
        at = next((i for i, job in enumerate(waiting) if job.id == name), None)
        if at is None:
            raise RequestError(f"'{name}' is not waiting", "only waiting jobs have a place in the queue")
        orders = [job.order for job in waiting]
        waiting.insert(min(max(0, at + places), len(waiting) - 1), waiting.pop(at))
        for job, order in zip(waiting, orders, strict=True):
            _store(replace(job, order=order))


# -- devices and processes ---------------------------------------------------------------------------------------


def devices() -> list[str]:
    """Each takes one job at a time: the NVIDIA devices that this process may use, or else the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [f"cuda:{name}" for name in visible.split(",") if name not in ("", "-1")] or ["cpu"]
    found = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    return [f"cuda:{number}" for number in range(len(found))] or ["cpu"]


_children: dict[int, subprocess.Popen[bytes]] = {}  # of this process, to be reaped


def advance() -> list[Job]:
    """Notes which jobs have ended, wakes those whose pauser has gone, starts what has a free device. Returns those."""
    with _locked():
        for job in jobs():
            if job.phase == "started":
                _look_at(job)
        busy = [job.device for job in jobs() if job.phase == "started"]
        own = {job.run for job in jobs() if job.phase == "started"}
        elsewhere = [f for f in library.run_folders()[:50] if str(f.resolve()) not in own and Run(f).is_live()]
        free = [device for device in devices() if device not in busy][len(elsewhere) :]
        waiting = [job for job in jobs() if job.phase == "queued"]
        return [_start(job, device) for job, device in zip(waiting, free, strict=False)]


def _look_at(job: Job) -> None:
    assert job.process is not None
    child = _children.get(job.process["pid"])
    if not is_alive(job.process):
        code = child.wait() if child is not None else None
        _children.pop(job.process["pid"], None)
        _store(replace(job, phase="over", exit_code=code, paused_by=None))
        _forget_old()
    elif job.paused_by is not None and not is_alive(job.paused_by):
        _wake(job)


def _start(job: Job, device: str) -> Job:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [_python_path()])])}
    if device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "studio", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=jobs_dir(),
            start_new_session=True,
        )
    _children[process.pid] = process
    return _store(replace(job, phase="started", device=device, process=identity(process.pid)))


def _python_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def _forget_old() -> None:
    over = sorted((job for job in jobs() if job.phase in ("over", "cancelled")), key=lambda job: job.added)
    for job in over[:-KEPT]:
        (jobs_dir() / f"{job.id}.json").unlink(missing_ok=True)
        job.log.unlink(missing_ok=True)


class Dispatcher(threading.Thread):
    """Moves the queue on as long as its process lives."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="dispatcher")
        self.closing = threading.Event()

    def run(self) -> None:
        while not self.closing.wait(POLL_SECONDS):
            with suppress(Exception):  # a full disk must not end the queue for good
                advance()


# -- pausing -----------------------------------------------------------------------------------------------------


@contextmanager
def paused() -> Iterator[list[str]]:
    """Inside, the running jobs hold still; yields their names. Trainings in terminals are left alone.

    Should this process die inside, the next `advance` wakes them.
    """
    with _locked():
        running = [job for job in jobs() if job.phase == "started" and is_alive(job.process) and not job.paused_by]
        held = [_store(replace(job, paused_by=identity())) for job in running]
        for job in held:
            _signal(job, signal.SIGSTOP)
    try:
        yield [job.name for job in held]
    finally:
        with _locked():
            for name in [held_job.id for held_job in held]:
                _wake(find(name))


def _wake(job: Job) -> None:
    _store(replace(job, paused_by=None))
    _signal(job, signal.SIGCONT)


def _signal(job: Job, number: signal.Signals) -> None:
    if is_alive(job.process):
        assert job.process is not None
        with suppress(ProcessLookupError):
            os.killpg(job.process["pid"], number)  # it leads its own group
