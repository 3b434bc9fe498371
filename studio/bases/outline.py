"""Outlines of bases: every layer by name and shape, and no weights.

Enough to know which layers a LoRA file of another program means. Of a published model that is not on this disk the
configurations are known by heart, so an outline needs neither a download nor memory.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studio.base import Base
from studio.bases import folder, hub
from studio.bases.checkpoint import read_checkpoint
from studio.bases.published import configurations, write_configurations
from studio.bases.quiet import quiet_libraries
from studio.bases.registry import ALIASES, bundled, families, load_base


def outline(name: str) -> Base:
    """The base of this name without weights; whole where it is known only by them. Raises BaseError."""
    quiet_libraries()
    with _pipeline_folder(name) as path:
        if path is None:
            return load_base(name)
        known = {cls.pipeline_class: cls for cls in families().values()}
        family = known.get(folder.class_of(path))
        if family is None:
            return load_base(name)  # which says what it is instead
        index = json.loads((path / folder.INDEX).read_text(encoding="utf-8"))
        wanted = (family.denoiser_name, *family.text_encoder_names)
        parts = {part: _empty(library, cls, _place(path, part)) for part, library, cls in _of(index, path, wanted)}
    shown = name if name in bundled() or name in ALIASES else str(Path(name).expanduser().resolve())
    return family(shown, SimpleNamespace(components=parts))


@contextmanager
def _pipeline_folder(name: str) -> Iterator[Path | None]:
    """A folder with the configurations of a pipeline's parts, or None."""
    path = bundled().get(name) or Path(name).expanduser()
    alias = ALIASES.get(name)
    published = None
    if alias is not None:
        path = hub.cached(alias.repo) or Path()
        published = (name.removesuffix("-base"), alias.family) if alias.family != "musicgen" else None
    elif path.suffix == ".safetensors" and path.is_file():
        layout = read_checkpoint(path).layout
        published = layout.name, layout.family
    if (path / folder.INDEX).is_file() and path != Path():
        folder.open_folder(path)
        yield path
    elif published is not None:
        with tempfile.TemporaryDirectory(prefix="studio-outline-") as configs:
            write_configurations(configurations(published[0]), families()[published[1]].pipeline_class, Path(configs))
            yield Path(configs)
    else:
        yield None


def _of(index: dict[str, Any], path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    return (part for part in folder.parts_of(index, path) if part[0] in wanted)


def _place(path: Path, part: str) -> Path:
    """Where the configuration of a part lies: here, or with the base that this one shares it with."""
    own = path / part
    return own if own.is_dir() else bundled()[folder.shared_in(path)["base"]] / part


def _empty(library: str, class_name: str, place: Path) -> Any:
    from accelerate import init_empty_weights

    cls = getattr(importlib.import_module(library), class_name)
    with init_empty_weights():
        if library == "transformers":
            return cls(cls.config_class.from_pretrained(place))
        return cls.from_config(cls.load_config(place))
