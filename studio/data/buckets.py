"""Buckets: a few shapes of about the same area, so that pictures keep their aspect ratio and still fit in a batch.

All sizes are (width, height) in pixels. NovelAI 2022, "Improvements on Stable Diffusion", section on bucketing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]

WIDEST = 2.0  # buckets lie between 1:2 and 2:1
AREA_TOLERANCE = 0.25  # how far from resolution^2; only coarse grids (few multiples a side) come near it


def square(resolution: int, multiple: int) -> Size:
    """The square bucket: the side nearest to `resolution` that is a multiple of `multiple`."""
    side = max(1, math.floor(resolution / multiple + 0.5)) * multiple
    return side, side


def bucket_table(resolution: int, multiple: int) -> list[Size]:
    """The buckets from tall to wide; sides are multiples of `multiple`, areas about resolution^2."""
    area = square(resolution, multiple)[0] ** 2
    found = {square(resolution, multiple)}
    for long in range(multiple, math.floor(math.sqrt(WIDEST * area) / multiple + 1) * multiple + 1, multiple):
        short = max(1, math.floor(area / long / multiple + 0.5)) * multiple
        ratio = max(long, short) / min(long, short)
        if ratio <= WIDEST and abs(long * short / area - 1) <= AREA_TOLERANCE:
            found |= {(long, short), (short, long)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, table: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size`, by the logarithm of the ratios."""
    return min(table, key=lambda bucket: abs(math.log(size[0] * bucket[1] / (size[1] * bucket[0]))))


def crop_box(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest part in the middle of `size` that has the bucket's ratio."""
    (w, h), (W, H) = size, bucket
    scale = min(w / W, h / H)
    left, top = max(0.0, (w - W * scale) / 2), max(0.0, (h - H * scale) / 2)
    return left, top, w - left, h - top


def kept_fraction(size: Size, bucket: Size) -> float:
    """The fraction in (0, 1] of a picture's area that is left after `crop_box`."""
    left, top, right, bottom = crop_box(size, bucket)
    return (right - left) * (bottom - top) / (size[0] * size[1])
