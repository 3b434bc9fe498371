"""Which process is which: a process id is used again, so a process is known by its id and the time it began."""

from __future__ import annotations

import os
from typing import Any

CLOCK_TOLERANCE_SECONDS = 0.05


def identity(pid: int | None = None) -> dict[str, Any]:
    """`{"pid", "began"}` of a process, by default this one; `began` is None for one that has gone already."""
    import psutil

    pid = os.getpid() if pid is None else pid
    try:
        return {"pid": pid, "began": psutil.Process(pid).create_time()}
    except psutil.Error:
        return {"pid": pid, "began": None}


def is_alive(who: Any) -> bool:
    """Whether the process of this `identity` still works: not another one of its number, and no zombie."""
    import psutil

    if not isinstance(who, dict) or not isinstance(who.get("pid"), int) or not isinstance(who.get("began"), float):
        return False
    try:
        process = psutil.Process(who["pid"])
        same = abs(process.create_time() - who["began"]) < CLOCK_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
