"""The card of an adapter file, read from its header alone: no tensors, no torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.errors import AdapterError
from studio.files import is_pickle

LONGEST_HEADER = 64 << 20
HEADER_KEY = "studio_card"


def read_card(path: Path) -> dict[str, Any]:
    """Raises AdapterError for what is no adapter of the studio."""
    try:
        return dict(_read(path, path.stat().st_mtime_ns))
    except OSError as error:
        raise AdapterError(f"cannot read '{path.name}': {error.strerror or error}") from None


@lru_cache(maxsize=1024)
def _read(path: Path, _changed: int) -> dict[str, Any]:
    if is_pickle(path):
        raise AdapterError(
            f"'{path.name}' is a pickle, not a safetensors file",
            "pickles can run code when they are opened, so the studio never does; convert it to safetensors",
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise AdapterError(f"'{path.name}' is damaged or no safetensors file", "copy or download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        card = json.loads(header.get("__metadata__", {}).get(HEADER_KEY, "null"))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise AdapterError(
            f"'{path.name}' is damaged: its header cannot be read", "copy or download it again"
        ) from None
    if 8 + length + max(ends, default=0) != size:
        raise AdapterError(f"'{path.name}' is damaged or truncated", "copy or download it again")
    if not isinstance(card, dict):
        raise AdapterError(f"'{path.name}' is a safetensors file, but no adapter of the studio: it has no card")
    return card
