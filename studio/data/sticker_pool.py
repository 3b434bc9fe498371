"""Training data from the sticker world: pictures rendered on the fly, and a pool of them kept encoded.

What a pool holds at a step is a function of (seed, step) alone, so a resumed run finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studio.data import stickers
from studio.keyed import numpy_generator


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size as (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(
    key: tuple[object, ...], resolution: int, splits: str, alone: float = 0.0, fill: float | None = None
) -> tuple[Image.Image, str]:
    """(picture, caption) for a key."""
    rng = numpy_generator("sticker", *key)
    picture, caption, _ = stickers.sample(rng, resolution, stickers.glyphs(*splits.split("+")), alone, fill)
    return picture, caption


def draw_crop(key: tuple[object, ...], resolution: int, splits: str, side: int) -> Image.Image:
    """A random crop of a random picture."""
    picture, _ = draw(key, resolution, splits)
    left, top = numpy_generator("crop", *key).integers(0, resolution - side + 1, 2)
    return picture.crop((left, top, left + side, top + side))


class StickerPool:
    """`size` encoded pictures with their captions, of which `refresh` are redrawn at each step, in turn."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        picture: Callable[[tuple[object, ...]], tuple[Image.Image, str]],
        size: int,
        refresh: int,
        seed: int,
    ) -> None:
        self.encode, self.picture = encode, picture
        self.size, self.refresh, self.seed = size, refresh, seed
        self.versions = [-1] * size
        self.captions = [""] * size
        self.latents: Tensor | None = None

    def batch(self, step: int, micro: int, slots: range) -> tuple[Tensor, list[str]]:
        """Latents (B, C, H, W) and captions of the samples in these slots of a step."""
        self._bring_to(step)
        assert self.latents is not None
        chosen = [int(numpy_generator("pool slot", self.seed, step, micro, slot).integers(self.size)) for slot in slots]
        return self.latents[chosen], [self.captions[i] for i in chosen]

    def _bring_to(self, step: int) -> None:
        drawn = step * self.refresh  # draws so far, beyond the first filling
        wanted = [(drawn - 1 - i) // self.size + 1 if drawn > i else 0 for i in range(self.size)]
        stale = [i for i in range(self.size) if self.versions[i] != wanted[i]]
        for start in range(0, len(stale), 64):
            part = stale[start : start + 64]
            pairs = [self.picture((self.seed, i, wanted[i])) for i in part]
            with torch.no_grad():
                latents = self.encode(to_pixels([picture for picture, _ in pairs])).float().cpu()
            if self.latents is None:
                self.latents = torch.zeros(self.size, *latents.shape[1:])
            self.latents[part] = latents
            for i, (_, caption) in zip(part, pairs, strict=True):
                self.captions[i], self.versions[i] = caption, wanted[i]
