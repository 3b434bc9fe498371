"""Safetensors files whose bytes depend on their content alone: the library shuffles a header of several strings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from studio.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a file: 8 bytes of length, a JSON header padded to 8 bytes, the data. Raises DiskError."""
    plain = save(dict(tensors))
    length = int.from_bytes(plain[:8], "little")
    entries = {"__metadata__": dict(sorted(header.items())), **json.loads(plain[8 : 8 + length])}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + plain[8 + length :])


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file's data, as modelspec and the web UIs count it: without the header."""
    plain = save(dict(tensors))
    return hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
