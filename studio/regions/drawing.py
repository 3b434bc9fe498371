"""Regions put on a base: its masks, its texts, its attention and its layers; taken off again, all is as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from studio.attachment import Site, attach
from studio.base import Base
from studio.generation import Use, missing_triggers, wearing
from studio.patch import Patch
from studio.regions.attention import attending, attention_layers, text_readers
from studio.regions.canvas import Canvas
from studio.regions.layers import RegionPatch
from studio.regions.layout import Layout, Region
from studio.regions.masks import partition
from studio.regions.texts import reading

FINEST = 1024  # pixels


@contextmanager
def drawing(
    base: Base,
    layout: Layout,
    uses: Sequence[Use] = (),
    size: tuple[int | None, int | None] = (None, None),
) -> Iterator[list[str]]:
    """Inside, the base draws pictures of `size` = (width, height) by regions; the request's prompt is the background's.

    `uses` act on the whole picture, regions included. Yields warnings. Raises RequestError for a base or regions that
    cannot be, AdapterError for adapters that do not fit.
    """
    readers = text_readers(attention_layers(base))
    warnings = _checked(base, layout.regions, uses)
    masks = _masks(base, layout, size)
    parts = [None, *layout.regions] if masks[0].any() else [*layout.regions]  # None is the background
    canvas = Canvas(masks[-len(parts) :], [i for i, part in enumerate(parts) if part], layout.blend)
    with ExitStack() as stack:
        stack.enter_context(wearing(base, uses, only=(base.denoiser_name,)))
        stack.enter_context(attach(*_patches(base, canvas, parts, readers)))
        stack.enter_context(attending(base, canvas))
        stack.enter_context(reading(base, canvas, [_text(part, uses) for part in parts]))
        yield warnings


def _masks(base: Any, layout: Layout, size: tuple[int | None, int | None]) -> Tensor:
    """(1 + N, H, W), at the picture's own size up to a side that is finer than any latent's."""
    width, height = (side or base.resolution for side in size)
    scale = min(1.0, FINEST / max(width, height))
    sides = max(1, round(height * scale)), max(1, round(width * scale))
    shapes = [region.shape for region in layout.regions]
    return partition(shapes, *sides, layout.blend.feather, least=(base.latent_factor * scale) ** 2)


def _checked(base: Base, regions: Sequence[Region], uses: Sequence[Use]) -> list[str]:
    """Warnings about adapters that fit nearly; all are put on for a moment. Raises AdapterError, RequestError."""
    warnings: dict[str, None] = {}  # in order, each once
    for region in regions:
        with wearing(base, [*uses, *_own(region)]) as own:
            warnings |= dict.fromkeys((*own, *missing_triggers(region.prompt, _own(region))))
    return list(warnings)


def _own(part: Region | None) -> list[Use]:
    return [part.use] if part and part.use else []


def _text(part: Region | None, uses: Sequence[Use]) -> tuple[str | None, list[Use]]:
    """A part's prompt, None for the request's own, and the adapters that read it."""
    return part.prompt if part else None, [*uses, *_own(part)]


def _patches(
    base: Base, canvas: Canvas, parts: Sequence[Region | None], readers: set[Any]
) -> tuple[dict[str, Site], dict[str, list[Patch]]]:
    """What `attach` takes: one patch at each layer of the denoiser that any region changes."""
    sites = base.sites()
    terms: dict[str, list[tuple[int, Patch, float]]] = {}
    for index, part in enumerate(parts):
        for use in _own(part):
            for name, own in use.adapter.by_site().items():
                if sites[name].component == base.denoiser_name and use.weight != 0:
                    terms.setdefault(name, []).extend((index, patch, use.weight) for patch in own)
    patches: dict[str, list[Patch]] = {
        name: [RegionPatch(canvas, sites[name].shape, sites[name].module, own, sites[name].module in readers)]
        for name, own in terms.items()
    }
    return sites, patches
