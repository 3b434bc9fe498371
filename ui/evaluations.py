"""The cards that `studio evaluate` leaves: where they are, and asking for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studio import jobs, library
from studio.errors import RequestError
from studio.files import slug
from studio.jobs import Job
from studio.library import Entry
from studio.paths import studio_home
from studio.run import Run


def card_folder(entry: Entry) -> Path:
    """Where the card of an adapter belongs: in its run's folder, else in the home."""
    run = entry.facts.get("run") or ""
    if run and Run(Path(run)).events_path.exists():
        return Path(run) / "evaluation"
    return studio_home() / "evaluations" / entry.name


def card_of(entry: Entry) -> dict[str, Any]:
    """The card of an adapter, or {}."""
    try:
        card = json.loads((card_folder(entry) / "card.json").read_text())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and isinstance(card.get("figures"), dict) else {}


def evaluated() -> dict[str, dict[str, Any]]:
    """The cards of the library's adapters by name, those made last first."""
    found = [(entry, card) for entry in library.entries() if (card := card_of(entry))]
    found.sort(key=lambda pair: (card_folder(pair[0]) / "card.json").stat().st_mtime, reverse=True)
    return {entry.name: card for entry, card in found}


def evaluation_jobs() -> list[Job]:
    """Those that wait, run or ended lately, newest first."""
    found = [job for job in jobs.jobs() if job.arguments[:1] == ("evaluate",)]
    return sorted(found, key=lambda job: job.added, reverse=True)


def evaluate(name: str, steps: int) -> Job:
    """Queues the evaluation of an adapter. Raises RequestError if it waits or runs already."""
    entry = next((entry for entry in library.entries() if entry.name == slug(name)), None)
    if entry is None:
        raise RequestError(f"there is no adapter '{name}'", "reload the page")
    title = f"evaluate {name}"
    if any(job.title == title and job.state() in ("queued", "working", "paused") for job in evaluation_jobs()):
        raise RequestError(f"'{name}' is being evaluated already")
    folder = card_folder(entry)
    arguments = ["evaluate", name, "--steps", str(steps), "--out", str(folder)]
    job = jobs.submit(arguments, folder, folder / "card.json", title)
    jobs.advance()
    return job
