"""Regions as soft masks. N regions; H, W height and width in pixels; masks are in [0, 1].

Together with the background, which is the rest, they are a partition of unity: at every pixel they add up to 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from studio.data.masks import read_mask
from studio.errors import RequestError

EXACT = 1e-6  # masks are 0 and 1 exactly where rounding has left less than this


@dataclass(frozen=True)
class Box:
    """A rectangle in fractions of the picture: left, top, right, bottom."""

    x0: float
    y0: float
    x1: float
    y1: float

    def mask(self, height: int, width: int) -> Tensor:
        """(H, W): the share of each pixel that lies inside."""
        return _covered(self.y0, self.y1, height)[:, None] * _covered(self.x0, self.x1, width)

    def facts(self) -> dict[str, Any]:
        return {"box": [self.x0, self.y0, self.x1, self.y1]}


def _covered(start: float, stop: float, cells: int) -> Tensor:
    """The share of each of the cells of [0, 1] that lies in [start, stop]."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64).clamp(start, stop)
    return (edges[1:] - edges[:-1]) * cells


@dataclass(frozen=True)
class Painted:
    """A grey picture, stretched over the whole: white is inside. Raises DataError, RequestError where it is used."""

    path: Path

    def mask(self, height: int, width: int) -> Tensor:
        grey = read_mask(self.path, str(self.path))
        array = np.asarray(grey, np.float64) / 255  # in PIL's own 8 bits the mean of a few white pixels would be 0
        mask = torch.from_numpy(array)[None, None]
        if mask.max() == 0:
            raise RequestError(f"the mask '{self.path}' is black all over", "paint white where the region is")
        return F.interpolate(mask, (height, width), mode="area")[0, 0]

    def facts(self) -> dict[str, Any]:
        return {"mask": self.path.name, "mask_sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}


def partition(shapes: list[Box | Painted], height: int, width: int, feather: float, least: float = 1.0) -> Tensor:
    """(1 + N, H, W) in fp64: the background, then each shape. Where several meet, each has its share.

    `feather` is the width over which a region fades, as a fraction of the picture's shorter side; the picture's own
    borders do not fade. Raises RequestError for a region of less than `least` pixels.
    """
    masks = torch.stack([shape.mask(height, width) for shape in shapes])
    for shape, mask in zip(shapes, masks, strict=True):
        if mask.sum() < least:
            raise RequestError(
                f"the region {_told(shape)} has next to no area: less than the network's smallest part of a picture",
                "make it larger",
            )
    soft = _feathered(masks, round(feather * min(height, width)))
    regions = soft / soft.sum(0).clamp(min=1)
    rest = 1 - regions.sum(0)
    return _snapped(torch.cat([rest[None], regions]))


def _told(shape: Box | Painted) -> str:
    if isinstance(shape, Painted):
        return f"'{shape.path}'"
    return ",".join(f"{value:g}" for value in (shape.x0, shape.y0, shape.x1, shape.y1))


def _feathered(masks: Tensor, pixels: int) -> Tensor:
    """Smoothed along both axes by a raised cosine: beyond `pixels` / 2 of an edge nothing changes."""
    if pixels < 2:
        return masks
    kernel = torch.hann_window(2 * (pixels // 2) + 3, periodic=False, dtype=masks.dtype)[1:-1]
    kernel, side = kernel / kernel.sum(), len(kernel) // 2
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        around = (side, side, 0, 0) if shape[-1] == -1 else (0, 0, side, side)
        masks = F.conv2d(_extended(masks, around)[:, None], kernel.view(shape))[:, 0]
    return masks


def _extended(masks: Tensor, around: tuple[int, int, int, int]) -> Tensor:
    """The border's values carried on beyond it, hence a region at the border keeps its strength there."""
    return F.pad(masks[None], around, mode="replicate")[0]


def _snapped(masks: Tensor) -> Tensor:
    masks = masks.where(masks > EXACT, 0)
    return masks.where(masks < 1 - EXACT, 1)
