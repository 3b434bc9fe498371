"""A merge that is tried before it is kept. It lies in `$STUDIO_HOME/merges`, under a name made from all that it comes
from, so that what was merged or drawn once is shown again at once, after a refresh and in another tab too."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio import library
from studio.cards import read_card
from studio.errors import AdapterError, RequestError
from studio.files import slug, write_atomically
from studio.paths import studio_home

KEPT = 20  # merges that were tried and not kept


@dataclass(frozen=True)
class Blend:
    """What is merged and how. `options` are the strategy's own; None leaves rank or tolerance to `studio merge`."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: str = "auto"
    options: tuple[tuple[str, Any], ...] = ()
    rank: str | None = None
    tolerance: float | None = None
    seed: int = 0

    def paths(self) -> list[Path]:
        """The files. Raises RequestError for a name that the library does not have."""
        return [library.find(slug(name)) for name in self.names]

    @property
    def folder(self) -> Path:
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths()]
        return merges_dir() / hashlib.sha256(json.dumps([asdict(self), stamps]).encode()).hexdigest()[:16]

    def arguments(self, out: Path) -> list[str]:
        """The words after `studio`."""
        uses = [f"{name}:{weight:g}" for name, weight in zip(self.names, self.weights, strict=True)]
        words = ["merge", *uses, "--out", str(out), "--force", "--strategy", self.strategy, "--seed", str(self.seed)]
        for key, value in self.options:
            words += ["--option", f"{key}={json.dumps(value)}"]
        words += ["--rank", self.rank] if self.rank else []
        words += ["--tolerance", str(self.tolerance)] if self.tolerance is not None else []
        return words


def merges_dir() -> Path:
    return studio_home() / "merges"


@dataclass(frozen=True)
class Trial:
    """The folder of a blend: the merged file, the report of `studio merge`, pictures of it beside its parents'."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "merged.safetensors"

    def report(self) -> dict[str, Any]:
        """What `studio merge` said, or {}."""
        return _read(self.folder / "report.json") if self.file.exists() else {}

    def keep_report(self, report: dict[str, Any], names: Sequence[str]) -> None:
        write_atomically(self.folder / "report.json", json.dumps({**report, "names": list(names)}))
        _forget_old()

    def sheet(self) -> dict[str, Any]:
        """The pictures drawn last: `columns`, `rows` of [label, files or None]; or {}."""
        return _read(self.folder / "sheet.json")

    def keep_sheet(self, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path | None]]]) -> None:
        told = [[label, [str(path) if path else None for path in row]] for label, row in rows]
        write_atomically(self.folder / "sheet.json", json.dumps({"columns": list(columns), "rows": told}))

    def preview(self) -> Path | None:
        """The first picture drawn with the merge."""
        found = [row[-1] for _, row in self.sheet().get("rows", ()) if row and row[-1]]
        return Path(found[0]) if found else None


def trial_of(name: Any) -> Trial | None:
    """The trial that a browser names, if it is still there."""
    text = str(name or "")
    plain = len(text) == 16 and all(letter in "0123456789abcdef" for letter in text)
    trial = Trial(merges_dir() / text) if plain else None
    return trial if trial is not None and trial.report() else None


def trigger_of(name: str) -> str:
    """The word that calls an adapter of the library, or ""."""
    try:
        return str(read_card(library.find(name)).get("trigger", ""))
    except (AdapterError, RequestError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _forget_old() -> None:
    folders = sorted((f for f in merges_dir().iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
