"""A folder of pieces of the melody world: recordings with captions, as `studio train --data` takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from studio.data.melodies.cycles import MODE_FIELD_OF
from studio.data.melodies.fields import check_fields, draw_fields
from studio.data.melodies.modes import MODES, TRADITIONS
from studio.data.melodies.source import Melody, draw_melody
from studio.data.melodies.voices import PLAYED
from studio.data.sounds import Sound, save_sound
from studio.errors import RequestError, StudioError
from studio.exporting.destination import is_free, move_into_place, workshop
from studio.files import write_atomically
from studio.keyed import numpy_generator


@dataclass(frozen=True)
class Pieces:
    """What to write. Names left empty are drawn; `performed` is of makams, `stems` the line alone."""

    out: Path
    count: int = 40
    seconds: float = 8.0
    rate: int = 12_000
    tradition: str = ""
    mode: str = ""
    instrument: str = ""
    performed: bool = False
    stems: bool = False
    seed: int = 0


def write_folder(options: Pieces) -> int:
    """Writes NUMBER.wav and metadata.jsonl; returns how many.

    The folder is whole or not there. Raises RequestError for one with something in it, and what `check_fields`,
    `save_sound` and `workshop` raise.
    """
    if not is_free(options.out):
        raise RequestError(f"'{options.out}' is already there and not empty", "choose a new folder")
    if options.count < 1 or not 0.5 <= options.seconds <= 600 or not 4000 <= options.rate <= 96_000:
        raise RequestError("count, seconds or rate is out of range", "at least 1, 0.5 to 600 and 4000 to 96000")
    asked, lines = _asked(options), []
    with workshop(options.out) as made:
        for number in range(options.count):
            piece, name = _piece(options, number, *asked), f"{number:04d}.wav"
            save_sound(Sound(piece.wave, options.rate), made / name, piece.score.fields.facts())
            lines.append(json.dumps({"file_name": name, "text": piece.caption}, ensure_ascii=False))
        write_atomically(made / "metadata.jsonl", "\n".join(lines) + "\n")
        move_into_place(made, options.out)
    return options.count


def _piece(options: Pieces, number: int, traditions: tuple[str, ...], told: dict[str, str]) -> Melody:
    key = ("folder", options.seed, number)
    return draw_melody(
        key,
        options.seconds,
        options.rate,
        traditions,
        fields=replace(draw_fields(numpy_generator("fields", *key), traditions), **told),
        stem=options.stems,
        intonation="performed" if options.performed else "theory",
    )


def _asked(options: Pieces) -> tuple[tuple[str, ...], dict[str, str]]:
    """The traditions to draw from, and the mode and the instrument if they are fixed."""
    traditions: tuple[str, ...] = (options.tradition,) if options.tradition else TRADITIONS
    told = {}
    if options.mode:
        traditions, told["mode"] = _mode(options.mode, traditions)
    if options.instrument:
        told |= check_fields({"instrument": options.instrument})
        able = tuple(t for t in traditions if told["instrument"] in PLAYED[t])
        if not able:
            raise RequestError(
                f"no {traditions[0]} piece is played on '{told['instrument']}'", "leave --instrument out"
            )
        traditions = able
    return traditions, told


def _mode(name: str, traditions: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The tradition that has a mode of this name, and its proper spelling."""
    last: StudioError | None = None
    for tradition in traditions:
        try:
            return (tradition,), check_fields({MODE_FIELD_OF[tradition]: name})[MODE_FIELD_OF[tradition]]
        except RequestError as error:
            last = error
    from studio.errors import nearest

    every = [mode for tradition in traditions for mode in MODES[tradition]]
    raise RequestError(f"unknown mode '{name}'", nearest(name, every)) from last
