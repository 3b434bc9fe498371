"""The studio's own commands, run apart, for answers that need torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from studio.errors import WorkError
from studio.jobs import ROOT


def ask(*arguments: str, seconds: float = 600) -> Any:
    """The JSON that `studio ARGUMENTS --json` prints. Raises WorkError with the command's own words."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "studio", *arguments, "--json"],
            env=environment, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise WorkError(f"'studio {arguments[0]}' took more than {seconds:.0f} seconds") from None
    if done.returncode:
        lines = {
            w: x.split(": ", 1)[-1]
            for x in done.stderr.splitlines()
            for w in ("error", "hint")
            if x[: len(w) + 1] == f"{w}:"
        }
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason was given")
        raise WorkError(lines.get("error", f"'studio {arguments[0]}' failed: {last[:300]}"), lines.get("hint", ""))
    return json.loads(done.stdout)
