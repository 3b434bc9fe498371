"""Writes pieces of the melody world as a folder of recordings with captions, as `studio train --data` takes it.

python -m studio.data.melodies --out yaman/ --count 40 --mode Yaman
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from studio.data.melodies.cycles import MODE_FIELD_OF
from studio.data.melodies.fields import check_fields, draw_fields
from studio.data.melodies.modes import MODES, TRADITIONS
from studio.data.melodies.source import draw_melody
from studio.data.melodies.voices import PLAYED
from studio.data.sounds import Sound, save_sound
from studio.errors import RequestError, StudioError
from studio.files import write_atomically
from studio.keyed import numpy_generator


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes NUMBER.wav and metadata.jsonl. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.data.melodies", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument("--count", type=int, default=40, help="how many pieces (default 40)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each (default 8)")
    parser.add_argument("--rate", type=int, default=12_000, help="samples a second (default 12000)")
    parser.add_argument("--tradition", choices=TRADITIONS, help="western, raga or makam (default: all, in turn)")
    parser.add_argument("--mode", help="a raga, a makam, major or minor (default: all)")
    parser.add_argument("--instrument", help="who plays (default: all that the tradition has)")
    parser.add_argument("--performed", action="store_true", help="makams as they are played, not as in theory")
    parser.add_argument("--stems", action="store_true", help="the line alone, without drone and drum")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pieces (default 0)")
    options = parser.parse_args(arguments)
    from studio.terminal import print_error, say

    try:
        say(f"{write_folder(options)} pieces written to {options.out}")
    except StudioError as error:
        print_error(error)
        return error.exit_code
    return 0


def write_folder(options: argparse.Namespace) -> int:
    """Raises RequestError for a folder with something in it, and what `check_fields` and `save_sound` raise."""
    if options.out.exists() and any(options.out.iterdir()):
        raise RequestError(f"'{options.out}' is not empty", "choose a new folder")
    if options.count < 1 or not 0.5 <= options.seconds <= 600 or not 4000 <= options.rate <= 96_000:
        raise RequestError("count, seconds or rate is out of range", "at least 1, 0.5 to 600 and 4000 to 96000")
    traditions, told = _asked(options)
    lines = []
    for number in range(options.count):
        key = ("folder", options.seed, number)
        fields = draw_fields(numpy_generator("fields", *key), traditions)
        fields = replace(
            fields, mode=told.get("mode", fields.mode), instrument=told.get("instrument", fields.instrument)
        )
        piece = draw_melody(
            key,
            options.seconds,
            options.rate,
            traditions,
            fields=fields,
            stem=options.stems,
            intonation="performed" if options.performed else "theory",
        )
        name = f"{number:04d}.wav"
        save_sound(Sound(piece.wave, options.rate), options.out / name, fields.facts())
        lines.append(json.dumps({"file_name": name, "text": piece.caption}, ensure_ascii=False))
    write_atomically(options.out / "metadata.jsonl", "\n".join(lines) + "\n")
    return options.count


def _asked(options: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, str]]:
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


if __name__ == "__main__":
    sys.exit(main())
