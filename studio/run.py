"""The run folder: the resolved preset, the stream of events, samples, checkpoints, and requests to a running job.

A run is readable without the program that wrote it: `events.jsonl` has one JSON object a line and is only ever
appended to, pictures are PNG, weights are safetensors. Writers are the training process alone; anyone may read.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.files import disk_error, write_atomically
from studio.process import identity, is_alive

OWNER = "owner"  # in control/: the process that works on the run


@dataclass(frozen=True)
class Event:
    """Something that happened at a step. `kind` and the fields of `data` are listed in the contract."""

    kind: str
    step: int
    data: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return json.dumps({"time": round(time.time(), 3), "step": self.step, "kind": self.kind, **self.data})


class Run:
    """A run folder on disk. Creating the object touches nothing; `prepare` makes the folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events_path = folder / "events.jsonl"
        self.preset_path = folder / "preset.yaml"
        self.samples = folder / "samples"
        self.checkpoints = folder / "checkpoints"
        self.control = folder / "control"
        self.adapter_path = folder / "adapter.safetensors"

    def prepare(self) -> None:
        """Makes the folders. Raises DiskError."""
        try:
            for path in (self.folder, self.samples, self.checkpoints, self.control):
                path.mkdir(parents=True, exist_ok=True)
            for request in self.control.iterdir():
                request.unlink()  # of an earlier process
        except OSError as error:
            raise disk_error(self.folder, error) from error
        write_atomically(self.control / OWNER, json.dumps(identity()))

    def is_live(self) -> bool:
        """Whether the process that works on this run is still there."""
        try:
            return is_alive(json.loads((self.control / OWNER).read_text()))
        except (OSError, json.JSONDecodeError):
            return False

    # -- events ------------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Adds a line to the stream; completes a line that a crash left torn. Raises DiskError."""
        try:
            with self.events_path.open("ab") as file:
                torn = file.tell() > 0 and not self._ends_with_newline()
                file.write((b"\n" if torn else b"") + event.line().encode() + b"\n")
        except OSError as error:
            raise disk_error(self.events_path, error) from error

    def _ends_with_newline(self) -> bool:
        with self.events_path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def events(self) -> Iterator[dict[str, Any]]:
        """The events in order; lines that are torn are left out."""
        if not self.events_path.exists():
            return
        with self.events_path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(event, dict) and "kind" in event:
                    yield event

    def history(self) -> list[dict[str, Any]]:
        """The events as they count: after `resumed`, later steps replace those of the same number."""
        kept: list[dict[str, Any]] = []
        for event in self.events():
            if event["kind"] == "resumed":
                start = event.get("from_step", 0)
                kept = [e for e in kept if e.get("step", 0) <= start or e["kind"] in ("started", "warning")]
            kept.append(event)
        return kept

    # -- control -----------------------------------------------------------------------------------------------

    def requested(self, what: str) -> bool:
        """Whether somebody asked the running job to `stop` or `sample`; asking once is answered once."""
        request = self.control / what
        if not request.exists():
            return False
        request.unlink(missing_ok=True)
        return True

    def request(self, what: str) -> None:
        self.control.mkdir(parents=True, exist_ok=True)
        (self.control / what).touch()

    # -- checkpoints -------------------------------------------------------------------------------------------

    def checkpoint_folders(self) -> list[Path]:
        """Complete checkpoints, oldest first. A folder is complete when it bears its final name."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def newest_checkpoint(self) -> Path:
        folders = self.checkpoint_folders()
        if not folders:
            raise RequestError(f"'{self.folder}' holds no checkpoint to resume from", "start it without --resume")
        return folders[-1]

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to write step `step` into; call `commit_checkpoint` when it is complete."""
        folder = self.checkpoints / f".step-{step}.partial"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        return folder

    def commit_checkpoint(self, partial: Path, step: int, kept: int) -> Path:
        """Gives a written checkpoint its final name and removes the oldest beyond `kept`."""
        final = self.checkpoints / f"step-{step}"
        try:
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        except OSError as error:
            raise disk_error(final, error) from error
        for old in self.checkpoint_folders()[:-kept]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def save_preset(self, text: str) -> None:
        write_atomically(self.preset_path, text)
