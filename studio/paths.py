"""Where things lie: the data that ships with the code, and the user's home of runs and adapters."""

from __future__ import annotations

import os
from pathlib import Path


def project_root() -> Path:
    """The folder that holds `assets/` and `presets/`: the checkout."""
    return Path(__file__).resolve().parent.parent


def assets_dir() -> Path:
    return project_root() / "assets"


def presets_dir() -> Path:
    return project_root() / "presets"


def studio_home() -> Path:
    """`$STUDIO_HOME`, by default `~/.studio`. Nothing is created by asking."""
    return Path(os.environ.get("STUDIO_HOME") or Path.home() / ".studio").expanduser()
