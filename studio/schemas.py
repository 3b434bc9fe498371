"""Schemas, presets and bases as plain data, for programs that must not wait for torch.

They are gathered by a process of its own, `python -m studio.schemas`, and kept in `$STUDIO_HOME/cache` until a file
that they come from changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import studio
from studio.errors import WorkError
from studio.files import write_atomically
from studio.paths import data_root, presets_dir, studio_home

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "studio/method.py", "studio/preset.py", "studio/schemas.py", "studio/bases/*.py", "studio/merging/*.py",
    "trainers/**/*.py",
)  # fmt: skip


def schemas() -> dict[str, Any]:
    """`preset` (schema), `methods` (by kind: schema, sentence, paper, rate), `presets` (by name), `bases` (rows),
    `strategies` (of merging, by name: summary, schema). Not to be changed by who asks.

    Raises WorkError if they cannot be gathered.
    """
    with _turn:  # whoever comes while they are gathered waits for the same answer
        home = studio_home()
        if home not in _kept:
            _kept.clear()
            _kept[home] = _read_or_gather(home / "cache" / f"schemas-{_key()}.json")
        return _kept[home]


_turn = threading.Lock()
_kept: dict[Path, dict[str, Any]] = {}  # for the life of the process: forms were built from it


def _read_or_gather(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        found = _gather_apart()
        write_atomically(path, json.dumps(found))
        return found


def _key() -> str:
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    files += [*sorted(presets_dir().glob("*.yaml")), *sorted((data_root() / "assets" / "bases").glob("*"))]
    lines = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([studio.__version__, *lines]).encode()).hexdigest()[:16]


def _gather_apart() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "studio.schemas"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise WorkError(f"the settings could not be read: {last}", "'studio methods' shows where it fails")
    return json.loads(done.stdout)


def gather() -> dict[str, Any]:
    """The same, computed here; loads torch."""
    from studio.bases.registry import bases
    from studio.merging import strategies
    from studio.method import PatchMethod, methods
    from studio.preset import Preset, make_preset, preset_files, read_preset

    return {
        "preset": Preset.model_json_schema(),
        "methods": {
            kind: {
                "schema": cls.model_json_schema(),
                "sentence": (cls.__doc__ or kind).strip().splitlines()[0],
                "paper": cls.paper,
                "learning_rate": cls.learning_rate,
                "adapts": issubclass(cls, PatchMethod),
            }
            for kind, cls in methods().items()
        },
        "presets": {name: make_preset(read_preset(name)).model_dump(mode="json") for name in preset_files()},
        "bases": bases(),
        "strategies": {
            name: {"summary": found.summary, "schema": found.settings.model_json_schema()}
            for name, found in strategies().items()
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(gather()))
