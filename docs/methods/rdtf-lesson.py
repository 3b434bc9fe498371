"""What the preset `sticker-motion` teaches, and how far it carries: swinging, a motion that the clip base never saw.

    python docs/methods/rdtf-lesson.py write assets/examples/swing    # the clips of the lesson, 8 things
    python docs/methods/rdtf-lesson.py measure swing swing-orthogonal # adapters in the library, on 8 other things

Measured: the first frame is given, the rest is drawn; PSNR over copying that frame, as `studio.evaluate.motion_card`
does it, for the base alone and with each adapter, on things that no clip of the lesson shows.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from studio.base import Request
from studio.bases.registry import load_base
from studio.data import motions, stickers
from studio.data.clip_files import webp_bytes
from studio.data.clips import Clip
from studio.evaluate.motion_card import FIRST, compared, guessed
from studio.files import write_atomically
from studio.generation import parse_use, wearing

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


def measure(adapters: list[str]) -> dict[str, object]:
    base = load_base("sticker-motion")
    truths = [clip_of(name) for name in ASKED]
    trivial = [guessed(truth, FIRST) for truth in truths]
    found: dict[str, object] = {}
    for adapter in ["", *adapters]:
        uses = [parse_use(adapter)] if adapter else []
        word = uses[0].adapter.card.trigger if uses else "swinging"
        clips = []
        with wearing(base, uses):
            for seed, (name, truth) in enumerate(zip(ASKED, truths)):
                request = Request([f"a {name} {word}"], [seed], steps=12, guidance=1.0, image_guidance=1.0)
                asked = {"frames": FRAMES, "fps": FPS, "loop": True, "given": {0: truth.frames[0]}}
                clips.append(base.generate(Request(**{**vars(request), **asked}))[0])
        found[adapter or "base alone"] = compared(truths, clips, trivial, FIRST)
    return found


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "write":
        write(Path(rest[0]))
    else:
        print(json.dumps(measure(rest), indent=1))  # noqa: T201
