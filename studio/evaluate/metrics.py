"""Metrics: figures from the pictures of an exhibit. A metric has a name and `measure`; that is all one needs.

B pictures, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from studio.data.sticker_pool import to_pixels
from studio.evaluate.exhibit import Exhibit
from studio.evaluate.judge import HEADS, Judge
from studio.evaluate.similarity import diversity, drift, paired_similarity, similarity, similarity_among

Look = Callable[[Sequence[Image.Image]], Tensor]  # features (B, F) of length 1


class Metric(Protocol):
    @property
    def name(self) -> str:
        """How it is asked for, and what its own figures begin with."""

    def measure(self, exhibit: Exhibit) -> dict[str, float]:
        """Figures by name. A figure of the base alone ends in `_base`, one of the references in `_references`."""


@dataclass(frozen=True)
class FeatureMetric:
    """Similarity, drift and diversity by the features that `look` gives.

    `sees_style` says whether features of other things in the same style are alike. Where they are not, a style's
    similarity is only told with a reference for each setting. `all_pairs` is the literature's way (similarity.py).
    """

    name: str
    look: Look
    sees_style: bool = True
    all_pairs: bool = True

    def measure(self, exhibit: Exhibit) -> dict[str, float]:
        figures = {
            "drift": drift(self.look(exhibit.alone.unrelated), self.look(exhibit.worn.unrelated)),
            "diversity": diversity(self.look(exhibit.worn.repeated)),
            "diversity_base": diversity(self.look(exhibit.alone.repeated)),
        }
        figures |= self._similarities(exhibit)
        return {f"{self.name}_{figure}": value for figure, value in figures.items()}

    def _similarities(self, exhibit: Exhibit) -> dict[str, float]:
        blind = exhibit.protocol.teaches == "style" and not (exhibit.protocol.pairs or self.sees_style)
        if blind or not exhibit.references:
            return {}
        references, worn, alone = map(self.look, (exhibit.references, exhibit.worn.settings, exhibit.alone.settings))
        if exhibit.protocol.pairs:
            return {
                "similarity": paired_similarity(worn, references),
                "similarity_base": paired_similarity(alone, references),
            }
        return {
            "similarity": similarity(worn, references, self.all_pairs),
            "similarity_base": similarity(alone, references, self.all_pairs),
            "similarity_references": similarity_among(references, self.all_pairs),
        }


# -- the bundled ones ----------------------------------------------------------------------------------------------


class JudgeMetric:
    """The judge of the sticker world: its features of the thing, and whether it sees what the prompts ask for."""

    name = "judge"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.features = FeatureMetric(
            "judge", lambda pictures: judge.judge(pictures).features, sees_style=False, all_pairs=False
        )

    def measure(self, exhibit: Exhibit) -> dict[str, float]:
        figures = self.features.measure(exhibit)
        for suffix, drawn in (("", exhibit.worn), ("_base", exhibit.alone)):
            verdict = self.judge.judge(drawn.settings)
            asked = [setting.shows for setting in exhibit.protocol.settings]
            for head in dict.fromkeys(head for shows in asked for head in shows):
                names = self.judge.glyphs if head == "glyph" else HEADS[head]
                answers = [names[int(answer)] for answer in verdict.answers(head)]
                right = [said == shows[head] for said, shows in zip(answers, asked, strict=True) if head in shows]
                figures[f"{head}_right{suffix}"] = sum(right) / len(right)
        before, after = self.judge.judge(exhibit.alone.unrelated), self.judge.judge(exhibit.worn.unrelated)
        figures["glyphs_kept"] = float((before.answers("glyph") == after.answers("glyph")).float().mean())
        return figures


def palette(pictures: Sequence[Image.Image]) -> Tensor:
    """How much of a picture has which colour: square roots of the shares of 6 x 6 x 6 colours, (B, 216).

    The cosine of two such vectors is the Bhattacharyya coefficient of the two shares.
    """
    rows = []
    for picture in pictures:
        pixels = (to_pixels([picture.convert("RGB").resize((64, 64), Image.Resampling.BOX)]) + 1) / 2
        bins = (pixels[0] * 5.999).long().flatten(1)
        index = bins[0] * 36 + bins[1] * 6 + bins[2]
        rows.append(torch.bincount(index, minlength=216).float().sqrt())
    return F.normalize(torch.stack(rows), dim=-1)


class PixelMetric:
    """Diversity as anybody can check it: how far apart pictures of one prompt are, as root mean square in [0, 1]."""

    name = "pixels"

    def measure(self, exhibit: Exhibit) -> dict[str, float]:
        return {
            "diversity": _spread(exhibit.worn.repeated),
            "diversity_base": _spread(exhibit.alone.repeated),
        }


def _spread(pictures: Sequence[Image.Image]) -> float:
    small = [p.convert("RGB").resize((32, 32), Image.Resampling.BOX) for p in pictures]
    flat = (to_pixels(small).flatten(1) + 1) / 2
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return float(apart.sum() / (len(flat) * (len(flat) - 1)))
