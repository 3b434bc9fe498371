"""The data source `melodies`: pieces drawn by a key."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from studio.data.melodies.composing import Score, compose
from studio.data.melodies.cycles import CYCLES
from studio.data.melodies.fields import Fields, caption_of, draw_fields, solo
from studio.data.melodies.modes import EVERY
from studio.data.melodies.playing import play
from studio.keyed import numpy_generator


@dataclass(frozen=True)
class Melody:
    """A wave (1, T), fp32, its caption, and the score behind it."""

    wave: Tensor
    caption: str
    score: Score

    @property
    def told(self) -> str:
        """The caption with the beats and, of a piece in a key, the chord of the tonic, as `read_score` reads them."""
        fields = self.score.fields
        beats = CYCLES[fields.tradition][fields.cycle].beats
        counted = " ".join(f"{i % beats + 1}@{at:.2f}" for i, at in enumerate(self.score.beats))
        chord = fields.key.replace(" sharp", "#").replace(" flat", "b") + ("m" if fields.mode == "minor" else "")
        return f"{self.caption} | beats: {counted} | chords: {chord or 'none'}"


def draw_melody(
    key: tuple[object, ...],
    seconds: float,
    rate_hz: int,
    traditions: Sequence[str],
    *,
    held_out: bool = False,
    modes: Set[str] = EVERY,
    stem: bool = False,
    intonation: str = "theory",
    fields: Fields | None = None,
) -> Melody:
    """The piece of a key, of one of the traditions or, where they are given, with these fields.

    The same key gives the same line with and without `stem`, which leaves drone and drum out: then the caption says
    "solo". `held_out` and `modes` are as in `draw_fields`.
    """
    rng = numpy_generator("melody", *key)
    score, caption = _written(rng, seconds, traditions, held_out, modes, intonation, fields)
    wave = torch.from_numpy(play(score, rng, rate_hz, stem))[None]
    return Melody(wave, solo(caption, score.fields) if stem else caption, score)


def score_of(
    key: tuple[object, ...],
    seconds: float,
    traditions: Sequence[str],
    *,
    modes: Set[str],
    intonation: str,
    fields: Fields | None,
) -> Score:
    """The score of the piece that `draw_melody` gives for the same, at a small part of its cost."""
    return _written(numpy_generator("melody", *key), seconds, traditions, False, modes, intonation, fields)[0]


def _written(
    rng: np.random.Generator,
    seconds: float,
    traditions: Sequence[str],
    held_out: bool,
    modes: Set[str],
    intonation: str,
    fields: Fields | None,
) -> tuple[Score, str]:
    fields = fields or draw_fields(rng, traditions, held_out, modes)
    caption = caption_of(fields, rng)
    return compose(fields, rng, seconds, intonation), caption
