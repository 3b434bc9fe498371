"""`studio doctor`: what this machine has, what is missing, and the fix for each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tensorly", "numpy", "Pillow")


def diagnose() -> list[dict[str, Any]]:
    """Rows of part, state ("ok", "missing", "note"), found, fix."""
    rows = [
        _row("python", "ok" if sys.version_info >= (3, 11) else "missing", platform.python_version(), "install 3.11+")
    ]
    rows += [_package(name) for name in PACKAGES]
    rows += [_device(), _attention(), _font(), _threads(), _space(), _offline()]
    return rows


def _row(part: str, state: str, found: str, fix: str = "") -> dict[str, Any]:
    return {"part": part, "state": state, "found": found, "fix": "" if state == "ok" else fix}


def _package(name: str) -> dict[str, Any]:
    try:
        return _row(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _row(name, "missing", "not installed", f"pip install '{name}'")


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return _row("device", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return _row("device", "note", f"CPU, {os.cpu_count()} cores", "a CUDA GPU is only needed for large bases")


def _attention() -> dict[str, Any]:
    import torch

    if importlib.util.find_spec("xformers") is None:
        return _row("attention", "note", "sdpa", "on a GPU: make studio GPU=1 installs xformers")
    if not torch.cuda.is_available():
        return _row("attention", "note", "sdpa; xformers is installed but needs a GPU", "nothing to do on a CPU")
    return _row("attention", "ok", "xformers")


def _font() -> dict[str, Any]:
    from studio.data.stickers import font_path

    path = font_path()
    fix = "only for training or measuring the sticker base: install fonts-noto-color-emoji"
    return _row("emoji font", "ok" if path else "note", str(path or "not installed"), fix)


def _threads() -> dict[str, Any]:
    import torch

    return _row("threads", "ok", f"{torch.get_num_threads()} for torch on {os.cpu_count()} cores")


def _space() -> dict[str, Any]:
    from studio.paths import studio_home

    home = studio_home()
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    writable = os.access(place, os.W_OK)
    state = "ok" if free > 1 and writable else "missing"
    found = f"{home}: {free:.0f} GB free" + ("" if writable else ", not writable")
    return _row("studio home", state, found, "set STUDIO_HOME to a folder with space")


def _offline() -> dict[str, Any]:
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    return _row("model hub", "note" if offline else "ok", "offline" if offline else "allowed", "unset HF_HUB_OFFLINE")
