"""Writing a large safetensors file tensor by tensor: the data goes to the disk at once, the header comes last."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from studio.errors import DiskError
from studio.files import disk_error

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}
NAMES |= {torch.uint8: "U8", torch.int8: "I8"}


class Spool:
    """Use it as a context manager: what is not finished leaves nothing behind. Raises DiskError.

    `header_bytes` are kept free in front for the header, which is padded with spaces; a longer one costs a copy of the
    data. Bytes depend on the tensors, their order, the header and this number alone.
    """

    def __init__(self, path: Path, expected_bytes: int = 0, header_bytes: int = 0) -> None:
        self.path = path
        self.entries: dict[str, dict] = {}
        self.written = 0
        self.room = header_bytes + -header_bytes % 8
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if expected_bytes > free:
                raise DiskError(
                    f"merging into '{path}' needs {expected_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                    "free some space, choose another folder, or ask for a lower --rank",
                )
            self.file = _temporary_beside(path)
            self.file.seek(8 + self.room)
        except OSError as error:
            raise disk_error(path, error) from error

    def add(self, name: str, value: Tensor) -> None:
        """Appends one tensor."""
        value = value.detach().cpu().contiguous()
        size = value.numel() * value.element_size()
        try:
            if size:
                self.file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.entries[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [self.written, self.written + size],
        }
        self.written += size

    def finish(self, header: Mapping[str, str]) -> None:
        """Puts the file in place: 8 bytes of length, the header as JSON padded to 8 bytes or the room, the data."""
        table = {"__metadata__": dict(sorted(header.items())), **self.entries}
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            if len(text) > self.room:
                self._move_data(len(text) + -len(text) % 8)
            self.file.seek(0)
            self.file.write(self.room.to_bytes(8, "little") + text.ljust(self.room))
            self.file.flush()
            os.fsync(self.file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(self.file.name).chmod(0o666 & ~mask)
            Path(self.file.name).replace(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def _move_data(self, room: int) -> None:
        wider = _temporary_beside(self.path)
        wider.seek(8 + room)
        self.file.seek(8 + self.room)
        shutil.copyfileobj(self.file, wider, 1 << 22)
        self.__exit__()
        self.file, self.room = wider, room

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        Path(self.file.name).unlink(missing_ok=True)


def _temporary_beside(path: Path) -> IO[bytes]:
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)


def header_bytes(names: Mapping[str, int], header: Mapping[str, str]) -> int:
    """How long the header of such tensors can become: names with their number of axes, 12 digits for each number."""
    fixed = len(json.dumps({"__metadata__": dict(header)}, ensure_ascii=False).encode())
    return fixed + sum(len(name.encode()) + 55 + 13 * (axes + 2) for name, axes in names.items())
