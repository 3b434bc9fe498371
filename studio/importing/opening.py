"""Opening any file of weight changes: the studio's own, or another program's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studio import library
from studio.adapter import HEADER_KEY
from studio.base import Base
from studio.errors import AdapterError
from studio.importing.foreign import ForeignFile
from studio.importing.own import AdapterFile
from studio.importing.peft import CONFIG_NAME, WEIGHTS_NAMES
from studio.importing.source import Source
from studio.importing.tensor_file import TensorFile

GetBase = Callable[[str], Base]  # asked with the base that the studio's own files name, or ""


@dataclass(frozen=True)
class _Found:
    name: str
    file: TensorFile
    config: Path | None = None  # of PEFT

    @property
    def is_own(self) -> bool:
        return HEADER_KEY in self.file.header


def open_sources(names: Sequence[str], base: GetBase) -> list[Source]:
    """The adapters of these names in the library, or files, or PEFT folders, in the same order.

    `base` is asked for the base only where a file is another program's. Raises AdapterError, RequestError.
    """
    found = [_find(name) for name in names]
    own = {number: AdapterFile(f.name, f.file) for number, f in enumerate(found) if f.is_own}
    default = next((source.trained_on for source in own.values()), "")
    return [
        own[number] if number in own else ForeignFile(f.name, f.file, base(default), f.config)
        for number, f in enumerate(found)
    ]


def _find(name: str) -> _Found:
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "adapter.safetensors").exists():
        path = next((folder / weights for weights in WEIGHTS_NAMES if (folder / weights).is_file()), None)
        if path is None:
            raise AdapterError(f"there is no LoRA in the folder '{name}'", f"it would be called {WEIGHTS_NAMES[0]}")
        config = folder / CONFIG_NAME
        return _Found(folder.name, TensorFile(path), config if config.is_file() else None)
    path = library.find(name)
    return _Found(path.stem, TensorFile(path))
