"""Outlines of bases: every layer by name and shape, and no weights.

Enough to know which layers a LoRA file of another program means. The configurations of published models are known by
heart, so an outline of one that is not on this disk needs no download.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studio.base import Base
from studio.bases import folder, hub
from studio.bases.checkpoint import read_checkpoint
from studio.bases.published import configurations, text_configuration
from studio.bases.quiet import quiet_libraries
from studio.bases.registry import ALIASES, bundled, families, load_base


def outline(name: str) -> Base:
    """The base of this name without weights; whole where it is known only by them. Raises BaseError."""
    quiet_libraries()
    if (path := _pipeline_folder(name)) is not None:
        return _of_folder(path, name)
    if (published := _published(name)) is not None:
        return _of_published(*published, name)
    return load_base(name)


def _pipeline_folder(name: str) -> Path | None:
    """Where the base's configurations lie, if they are on this disk."""
    if name in ALIASES:
        path = hub.cached(ALIASES[name].repo)
    else:
        path = bundled().get(name) or Path(name).expanduser()
    return path if path is not None and (path / folder.INDEX).is_file() else None


def _published(name: str) -> tuple[str, str] | None:
    """The layout and the family of a model whose configurations are known."""
    path = Path(name).expanduser()
    if name in ALIASES:
        family = ALIASES[name].family
        return None if family == "musicgen" else (name.removesuffix("-base"), family)
    if path.suffix == ".safetensors" and path.is_file():
        layout = read_checkpoint(path).layout
        return layout.name, layout.family
    return None


def _of_folder(path: Path, name: str) -> Base:
    checked = folder.open_folder(path)
    family = next((cls for cls in families().values() if cls.pipeline_class == checked.pipeline_class), None)
    if family is None:
        return load_base(name)  # which says what it is instead
    index = json.loads((path / folder.INDEX).read_text(encoding="utf-8"))
    parts = {
        part: _empty(library, class_name, _place(path, part))
        for part, library, class_name in folder.parts_of(index, path)
        if part in (family.denoiser_name, *family.text_encoder_names)
    }
    return _base(family, name, parts)


def _of_published(layout: str, family_name: str, name: str) -> Base:
    family = families()[family_name]
    known = configurations(layout)
    wanted = (family.denoiser_name, *family.text_encoder_names)
    return _base(family, name, {part: _empty(*known[part]) for part in wanted if part in known})


def _base(family: type[Base], name: str, parts: dict[str, Any]) -> Base:
    shown = name if name in bundled() or name in ALIASES else str(Path(name).expanduser().resolve())
    return family(shown, SimpleNamespace(components=parts))


def _place(path: Path, part: str) -> Path:
    """Where the configuration of a part lies: here, or with the base that this one shares it with."""
    own = path / part
    return own if own.is_dir() else bundled()[folder.shared_in(path)["base"]] / part


def _empty(library: str, class_name: str, config: Path | dict[str, Any]) -> Any:
    """A network of that configuration, or of the one in that folder, whose weights take no memory."""
    from accelerate import init_empty_weights

    cls = getattr(importlib.import_module(library), class_name)
    with init_empty_weights():
        if library != "transformers":
            return cls.from_config(config if isinstance(config, dict) else cls.load_config(config))
        if isinstance(config, dict):
            return cls(text_configuration(config))
        return cls(cls.config_class.from_pretrained(config))
