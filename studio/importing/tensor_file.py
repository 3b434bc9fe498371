"""A safetensors file read one tensor at a time.

Tensors are read into memory of their own and not mapped: what a program holds of a large file is then what it asked
for, and a limit on memory means something.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from studio.adapter import refuse_pickle
from studio.errors import AdapterError
from studio.files import sha256_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header tells it; `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class TensorFile:
    """`header` holds the strings, `entries` the tensors by name. Raises AdapterError for a file that cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.entries = _read_header(path)

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    def read(self, name: str) -> Tensor:
        """One tensor, in the precision of the file. Raises AdapterError if it holds NaN or infinity."""
        entry = self.entries[name]
        data = bytearray(entry.stop - entry.start)
        try:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                if file.readinto(data) != len(data):
                    raise AdapterError(f"'{self.path}' is truncated", "copy or download it again")
        except OSError as error:
            raise AdapterError(f"cannot read '{self.path}': {error.strerror or error}") from None
        if not data:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        value = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        if not all_finite(value.float() if value.is_floating_point() else value):  # fp8 knows no arithmetic
            raise AdapterError(f"'{self.path}' holds values that are not finite, in '{name}'", "use an earlier file")
        return value

    def floats(self, name: str) -> Tensor:
        """One tensor in fp32, or fp64 where the file has that."""
        value = self.read(name)
        return value if value.dtype == torch.float64 else value.float()


def all_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: a sum has what its numbers have, and is cheap to look at."""
    if not value.is_floating_point() or bool(value.sum().isfinite()):
        return True
    return bool(value.isfinite().all())


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:  # checks lengths, offsets and gaps
            header = dict(file.metadata() or {})
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            table: Mapping[str, dict] = json.loads(stream.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"'{path}' is damaged or truncated: {error}", "copy or download it again") from None
    entries = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise AdapterError(f"'{path}' holds '{name}' as {entry['dtype']}, which the studio does not read")
        start, stop = entry["data_offsets"]
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + stop)
    return header, entries
