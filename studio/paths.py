"""Where things lie: the data that ships with the code, and the user's home of runs and adapters."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path:
    """The folder that holds `assets/` and `presets/`: the checkout, or what an installed wheel brought along."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "presets").is_dir() else package / "_data"


def assets_dir() -> Path:
    return data_root() / "assets"


def presets_dir() -> Path:
    return data_root() / "presets"


def studio_home() -> Path:
    """`$STUDIO_HOME`, by default `~/.studio`. Nothing is created by asking."""
    return Path(os.environ.get("STUDIO_HOME") or Path.home() / ".studio").expanduser()
