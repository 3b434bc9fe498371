"""Which part of the picture is whose, at every size that the network works in, while it draws.

A part is a region or the background. N parts, h and w height and width of some layer's maps, T tokens of a picture
(h w, row by row), L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WEIGHT = 1e-6  # what is left of a weight of attention that is wholly taken away: finite in every dtype


@dataclass(frozen=True)
class Blend:
    """How regions meet. `feather` is a fraction of the picture's shorter side.

    In the first share `apart` of the steps the weight of self-attention between two regions is lowered by `distance`,
    a share of it again.
    """

    feather: float = 0.1
    apart: float = 0.8
    distance: float = 1.0


class Canvas:
    """`masks` (N, H, W), fp64, are a partition of unity; `regions` says which of the parts are no background.

    `size` is (h, w) of the maps whose tokens the network works on just now, `progress` in [0, 1) tells how far the
    drawing is; hooks keep both up to date (attention.py).
    """

    def __init__(self, masks: Tensor, regions: list[int], blend: Blend) -> None:
        self.masks = masks
        self.regions = regions
        self.blend = blend
        self.size = (0, 0)
        self.progress = 0.0
        self.shares = masks.mean((1, 2))
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def of_maps(self, like: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, h, w): the mean of each mask over each place, on the device and in the dtype of `like`."""
        return self._keep(("maps", size), like, lambda: F.adaptive_avg_pool2d(self.masks, size))

    def of_tokens(self, like: Tensor) -> Tensor:
        """(N, T) for the tokens of the maps that the network works on."""
        return self.of_maps(like, self.size).flatten(1)

    def of_texts(self, like: Tensor, tokens: int) -> Tensor:
        """(N, N L): the texts stand one after the other, each its own part's."""
        parts = len(self.masks)
        return self._keep(("texts", tokens), like, lambda: torch.eye(parts).repeat_interleave(tokens // parts, 1))

    def over(self, x: Tensor, owners: tuple[int, ...], text: bool) -> Tensor:
        """The masks of some parts, one for each channel of x or one for all, of a shape that multiplies it.

        x is (B, C, h, w), or (B, T, C), or (B, C) where a layer sees no places: there a part counts by its share of the
        picture. With `text` its tokens are those of the texts.
        """
        place = tuple(x.shape[2:]) if x.ndim == 4 else (x.ndim, x.shape[1] if text else self.size)
        return self._keep(("over", owners, place), x, lambda: self._over(x, owners, text))

    def _over(self, x: Tensor, owners: tuple[int, ...], text: bool) -> Tensor:
        if x.ndim == 4:
            return self.of_maps(x, (x.shape[2], x.shape[3]))[list(owners)]
        if x.ndim == 2:
            return self.shares[list(owners)]
        masks = self.of_texts(x, x.shape[1]) if text else self.of_tokens(x)
        assert masks.shape[1] == x.shape[1], "a layer whose tokens are neither of the maps nor of the texts"
        return masks[list(owners)].T

    def bias(self, like: Tensor) -> Tensor | None:
        """(T, T), added to the scores of self-attention; None once regions may look at each other."""
        if self.progress >= self.blend.apart or self.blend.distance == 0 or len(self.regions) < 2:
            return None
        return self._keep(
            ("bias", self.size), like, lambda: apart(self.of_tokens(like)[self.regions], self.blend.distance)
        )

    def _keep(self, key: tuple[Any, ...], like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (*key, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = make().to(like.device, like.dtype)
        return self._kept[key]


def apart(masks: Tensor, distance: float) -> Tensor:
    """(T, T) for masks (N, T): the logarithm of what is left of each weight of attention.

    Two tokens belong to different regions by sum_{i != j} m_i(p) m_j(q); the background belongs to all.
    """
    together = masks.sum(0)
    different = torch.outer(together, together) - masks.T @ masks
    return (1 - distance * different).clamp(min=LEAST_WEIGHT).log()
