"""Teaching a base of music that denoises latents, such as Mustango: the sibling of `SoundTask`.

Recordings become latents once; beats and chords are read from the captions (`score.py`) or the folder's metadata and
encoded within the loop, where they cost next to nothing. B samples, Z latent channels, t latent steps, f bands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.base import Condition
from studio.bases.mustango.family import Mustango, without
from studio.data.recordings import Piece, SoundSet
from studio.errors import DataError, PresetError, RequestError
from studio.keyed import torch_generator
from studio.music.score import Score, read_score
from studio.music.score_sheet import ScoreSheet
from studio.music.task import Example, SoundTraining
from studio.paths import assets_dir
from studio.preset import Preset
from studio.run import Event

VALIDATION_DRAWS = 8  # noises and times per held-out piece


@dataclass
class ScoredExample(Example):
    """`codes` are latents (Z, t, f); `score` is that of the piece, in times of its own."""

    score: Score = field(default_factory=lambda: Score(""))


def scores_of(base: Any, preset: Preset, sounds: SoundSet) -> dict[Piece, Score]:
    """What each piece is told, in times of its own: its caption, and the folder's metadata where that tells nothing.

    Raises PresetError for pieces that are too long, DataError for beats or chords that make no sense.
    """
    pieces = [*sounds.pieces, *sounds.held_out]
    if (longest := max(piece.seconds for piece in pieces)) > base.longest_seconds:
        raise PresetError(
            f"data.seconds: pieces of {longest:g} seconds are longer than what '{base.name}' plays at once",
            f"set data.seconds={base.longest_seconds:g} or less",
        )
    sheet = ScoreSheet(Path((preset.data.path or ".").replace("{assets}", str(assets_dir()))).expanduser())
    found = {}
    for piece in pieces:
        try:
            told = sheet.completed(piece.path, read_score(piece.caption))
            found[piece] = told.within(piece.start_seconds, piece.seconds)
            base.encode_signs([found[piece]])
        except RequestError as fault:
            raise DataError(f"'{piece.name}': {fault.message}", fault.hint) from None
    return found


class DenoisingTask(SoundTraining):
    """Bases that predict noise, velocity or sample of latents: squared error, by min-SNR if the preset says so."""

    base: Mustango
    text_encoder = "text_encoder."

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Event]:
        self.scores = scores_of(self.base, self.preset, self.sounds)
        yield from super().prepare()

    def encode(self, piece: Piece) -> Example:
        name = f"{piece.name} from {piece.start_seconds:g} s"
        return ScoredExample(
            name, self.sound_of(piece, "mel latents", torch.float32), piece.caption, score=self.scores[piece]
        )

    def words_of(self, example: Example) -> str:
        assert isinstance(example, ScoredExample)
        return example.score.text

    def encode_words(self, captions: list[str]) -> Condition:
        return self.base.pipe.encode_text(captions)

    # -- what the loop asks ------------------------------------------------------------------------------------

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        examples = self.examples_at(step, micro, slots)
        return self._losses(examples, [(self.preset.seed, step, micro, slot) for slot in slots])

    def _losses(self, examples: list[Example], keys: list[tuple[object, ...]]) -> Tensor:
        generators = [torch_generator("sample", *key) for key in keys]
        scores = [self._dropped(example, generator) for example, generator in zip(examples, generators, strict=True)]
        objective, device = self.base.objective, self.base.device
        times = torch.stack([objective.draw_time(g) for g in generators])
        clean = torch.stack([example.codes for example in examples]).to(device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(device)
        noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
        predicted = self.base.predict(noisy, objective.network_time(times), self._told(scores)).float()
        loss = (predicted - target).square().mean((1, 2, 3))
        if self.preset.min_snr_gamma:
            loss = loss * objective.min_snr_weight(times, self.preset.min_snr_gamma).to(device)
        return loss

    def _dropped(self, example: Example, generator: torch.Generator) -> Score:
        """The score, all of it left out with the preset's share, else each part by itself with the same share."""
        assert isinstance(example, ScoredExample)
        drawn = torch.rand(4, generator=generator) < self.preset.data.caption_dropout
        parts = ("text", "beats", "chords")
        return without(example.score, *(part for part, drop in zip(parts, drawn[1:], strict=True) if drop or drawn[0]))

    def _told(self, scores: list[Score]) -> Condition:
        condition = self.base.encode_signs(scores)
        return condition | self.condition_of([score.text for score in scores])

    def held_out_losses(self) -> Iterator[Tensor]:
        for example in self.held_out:
            for draw in range(VALIDATION_DRAWS):
                yield self._losses([example], [("validation", self.preset.seed, example.name, draw)])
