"""Training the judge of moving stickers: renderings in, the motion out.

Clips are rendered afresh for every step, small, and most are spoilt a little, as what a small base draws is: each frame
shifted, dimmed and blurred by itself, so that a flicker is not taken for a motion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from studio.base import Base
from studio.bases.tiny import fixed_seed
from studio.data import motions
from studio.data.clips import Clip
from studio.errors import PresetError
from studio.evaluate.motion_judge import CLASSES, SIDE, MotionJudge, save_motion_judge, seen
from studio.fit import Group, Task
from studio.keyed import torch_generator
from studio.method import Method, register
from studio.preset import Preset
from studio.run import Run

RENDERED = 2 * SIDE  # renderings are made at this side and shrunk, as a base's clips are
VALIDATION_CLIPS = 330


@register
class MotionJudgeMethod(Method):
    """Trains the classifier that measures what a clip base draws."""

    kind: Literal["motion-judge"] = "motion-judge"
    still: float = Field(0.08, ge=0, lt=1, description="Share of clips in which nothing moves.")
    spoilt: float = Field(0.6, ge=0, le=1, description="Share of clips that are blurred, dimmed or shaken a little.")
    label_smoothing: float = Field(0.02, ge=0, lt=1, description="Of the cross-entropy.")

    def task(self, base: Base | None, preset: Preset, run: Run) -> MotionJudgeTask:
        """Of the base only the device is used: the judge must know nothing of what it judges."""
        if preset.data.source != "motions":
            raise PresetError("method 'motion-judge' draws its own data", "set data.source=motions")
        if preset.data.frames < 2:
            raise PresetError("data.frames=1: one frame shows no motion", "set data.frames=8")
        return MotionJudgeTask(self, preset, base.device if base else torch.device("cpu"))


class MotionJudgeTask(Task):
    """Cross-entropy on the motion of clips of one length."""

    def __init__(self, method: MotionJudgeMethod, preset: Preset, device: torch.device) -> None:
        self.method, self.preset, self.device = method, preset, device
        facts = {"frames": preset.data.frames, "steps": preset.steps, "batch_size": preset.batch_size}
        with fixed_seed(preset.seed):
            self.judge = MotionJudge({**facts, "seed": preset.seed}).to(device)
        self.judge.facts["parameters"] = sum(p.numel() for p in self.judge.parameters())
        self._held_out: tuple[Tensor, Tensor] | None = None

    def groups(self) -> list[Group]:
        return [Group(dict(self.judge.named_parameters()))]

    def describe(self, step: int, micro: int, slots: range) -> str:
        return f"moving stickers of seed {self.preset.seed}, slots {slots.start} to {slots.stop - 1}"

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        keys = [("motion judge", self.preset.seed, step, micro, slot) for slot in slots]
        drawn = [self._draw(key) for key in keys]
        wanted = torch.tensor([label for _, label in drawn], device=self.device)
        logits = self.judge(torch.stack([clip for clip, _ in drawn]).to(self.device)).float()
        return functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.method.label_smoothing)

    def _draw(self, key: tuple[object, ...]) -> tuple[Tensor, int]:
        """What the judge sees of a rendering for training, and its class."""
        clip, motion = rendered(key, self.preset.data.frames, self.method.still)
        g = torch_generator("spoil motion", *key)
        picture = seen([clip])[0]
        return spoilt(picture, g) if torch.rand((), generator=g) < self.method.spoilt else picture, motion

    def validation_loss(self) -> float:
        """On clean renderings of pairs of glyph and motion that training never draws."""
        if self._held_out is None:
            keys = [("motion judge validation", index) for index in range(VALIDATION_CLIPS)]
            drawn = [rendered(key, self.preset.data.frames, self.method.still, held_out=True) for key in keys]
            self._held_out = seen([clip for clip, _ in drawn]), torch.tensor([label for _, label in drawn])
        clips, wanted = (value.to(self.device) for value in self._held_out)
        with torch.no_grad():
            logits = self.judge(clips).float()
        self.judge.facts["right_on_held_out"] = float((logits.argmax(-1) == wanted).float().mean())
        return float(functional.cross_entropy(logits, wanted))

    def save(self, folder: Path, step: int) -> Path:
        save_motion_judge(self.judge, folder / "judge")
        return folder / "judge"


def rendered(key: tuple[object, ...], count: int, still: float, held_out: bool = False) -> tuple[Clip, int]:
    """A clip of `count` frames and the index of its motion in CLASSES. A share stands still."""
    clip, _, act = motions.draw_clip(key, RENDERED, count, held_out=held_out)
    if torch.rand((), generator=torch_generator("motion judge still", *key)) < still:
        return Clip(clip.frames[:1] * count, clip.durations, clip.loop), 0
    return clip, CLASSES.index(act.motion)


def spoilt(clip: Tensor, g: torch.Generator) -> Tensor:
    """A clip (F, 2, H, W) as a small generator draws it: soft, blotched, each frame a little off in place and light."""
    count = len(clip)
    soft, shake, light, blotch = torch.rand(4, generator=g).tolist()
    side = round(SIDE * (1 - 0.5 * soft))
    clip = functional.interpolate(clip, (side, side), mode="bilinear", antialias=True)
    clip = functional.interpolate(clip, (SIDE, SIDE), mode="bilinear")
    shifts = 0.03 * shake * torch.randn(count, 2, generator=g)
    turns = torch.cat([torch.eye(2).expand(count, -1, -1), shifts[..., None]], -1)
    grid = functional.affine_grid(turns, list(clip.shape), align_corners=False)
    clip = functional.grid_sample(clip, grid, align_corners=False)
    clip = clip * (1 + 0.06 * light * torch.randn(count, 2, 1, 1, generator=g))
    coarse = 0.08 * blotch * torch.randn(count, 2, 6, 6, generator=g)
    return (clip + clip[:, :1] * functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")).clamp(0, 1)
