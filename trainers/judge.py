"""Training the judge of the sticker world: renderings in, glyph and attributes out.

Pictures are rendered afresh for every step at the judge's own 64 px and then spoilt a little, as what a small base
draws is: blurred, blotched, bent. Emoji that the base never learns are shown too, as further classes which are thrown
away at the end: the features then tell apart things that no network has seen.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from studio.base import Base
from studio.bases.tiny import fixed_seed
from studio.data.sticker_pool import to_pixels
from studio.data.stickers import TINTS, Glyph, Ground, Scene, Thing, draw_scene, glyphs, render
from studio.errors import PresetError
from studio.evaluate.judge import SIDE, Judge, attribute_labels, save_judge
from studio.fit import Group, Task
from studio.keyed import numpy_generator, torch_generator
from studio.method import Method, register
from studio.preset import Preset
from studio.run import Run

ATTRIBUTE_WEIGHT = 0.3  # of each head's loss against the glyph's


@register
class JudgeMethod(Method):
    """Trains the classifier that measures what the sticker base draws."""

    kind: Literal["judge"] = "judge"
    others: float = Field(
        0.3, ge=0, lt=1, description="Share of pictures of emoji the base never learns: they widen the features."
    )
    easy: float = Field(
        0.12, ge=0, le=1, description="Share of the steps over which plain, unspoilt pictures give way to all others."
    )
    tinted: float = Field(0.33, ge=0, le=1, description="Share of the untinted things that are tinted after all.")
    spoilt: float = Field(0.75, ge=0, le=1, description="Share of pictures that are blurred, blotched or bent.")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="Of the glyph's cross-entropy.")

    def task(self, base: Base | None, preset: Preset, run: Run) -> JudgeTask:
        """Of the base only the device is used: the judge must know nothing of what it judges."""
        if preset.data.source != "stickers":
            raise PresetError("method 'judge' draws its own data", "set data.source=stickers")
        return JudgeTask(self, preset, base.device if base else torch.device("cpu"))


class JudgeTask(Task):
    """Cross-entropy on the glyph and on each attribute of scenes of one thing."""

    def __init__(self, method: JudgeMethod, preset: Preset, device: torch.device) -> None:
        self.method, self.preset = method, preset
        self.known, self.others = glyphs("train"), glyphs("other")
        self.classes = {glyph: i for i, glyph in enumerate((*self.known, *self.others))}
        facts = {"parameters": 0, "steps": preset.steps, "batch_size": preset.batch_size, "seed": preset.seed}
        with fixed_seed(preset.seed):
            self.judge = Judge([*(g.name for g in self.known), *(f"other {g.character}" for g in self.others)], facts)
        self.judge.to(device)
        self.judge.facts["parameters"] = sum(p.numel() for p in self.judge.parameters()) - self._surplus()

    def _surplus(self) -> int:
        return len(self.others) * self.judge.prototypes.shape[1]

    def groups(self) -> list[Group]:
        return [Group(dict(self.judge.named_parameters()))]

    def describe(self, step: int, micro: int, slots: range) -> str:
        return f"stickers of seed {self.preset.seed}, slots {slots.start} to {slots.stop - 1}"

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        keys = [("judge", self.preset.seed, step, micro, slot) for slot in slots]
        hard = min(1.0, step / max(1.0, self.method.easy * self.preset.steps))
        drawn = [self._draw(key, hard) for key in keys]
        pixels = spoil(to_pixels([picture for picture, _ in drawn]), keys, hard * self.method.spoilt)
        return self._loss(pixels, [scene for _, scene in drawn], self.method.label_smoothing)

    def _draw(self, key: tuple[object, ...], hard: float) -> tuple[Image.Image, Scene]:
        """A rendering for training; the share 1 - `hard` shows things in their own colours, not small, on white."""
        rng = numpy_generator(*key)
        choices = self.others if rng.random() < self.method.others else self.known
        scene = draw_scene(rng, (choices[int(rng.integers(len(choices)))],))
        thing, ground = scene.things[0], scene.ground
        if rng.random() >= hard:
            scene = replace(scene, things=(Thing(thing.glyph, "", thing.size.replace("small", "")),), ground=Ground())
        elif not thing.tint and rng.random() < self.method.tinted:
            usable = [tint for tint in TINTS if tint not in (ground.colour, ground.second)]
            scene = replace(scene, things=(replace(thing, tint=usable[int(rng.integers(len(usable)))]),))
        return render(scene, SIDE, rng), scene

    def _loss(self, pixels: Tensor, scenes: list[Scene], smoothing: float) -> Tensor:
        device = self.judge.prototypes.device
        verdict = self.judge(pixels.to(device))
        wanted = torch.tensor([self.classes[scene.things[0].glyph] for scene in scenes], device=device)
        loss = F.cross_entropy(verdict.logits["glyph"], wanted, reduction="none", label_smoothing=smoothing)
        for head, labels in attribute_labels(scenes).items():
            loss = loss + ATTRIBUTE_WEIGHT * F.cross_entropy(verdict.logits[head], labels.to(device), reduction="none")
        return loss

    def validation_loss(self) -> float:
        """The loss on clean renderings that training never draws, one of each glyph."""
        drawn = [draw_single(numpy_generator("judge validation", g.name), g, SIDE) for g in self.known]
        pixels = to_pixels([picture for picture, _ in drawn])
        return float(self._loss(pixels, [scene for _, scene in drawn], 0.0).detach().mean())

    def save(self, folder: Path, step: int) -> Path:
        save_judge(self.judge, folder / "judge", len(self.known))
        return folder / "judge"


def draw_single(rng: np.random.Generator, glyph: Glyph, resolution: int) -> tuple[Image.Image, Scene]:
    """A random picture of one thing with this glyph, and its scene."""
    scene = draw_scene(rng, (glyph,))
    return render(scene, resolution, rng), scene


# -- spoiling --------------------------------------------------------------------------------------------------


def spoil(pixels: Tensor, keys: Sequence[tuple[object, ...]], share: float) -> Tensor:
    """Spoils that share of the pictures (B, 3, H, W) in [-1, 1], each by its own key, as small generators do."""
    spoilt = []
    for picture, key in zip(pixels, keys, strict=True):
        g = torch_generator("spoil", *key)
        chance, bend, blur, blotch, noise, jpeg = torch.rand(6, generator=g).tolist()
        if chance >= share:
            spoilt.append(picture)
            continue
        if bend < 0.4:
            picture = _bent(picture, g)
        if blur < 0.6:
            picture = _softened(picture, float(torch.rand((), generator=g)))
        if blotch < 0.4:
            coarse = torch.randn(1, 3, 8, 8, generator=g) * 0.15 * torch.rand((), generator=g)
            picture = picture + F.interpolate(coarse, picture.shape[-2:], mode="bicubic")[0]
        if noise < 0.4:
            picture = picture + torch.randn(picture.shape, generator=g) * 0.12 * torch.rand((), generator=g)
        gain = 1 + 0.12 * (torch.rand(3, 1, 1, generator=g) - 0.5)
        picture = (picture * gain + 0.12 * (torch.rand(3, 1, 1, generator=g) - 0.5)).clamp(-1, 1)
        if jpeg < 0.1:
            picture = _through_jpeg(picture, 25 + int(60 * torch.rand((), generator=g)))
        spoilt.append(picture)
    return torch.stack(spoilt)


def _bent(picture: Tensor, g: torch.Generator) -> Tensor:
    """Moves the pixels along a smooth random field, by about 1.5 px of 64."""
    strength = 0.06 * torch.rand((), generator=g)
    field = F.interpolate(torch.randn(1, 2, 6, 6, generator=g) * strength, picture.shape[-2:], mode="bicubic")
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, *picture.shape], align_corners=False)
    moved = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(picture[None], moved, padding_mode="border", align_corners=False)[0]


def _softened(picture: Tensor, amount: float) -> Tensor:
    """Loses detail, as an autoencoder does: down to between 64 and 24 px, and up again."""
    side = round(picture.shape[-1] * (1 - 0.62 * amount))
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True}
    small = F.interpolate(picture[None], (side, side), **options)
    return F.interpolate(small, picture.shape[-2:], mode="bicubic")[0]


def _through_jpeg(picture: Tensor, quality: int) -> Tensor:
    array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "JPEG", quality=quality)
    return to_pixels([Image.open(buffer).convert("RGB")])[0]
