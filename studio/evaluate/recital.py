"""The sounds that an adapter of music is measured by: with it and, under the same seeds, without; beside true ones.

Prompts are the captions of the recordings that it is compared with. Every second recording is what generated sounds are
measured against, the others say how far true sounds are from true ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio.base import Request
from studio.bases.melody import speaks_of_melodies
from studio.data.cache import Cache
from studio.data.listing import list_folder
from studio.data.melodies.composing import tonic_of
from studio.data.melodies.cycles import FIELD_OF, MODE_FIELD_OF
from studio.data.melodies.fields import Fields, caption_of, check_fields, draw_fields, mode_in
from studio.data.melodies.modes import MODES, Mode
from studio.data.recordings import sound_captions
from studio.data.sounds import Sound, UnusableSound, facts_in, read_sound
from studio.errors import DataError
from studio.generation import Use, wearing
from studio.keyed import key_of, numpy_generator
from studio.music.score import read_score

Progress = Callable[[int, int], None]  # sounds so far, sounds in all

FEWEST = 4  # recordings to compare with
TOGETHER = 8  # sounds played at a time
KNOWN_PROMPTS = 6


@dataclass(frozen=True)
class Asked:
    """What a sound should be: a caption, and fields where its file tells them, as files of the melody world do."""

    caption: str
    fields: Fields | None = None

    @property
    def mode(self) -> Mode | None:
        """By the file, else by the caption."""
        return MODES[self.fields.tradition][self.fields.mode] if self.fields else mode_in(self.caption)

    @property
    def tonic_hz(self) -> float | None:
        """None where it is not told."""
        return tonic_of(self.fields) if self.fields else None


@dataclass(frozen=True)
class Recording(Asked):
    """A sound that is what it should be."""

    sound: Sound = field(kw_only=True)


@dataclass(frozen=True)
class Playing:
    """How sounds are played: how many, how long; guidance and steps left None are the base's own."""

    count: int = 12
    seconds: float = 6.0
    guidance: float | None = None
    steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """`asked` for by the captions of recordings; `known` what the base knew before, in prompts of its own world."""

    asked: list[Sound]
    known: list[Sound]


@dataclass(frozen=True)
class Recital:
    """All that measures listen to. `truth` and `worn.asked` go together one by one; `floor` is more of the truth."""

    truth: list[Recording]
    floor: list[Recording]
    known: list[Asked]
    worn: Played
    alone: Played


def read_recordings(
    folder: Path, base: Any, playing: Playing, template: str, words: tuple[str, str]
) -> list[Recording]:
    """Up to twice as many as are played, spread over the folder. Raises DataError, RequestError."""
    listing = list_folder(folder)
    captions = sound_captions(listing, template, {"trigger": words[0], "class": words[1]})
    wanted = 2 * playing.count
    paths = [listing.sounds[i * len(listing.sounds) // wanted] for i in range(min(wanted, len(listing.sounds)))]
    paths = list(dict.fromkeys(paths)) if len(listing.sounds) >= wanted else listing.sounds
    if len(paths) < FEWEST:
        raise DataError(f"'{folder}' has {len(paths)} sounds to compare with", f"at least {FEWEST} are needed")
    found = []
    for path in paths:
        try:
            sound = read_sound(path, 0.0, playing.seconds).at(base.sample_rate_hz, 1)
        except UnusableSound as reason:
            raise DataError(f"'{listing.name(path)}' {reason}") from None
        caption = captions.own(path) or captions.template
        read_score(caption)  # raises for beats and chords that make no sense, before anything is played
        found.append(Recording(caption, fields_in(facts_in(path)), sound=sound))
    return found


def fields_in(facts: dict[str, Any]) -> Fields | None:
    """What a file of the melody world says of itself; None for any other."""
    tradition = next((t for t, name in MODE_FIELD_OF.items() if name in facts), None)
    if tradition is None or "instrument" not in facts:
        return None
    told = {name: str(facts[name]) for name in facts if isinstance(facts[name], str)}
    try:
        checked = check_fields(told)
    except DataError:
        return None
    mode, cycle = checked[MODE_FIELD_OF[tradition]], checked.get(FIELD_OF[tradition], "")
    return Fields(tradition, checked["instrument"], mode, cycle, checked.get("tempo", ""), checked.get("key", ""))


def play_recital(
    base: Any,
    uses: Sequence[Use],
    recordings: Sequence[Recording],
    playing: Playing,
    cache: Cache,
    on_progress: Progress | None = None,
) -> tuple[Recital, list[str]]:
    """Plays everything. Returns warnings about other bases, too."""
    truth, floor = list(recordings[0::2])[: playing.count], list(recordings[1::2])[: playing.count]
    known = known_prompts(base, playing.seed)
    prompts = [asked.caption for asked in (*truth, *known)]
    report = on_progress or (lambda done, total: None)
    total = 2 * len(prompts)

    def parted(sounds: list[Sound]) -> Played:
        return Played(sounds[: len(truth)], sounds[len(truth) :])

    alone = parted(_alone(base, prompts, playing, cache, lambda done: report(done, total)))
    if not uses:
        return Recital(truth, floor, known, alone, alone), []
    with wearing(base, uses) as warnings:
        worn = parted(_play(base, prompts, playing, lambda done: report(len(prompts) + done, total)))
    return Recital(truth, floor, known, worn, alone), list(warnings)


def known_prompts(base: Any, seed: int) -> list[Asked]:
    """Pieces in keys, of which everything can be measured; none for a base of another world."""
    if not speaks_of_melodies(base):
        return []
    drawn = [draw_fields(numpy_generator("known", seed, i), ("western",)) for i in range(KNOWN_PROMPTS)]
    return [Asked(caption_of(f, numpy_generator("known prompt", seed, i)), f) for i, f in enumerate(drawn)]


def _alone(base: Any, prompts: list[str], playing: Playing, cache: Cache, report: Callable[[int], None]) -> list[Sound]:
    """What the base plays by itself, which all adapters of a comparison share."""
    identity = base.identity()
    how = [playing.seconds, playing.guidance, playing.steps, playing.seed, TOGETHER]
    key = json.dumps(["alone", identity.architecture, identity.values, prompts, how])

    def compute() -> dict[str, torch.Tensor]:
        return {"waves": torch.stack([sound.wave for sound in _play(base, prompts, playing, report)])}

    return [Sound(wave, base.sample_rate_hz) for wave in cache.get(key, compute)["waves"]]


def _play(base: Any, prompts: list[str], playing: Playing, report: Callable[[int], None]) -> list[Sound]:
    sounds: list[Sound] = []
    for start in range(0, len(prompts), TOGETHER):
        part = prompts[start : start + TOGETHER]
        seeds = [key_of("recital", playing.seed, start + i) % 2**31 for i in range(len(part))]
        request = Request(part, seeds, steps=playing.steps, guidance=playing.guidance, seconds=playing.seconds)
        sounds += base.generate_together(request)
        report(len(sounds))
    return [Sound(_finite(sound.wave.mean(0, keepdim=True)), sound.sample_rate_hz) for sound in sounds]


def _finite(wave: torch.Tensor) -> torch.Tensor:
    """With zeros in place of what is not finite, so that a broken adapter is measured and not fatal."""
    return torch.from_numpy(np.nan_to_num(wave.numpy(), posinf=0.0, neginf=0.0))
