"""Tensors that are computed once and kept on disk, keyed by what they were computed from.

One safetensors file per key, named by the key's hash, with a checksum of the tensors in its header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from studio.errors import DiskError
from studio.files import write_atomically

CHECKSUM = "sha256"


class Cache:
    """A folder of tensors, made when first needed. A disk that cannot be written to costs memory, and never a run.

    `warnings` tells when that has happened, once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.warnings: list[str] = []

    def path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of `key`, on the CPU, which are the caller's own: from disk, else from `compute`."""
        found = self.memory.get(key)
        if found is None:
            found = _read(self.path(key))
        if found is None:
            found = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
            self._keep(key, found)
        return {name: tensor.clone() for name, tensor in found.items()}

    def _keep(self, key: str, tensors: dict[str, Tensor]) -> None:
        if not self.warnings:
            try:
                write_atomically(self.path(key), _packed(tensors))
                return
            except (DiskError, OSError) as error:
                self.warnings.append(
                    f"encoded data stay in memory, and are computed anew by the next run, for {error}; "
                    "free some space or let STUDIO_HOME name another folder"
                )
        self.memory[key] = tensors


def _packed(tensors: dict[str, Tensor]) -> bytes:
    checksum = _checksum(*_parts(to_bytes(tensors)))
    return to_bytes(tensors, {CHECKSUM: checksum})


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, values) of a safetensors file: the header's length as 8 bytes, little end first, JSON, values."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _checksum(header: dict[str, Any], values: bytes) -> str:
    """Over names, types, shapes and values, and not over the header's notes, where it stands itself."""
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode() + values).hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors, or None where there is no such file, or one that is damaged in any way."""
    try:
        content = path.read_bytes()
        header, values = _parts(content)
        if header["__metadata__"][CHECKSUM] != _checksum(header, values):
            return None
        return from_bytes(content)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
