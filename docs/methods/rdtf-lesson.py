"""What the preset `sticker-motion` teaches, and how far it carries: swinging, a motion that the clip base never saw.

    python docs/methods/rdtf-lesson.py write assets/examples/swing    # the clips of the lesson, 8 things
    python docs/methods/rdtf-lesson.py measure swing swing-orthogonal # adapters in the library, on 8 other things
    python docs/methods/rdtf-lesson.py show swing swing-orthogonal    # the first three of these, as rdtf-lesson.png

Measured: the first frame is given, the rest is drawn; PSNR over copying that frame, as `studio.evaluate.motion_card`
does it, for the base alone and with each adapter, on things that no clip of the lesson shows.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from studio.base import Request
from studio.bases.registry import load_base
from studio.bases.sticker_video.family import StickerVideo
from studio.data import motions, stickers
from studio.data.clip_files import webp_bytes
from studio.data.clips import Clip
from studio.evaluate.motion_card import FIRST, compared, guessed, sheet
from studio.files import write_atomically
from studio.generation import Use, parse_use, wearing
from studio.samples import save_png

TAUGHT = ("fox", "apple", "car", "guitar", "penguin", "pizza", "umbrella", "teapot")
ASKED = ("cat", "banana", "rocket", "crab", "owl", "bell", "key", "strawberry")
FRAMES, SIDE, FPS = 8, 96, 8.0
LENGTH, DEGREES = 0.32, 35.0  # from the thing's middle up to where it hangs, of the canvas; how far it swings


def swing(u: float, a: float) -> motions.Pose:
    """A pendulum that hangs from the thing's top."""
    angle = math.radians(DEGREES) * a * math.sin(2 * math.pi * u)
    return motions.Pose(
        x=-LENGTH * math.sin(angle), y=LENGTH * (math.cos(angle) - 1) + 0.03, degrees=math.degrees(angle)
    )


def clip_of(name: str) -> Clip:
    motions.MOTIONS["swing"] = ("swinging", swing)
    glyph = next(glyph for glyph in stickers.glyphs("train") if glyph.name == name)
    clip = motions.render(motions.Act(glyph, "swing"), SIDE, FRAMES, FPS)
    return Clip(clip.frames, clip.durations, loop=True)


def write(folder: Path) -> None:
    for name in TAUGHT:
        write_atomically(folder / f"{name}.webp", webp_bytes(clip_of(name)))
        write_atomically(folder / f"{name}.txt", f"a {name} {{trigger}}\n")


def drawn(base: StickerVideo, uses: list[Use], asked: Sequence[str]) -> list[Clip]:
    """The things that are asked for as the base draws them from their first frames, with these adapters."""
    word = uses[0].adapter.card.trigger if uses else "swinging"
    clips = []
    with wearing(base, uses):
        for seed, name in enumerate(asked):
            request = Request([f"a {name} {word}"], [seed], steps=12, guidance=1.0, image_guidance=1.0)
            given = {0: clip_of(name).frames[0]}
            clips.append(base.generate(replace(request, frames=FRAMES, fps=FPS, loop=True, given=given))[0])
    return clips


def measure(adapters: list[str]) -> dict[str, object]:
    base = load_base("sticker-motion")
    truths = [clip_of(name) for name in ASKED]
    trivial = [guessed(truth, FIRST) for truth in truths]
    found: dict[str, object] = {"base alone": compared(truths, drawn(base, [], ASKED), trivial, FIRST)}
    for adapter in adapters:
        found[adapter] = compared(truths, drawn(base, [parse_use(adapter)], ASKED), trivial, FIRST)
    return found


def show(adapters: list[str], out: Path) -> None:
    base, asked = load_base("sticker-motion"), ASKED[:3]
    rows = [("the truth", [clip_of(name) for name in asked]), ("base alone", drawn(base, [], asked))]
    rows += [(adapter, drawn(base, [parse_use(adapter)], asked)) for adapter in adapters]
    shown = [(f"a {name}: {title}", clips[i]) for i, name in enumerate(asked) for title, clips in rows]
    save_png(sheet(shown, columns=1), out, {"adapters": adapters})


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "write":
        write(Path(rest[0]))
    elif what == "show":
        show(rest, Path("rdtf-lesson.png"))
    else:
        print(json.dumps(measure(rest), indent=1))  # noqa: T201
