"""`studio compare`: a study's trainings, measured and tabled."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from studio.errors import RequestError, WorkError
from studio.terminal import StopSignal, out, print_json, print_table, say


def compare(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="A study's name, or a file.")],
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes at a time; several take one thread each.")] = 1,
    out_path: Annotated[Path | None, typer.Option("--out", help="Folder. Default: docs/results/STUDY.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of trainings. Default: in the studio's home.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Methods x lessons x seeds in one table. Stop and go on at any time. Example: studio compare screening --jobs 2"""
    from studio.comparing.jobs import make_jobs
    from studio.comparing.motions import MotionStudy, motion_jobs, publish_motions
    from studio.comparing.publish import publish
    from studio.comparing.schedule import alone_in, default_out
    from studio.comparing.study import read_study
    from studio.paths import studio_home

    named = [read_study(text) for text in studies]
    if out_path is not None and len(named) > 1:
        raise RequestError("--out is for one study", "give several studies without it")
    published = []
    for name, study in named:
        moving = isinstance(study, MotionStudy)
        jobs_of, write = (motion_jobs, publish_motions) if moving else (make_jobs, publish)
        place = (work or studio_home() / "studies").resolve() / name
        with alone_in(place) as lock:
            todo = jobs_of(study, place)
            if only_list:
                _list(todo)
                continue
            target = out_path or default_out(name)
            command = f"studio compare {name} --jobs {jobs}"
            failed = _work(todo, jobs, place, lock, lambda: write(study, name, todo, target, command))  # noqa: B023
            published.append(write(study, name, todo, target, command))
            if not as_json:
                out.print(str(target / "results.md"), soft_wrap=True, markup=False)
            if failed:
                raise WorkError(f"{failed} jobs failed; the others are in '{target}'", "the same command tries again")
    if as_json and not only_list:
        print_json(published if len(published) > 1 else published[0])


def _list(jobs: list[Any]) -> None:
    print_table(["job", "kind", "done"], [(job.name, job.kind, "yes" if job.result() else "") for job in jobs])
    out.print(_count(jobs), soft_wrap=True)


def _count(jobs: list[Any]) -> str:
    missing = [job.kind for job in jobs if job.result() is None]
    counts = ", ".join(f"{missing.count(kind)} of kind {kind}" for kind in dict.fromkeys(missing))
    return f"{len(jobs)} jobs, {len(jobs) - len(missing)} done" + (f"; to do: {counts}" if missing else "")


def _work(jobs: list[Any], at_once: int, place: Path, lock: int, publish: Any) -> int:
    """Does the jobs and tells how it goes on stderr; returns how many failed."""
    from studio.comparing.schedule import run_jobs, seconds_left

    say(_count(jobs))
    left = seconds_left(jobs, at_once)
    say("how long it takes is known after the first" if left is None else f"about {_duration(left)}")
    failed, began = 0, time.monotonic()
    with StopSignal() as stop:
        for outcome in run_jobs(jobs, at_once, place / "home", lock, stop):
            if outcome.result is None:
                failed += 1
                say(f"failed: {outcome.job.name}: {outcome.error}", style="red")
                continue
            done = sum(job.result_path.exists() for job in jobs)
            left = seconds_left(jobs, at_once) or 0.0
            took = f"{outcome.result['seconds']:.0f} s"
            say(f"{done}/{len(jobs)}  {outcome.job.name}: {took}; about {_duration(left)} left")
            publish()
        if stop():
            publish()
            say(f"stopped after {_duration(time.monotonic() - began)}; the same command goes on")
            sys.exit(stop.exit_code)
    return failed


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
