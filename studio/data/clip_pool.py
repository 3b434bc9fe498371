"""Clips kept encoded: latents, captions, rates. What a pool holds at a step is a function of (seed, step) alone.

Clips are sorted by their number of frames, so that a batch can be of one length and cost no more than it needs.
Z latent channels, n frames, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from studio.data.clips import Clip
from studio.keyed import numpy_generator


@dataclass(frozen=True)
class EncodedClip:
    """Latents (Z, n, h, w); `energy` is the mean change from frame to frame, 0 for a still."""

    latents: Tensor
    caption: str
    fps: float
    loop: bool
    energy: float

    @property
    def count(self) -> int:
        return self.latents.shape[1]


def encoded(clip: Clip, caption: str, encode: Callable[[Clip], Tensor]) -> EncodedClip:
    """`encode` gives latents (n, Z, h, w) of a clip's frames."""
    with torch.no_grad():
        latents = encode(clip).float().cpu().transpose(0, 1).contiguous()
    energy = float(latents.diff(dim=1).abs().mean()) if latents.shape[1] > 1 else 0.0
    return EncodedClip(latents, caption, clip.fps if latents.shape[1] > 1 else 0.0, clip.loop, energy)


def long_tailed_lengths(count: int, most: int, stills: float, seed: int) -> list[int]:
    """Numbers of frames for `count` clips: a share of stills, the rest 2 to `most`, half of them the longest."""
    rng = numpy_generator("clip lengths", seed)
    longer = np.arange(2, most + 1)
    weights = np.full(len(longer), 0.5 / max(1, len(longer) - 1))
    if len(longer):
        weights[-1] = 0.5 if len(longer) > 1 else 1.0
    drawn = []
    for _ in range(count):
        still = rng.random() < stills or not len(longer)
        drawn.append(1 if still else int(rng.choice(longer, p=weights / weights.sum())))
    return drawn


class ClipPool:
    """`lengths` has each clip's number of frames; `refresh` of them are drawn anew at each step, in turn.

    `clip_of(index, version)` gives an encoded clip of that length. Clips are made when they are first needed.
    """

    def __init__(
        self, lengths: Sequence[int], clip_of: Callable[[int, int], EncodedClip], refresh: int, seed: int
    ) -> None:
        self.lengths, self.clip_of, self.refresh, self.seed = list(lengths), clip_of, refresh, seed
        self.buckets: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            self.buckets.setdefault(length, []).append(index)
        self._kept: dict[int, tuple[int, EncodedClip]] = {}
        self.used: set[int] = set()

    def version(self, index: int, step: int) -> int:
        drawn = step * self.refresh
        return (drawn - 1 - index) // len(self.lengths) + 1 if drawn > index else 0

    def clip(self, index: int, step: int) -> EncodedClip:
        wanted = self.version(index, step)
        version, clip = self._kept.get(index, (-1, None))
        if clip is None or version != wanted:
            clip = self.clip_of(index, wanted)
            self._kept[index] = (wanted, clip)
        self.used.add(index)
        return clip

    def draw(self, step: int, micro: int, slots: range, bucketed: bool) -> list[EncodedClip]:
        """The clips of these slots. In a bucketed step all slots of all processes have one length.

        Lengths come in proportion to their clips, so every clip is drawn equally often.
        """
        if bucketed:
            chosen = int(numpy_generator("bucket", self.seed, step, micro).integers(len(self.lengths)))
            choices = self.buckets[self.lengths[chosen]]
        else:
            choices = list(range(len(self.lengths)))
        picks = [numpy_generator("clip slot", self.seed, step, micro, slot).integers(len(choices)) for slot in slots]
        return [self.clip(choices[int(pick)], step) for pick in picks]
