"""Asks the warm drawing process, `studio.worker`, for pictures. Nothing here loads torch.

The process begins with the first request, keeps its base between requests and ends with the program that asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from studio.files import slugify
from studio.paths import studio_home

ROOT = Path(__file__).resolve().parent.parent


def pictures_dir() -> Path:
    """Where drawn pictures stay: `$STUDIO_HOME/pictures/<time>-<prompt>/NNN.png`."""
    return studio_home() / "pictures"


class Engine:
    """One drawing process and the turns at it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.turn = threading.Lock()
        self.current = ""

    def draw(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answers of `studio.worker` to a request, as they come. Waits its turn, and says so with a `note`."""
        if not self.turn.acquire(blocking=False):
            yield {"note": "Another drawing is being made; this one is next."}
            self.turn.acquire()
        try:
            yield from self._draw(request)
        finally:
            self.cancel()  # a listener that left early takes its request back
            self.turn.release()

    def _draw(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        process = self._worker()
        assert process.stdin is not None
        assert process.stdout is not None
        name = uuid.uuid4().hex
        folder = pictures_dir() / f"{time.strftime('%Y%m%d-%H%M%S')}-{slugify(request['prompt'])[:40]}-{name[:4]}"
        process.stdin.write(json.dumps({"folder": str(folder), **request, "id": name}) + "\n")
        process.stdin.flush()
        self.current = name
        for line in process.stdout:
            answer = json.loads(line)
            if answer.get("id") != name:
                continue  # the rest of a request that was taken back
            ended = "done" in answer or "error" in answer
            if ended:
                self.current = ""
            yield answer
            if ended:
                return
        self.current = ""
        yield {
            "error": "the drawing process has ended unexpectedly",
            "hint": "it may have run out of memory: try a smaller size, or stop the training first",
        }

    def cancel(self) -> None:
        """Takes the request that is being drawn back."""
        if self.current and self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.write(json.dumps({"cancel": self.current}) + "\n")
                self.process.stdin.flush()
        self.current = ""

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            self.process = None

    def _worker(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            log = studio_home() / "worker.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "studio.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                )
        return self.process
