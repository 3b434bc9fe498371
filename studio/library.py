"""The library: finished adapters on disk, by name, under `$STUDIO_HOME/library`.

An entry is `NAME.safetensors`, beside it `NAME.json` (notes, where it came from) and `NAME.png` (a preview).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.errors import RequestError, nearest
from studio.files import disk_error, slug, write_atomically
from studio.paths import studio_home


@dataclass(frozen=True)
class Entry:
    """An adapter of the library."""

    name: str
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def library_dir() -> Path:
    return Path(os.environ.get("STUDIO_LIBRARY") or studio_home() / "library")


def runs_dir() -> Path:
    return studio_home() / "runs"


def entries() -> list[Entry]:
    """All adapters of the library, by name."""
    return [Entry(path.stem, path, facts_of(path)) for path in sorted(library_dir().glob("*.safetensors"))]


def facts_of(path: Path) -> dict[str, Any]:
    """What the library knows of the adapter in this file, beyond its card."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
    except (OSError, json.JSONDecodeError):
        facts = {}
    return facts if isinstance(facts, dict) else {}


def find(name: str) -> Path:
    """The file of an adapter, given by its name in the library or by path. Raises RequestError."""
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" or path.exists():
        if path.is_dir() and (path / "adapter.safetensors").exists():
            return path / "adapter.safetensors"  # a run's folder
        if not path.is_file():
            raise RequestError(f"there is no adapter file '{name}'")
        return path
    stored = library_dir() / f"{name}.safetensors"
    if "/" in name or not stored.exists():
        raise RequestError(f"there is no adapter '{name}'", nearest(name, [entry.name for entry in entries()]))
    return stored


def free_name(wanted: str) -> str:
    """`wanted`, or with the first number that makes it new: cat, cat-2, cat-3."""
    taken = {entry.name for entry in entries()}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def add(name: str, source: Path, facts: dict[str, Any], preview: Path | None = None) -> Path:
    """Copies an adapter into the library under `name`, replacing one of that name. Raises DiskError."""
    target = library_dir() / f"{slug(name)}.safetensors"
    try:
        write_atomically(target, source.read_bytes())
        write_atomically(target.with_suffix(".json"), json.dumps({"added": round(time.time()), **facts}))
        if preview is not None and preview.exists():
            shutil.copyfile(preview, target.with_suffix(".png"))
    except OSError as error:
        raise disk_error(target, error) from error
    return target


def remove(name: str) -> None:
    path = _stored(name)
    for suffix in (".safetensors", ".json", ".png"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def rename(name: str, new: str) -> None:
    path = _stored(name)
    if (library_dir() / f"{slug(new)}.safetensors").exists():
        raise RequestError(f"there is already an adapter '{new}'", "remove it first, or choose another name")
    for suffix in (".json", ".png", ".safetensors"):
        if path.with_suffix(suffix).exists():
            path.with_suffix(suffix).rename(library_dir() / f"{new}{suffix}")


def note(name: str, text: str) -> None:
    path = _stored(name)
    write_atomically(path.with_suffix(".json"), json.dumps({**facts_of(path), "note": text}))


def _stored(name: str) -> Path:
    path = library_dir() / f"{slug(name)}.safetensors"
    if not path.exists():
        raise RequestError(f"there is no adapter '{name}'", nearest(name, [entry.name for entry in entries()]))
    return path


# -- runs ------------------------------------------------------------------------------------------------------


def register_run(folder: Path) -> None:
    """Remembers a run that lies elsewhere, so that lists and the browser find it."""
    folder = folder.resolve()
    if folder.parent != runs_dir().resolve():
        known = _elsewhere()
        write_atomically(studio_home() / "runs-elsewhere.json", json.dumps(sorted({*known, str(folder)})))


def _elsewhere() -> list[str]:
    try:
        return list(json.loads((studio_home() / "runs-elsewhere.json").read_text()))
    except (OSError, json.JSONDecodeError):
        return []


def run_folders() -> list[Path]:
    """All known run folders that still exist, newest first."""
    inside = runs_dir().iterdir() if runs_dir().is_dir() else []
    folders = [*inside, *map(Path, _elsewhere())]
    found = [folder for folder in folders if (folder / "events.jsonl").exists()]
    return sorted(found, key=lambda folder: (folder / "events.jsonl").stat().st_mtime, reverse=True)
