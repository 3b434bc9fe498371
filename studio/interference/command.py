"""`studio inspect A B ...` behind the command line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from studio.base import Base
from studio.errors import RequestError
from studio.files import write_atomically
from studio.importing.opening import open_sources
from studio.importing.own import AdapterFile
from studio.interference.page import page
from studio.interference.report import Report
from studio.interference.survey import Progress, survey
from studio.merging.calibration import Calibration


def interference(
    names: Sequence[str], base: str | None = None, calibrate: bool = False, progress: Progress | None = None
) -> Report:
    """The report over adapters by name or file. Raises StudioError.

    The base is loaded where its weights say something; for files of other programs its outline does.
    """
    loaded: list[Base] = []

    def obtain(default: str = "") -> Base:
        if not loaded:
            from studio.bases.registry import load_base

            loaded.append(load_base(_called(base or default)))
        return loaded[0]

    def outlined(default: str = "") -> Base:
        from studio.bases.outline import outline

        return outline(_called(base or default))

    sources = open_sources(names, cache(outlined))
    if len({source.sha256 for source in sources}) < len(sources):
        raise RequestError("one of the adapters is named twice", "name each once")
    trained_on = next((str(found) for s in sources if (found := getattr(s, "trained_on", ""))), "")
    has_drift = base is not None and any(isinstance(source, AdapterFile) for source in sources)  # they have sketches
    if has_drift or calibrate or any(source.needs_weights for source in sources):
        obtain(trained_on)
    calibration = Calibration(obtain(trained_on), sources) if calibrate else None
    return survey(sources, loaded[0] if loaded else None, progress, calibration)


def _called(name: str) -> str:
    if not name:
        raise RequestError("files of other programs do not say which base they fit", "name it with --base")
    return name


def write_page(report: Report, path: Path, force: bool = False) -> None:
    """Raises RequestError for what exists, DiskError."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--html '{path}' is no HTML file", f"for example --html {path.stem}.html")
    if path.exists() and not force:
        raise RequestError(f"'{path}' exists already", "choose another, or add --force")
    write_atomically(path, page(report))
