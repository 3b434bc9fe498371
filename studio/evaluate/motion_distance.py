"""S-FVD: how far a set of clips is from renderings, by what the judge of motions makes of them.

The Frechet distance between two normal distributions (Heusel et al. 2017; Unterthiner et al. 2018 for clips), fitted to
the judge's features of true renderings and of what a base draws. It is no FVD, which is another network's. It depends
on the number of clips, so the distance between two sets of true renderings of that number stands beside it.
N clips, D = 192 features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from studio.base import Request
from studio.bases.sticker_video.family import StickerVideo
from studio.data.clips import Clip
from studio.evaluate.motion_card import Truth, held_out_clips
from studio.evaluate.motion_judge import MotionJudge, seen

ROUNDING = 1e-6  # added to each variance: features of few clips are in a plane


def measure_distance(
    base: StickerVideo,
    judge: MotionJudge,
    count: int,
    *,
    steps: int = 12,
    frames: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """S-FVD of clips from text alone, of captions of held-out pairs, and its floor."""
    truths = held_out_clips(2 * count, base.resolution, frames, seed)
    asked, others = truths[:count], truths[count:]
    drawn = []
    for number, truth in enumerate(asked):
        drawn.append(_drawn(base, truth, seed + number, steps, frames))
        on_progress(number + 1, count)
    real, again, own = (features(judge, clips) for clips in ([t.clip for t in asked], [t.clip for t in others], drawn))
    return {"s_fvd": round(frechet(own, real), 4), "s_fvd of true renderings": round(frechet(again, real), 4)}


def _drawn(base: StickerVideo, truth: Truth, seed: int, steps: int, frames: int) -> Clip:
    fps = round(truth.clip.fps, 2)
    request = Request([truth.caption], [seed], steps=steps, frames=frames, fps=fps, loop=truth.clip.loop)
    clip: Clip = base.generate(request)[0]
    return clip


@torch.no_grad()
def features(judge: MotionJudge, clips: Sequence[Clip]) -> Tensor:
    """(N, D), double."""
    return torch.cat([judge.features(seen([clip])) for clip in clips]).double()


def frechet(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), of features (N, D)."""
    (m1, c1), (m2, c2) = (_normal(some) for some in (one, other))
    root = _root(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def _normal(some: Tensor) -> tuple[Tensor, Tensor]:
    covariance = torch.cov(some.T) + ROUNDING * torch.eye(some.shape[1], dtype=some.dtype)
    return some.mean(0), covariance


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
