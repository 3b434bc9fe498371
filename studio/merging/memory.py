"""How much memory a merge may take and how much it will: known from the headers, before anything is computed."""

from __future__ import annotations

import re
from pathlib import Path

from studio.errors import RequestError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
FLOAT = 4  # bytes; the arithmetic is in fp32, small matrices in fp64


def parse_bytes(text: str) -> int:
    """`2GiB`, `500MB`, `1.5G` as bytes. Raises RequestError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]i?)?b?\s*", text.lower())
    try:
        return int(float(found[1]) * UNITS[found[2] or ""])  # type: ignore[index]
    except (TypeError, ValueError):
        raise RequestError(f"'{text}' is no amount of memory", "for example --max-ram 2GiB") from None


def resident_bytes() -> int:
    """What this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 400 << 20  # torch and its libraries, where the system does not tell
    import resource

    return pages * resource.getpagesize()


def estimate(own: int, dense: int, count: int, elementwise: bool, compressed: bool, square: int) -> int:
    """Bytes at the peak of merging one weight.

    `own` numbers in the files, `dense` numbers of the weight, `count` adapters, `square` the shorter side squared.
    """
    numbers = 3 * own  # as read, scaled, and put together
    if elementwise:
        numbers += 4 * dense + 3 * (1 << 23)  # result, one adapter and its magnitudes; blocks of all adapters
    if compressed:
        numbers += dense + 6 * square  # Gram matrix and its eigenvectors in fp64
    return numbers * FLOAT
