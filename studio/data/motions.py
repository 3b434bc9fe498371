"""Stickers that move: emoji on nothing, ten motions with speed and size, and captions that tell them.

A procedural source of clips with transparency, as the sticker world is one of pictures. Everything is a function of a
numpy generator. Pairs of a glyph and a motion are split, so that a network can be asked for a fox that it never saw
bounce although it knows foxes and bouncing. Most clips begin where their motion begins: a text does not tell where in
a motion a clip begins, and the mean of clips that begin anywhere does not move, which is all that a network can draw of
a motion while all is noise. t is the time in seconds, c the cycles a second, a the size of a motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from studio.data import stickers
from studio.data.clips import Clip
from studio.keyed import key_of, numpy_generator

SPEEDS = {"slowly": 0.5, "": 1.0, "quickly": 2.0}  # cycles a second
EXTENTS = {"a little": 0.5, "": 1.0, "a lot": 1.5}
SIDE = 0.64  # longest side of the thing, as a fraction of the canvas
STARTING = 0.7  # share of clips that begin where their motion begins; the others begin anywhere in it
HELD_OUT_SHARE = 8  # one pair of glyph and motion in so many is never trained on


@dataclass(frozen=True)
class Pose:
    """Where a thing is in a frame: shifts as fractions of the canvas, degrees clockwise, scales, row waves, alpha."""

    x: float = 0.0
    y: float = 0.0
    degrees: float = 0.0
    width: float = 1.0
    height: float = 1.0
    wave: float = 0.0
    wave_phase: float = 0.0
    alpha: float = 1.0


def _turn(u: float) -> float:
    return 2 * math.pi * u


def _bounce(u: float, a: float) -> Pose:
    up = abs(math.sin(_turn(u) / 2))
    squash = 0.25 * max(0.0, 1 - 3 * up)
    return Pose(y=0.14 - 0.24 * a * up, width=1 + squash, height=1 - squash)


def _slide(u: float, a: float) -> Pose:
    return Pose(x=0.5 * a * (u % 1 - 0.5))


def _pop(u: float, a: float) -> Pose:
    """Grows past its size and settles there, in the first half of a cycle (the "back" easing)."""
    v = min(1.0, u % 1 / 0.5) - 1
    over = 1.7 * a
    return Pose(width=(s := max(0.05, 1 + (over + 1) * v**3 + over * v**2)), height=s)


#: u is the number of cycles done, a the size of the motion.
MOTIONS: dict[str, tuple[str, Callable[[float, float], Pose]]] = {
    "bounce": ("bouncing", _bounce),
    "spin": ("spinning", lambda u, a: Pose(degrees=360 * u)),
    "shake": ("shaking", lambda u, a: Pose(x=0.07 * a * math.sin(_turn(2 * u)))),
    "pulse": ("pulsing", lambda u, a: Pose(width=(s := 1 + 0.3 * a * math.sin(_turn(u))), height=s)),
    "slide": ("sliding", _slide),
    "wave": ("waving", lambda u, a: Pose(wave=0.06 * a, wave_phase=_turn(u))),
    "fade": ("fading", lambda u, a: Pose(alpha=1 - min(1.0, 0.65 * a) * (0.5 - 0.5 * math.cos(_turn(u))))),
    "wobble": ("wobbling", lambda u, a: Pose(degrees=22 * a * math.sin(_turn(u)))),
    "pop": ("popping up", _pop),
    "orbit": ("circling", lambda u, a: Pose(x=0.17 * a * math.cos(_turn(u)), y=0.17 * a * math.sin(_turn(u)))),
}
WITHOUT_EXTENT = ("spin", "pop")


@dataclass(frozen=True)
class Act:
    """What is played: a thing, a motion of `MOTIONS` or "" for none, its speed, its extent, and where it starts."""

    glyph: stickers.Glyph
    motion: str = ""
    speed: str = ""
    extent: str = ""
    phase: float = 0.0

    def caption(self, rng: np.random.Generator) -> str:
        """For example "a sticker of a fox bouncing a lot quickly"."""
        words = [stickers.Thing(self.glyph).phrase()]
        if self.motion:
            words += [MOTIONS[self.motion][0], self.extent, self.speed]
        start = ("", "", "a sticker of ", "a picture of ")[rng.integers(4)]
        return start + " ".join(word for word in words if word)

    def pose(self, seconds: float) -> Pose:
        if not self.motion:
            return Pose()
        return MOTIONS[self.motion][1](SPEEDS[self.speed] * seconds + self.phase, EXTENTS[self.extent])


def vocabulary() -> list[str]:
    """The words that captions have beyond those of the sticker world."""
    phrases = [phrase for phrase, _ in MOTIONS.values()] + [*SPEEDS, *EXTENTS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def is_held_out(glyph: stickers.Glyph, motion: str) -> bool:
    """Whether this pair is kept from training. Still things never are."""
    return bool(motion) and key_of("composition", glyph.character, motion) % HELD_OUT_SHARE == 0


def draw_act(rng: np.random.Generator, glyphs: Sequence[stickers.Glyph], held_out: bool, still: bool) -> Act:
    """A random act over pairs of the split."""
    glyph = glyphs[int(rng.integers(len(glyphs)))]
    if still:
        return Act(glyph)
    pairs = [motion for motion in MOTIONS if is_held_out(glyph, motion) == held_out]
    while not pairs:
        glyph = glyphs[int(rng.integers(len(glyphs)))]
        pairs = [motion for motion in MOTIONS if is_held_out(glyph, motion) == held_out]
    motion = pairs[int(rng.integers(len(pairs)))]
    speed = list(SPEEDS)[rng.choice(3, p=(0.2, 0.6, 0.2))]
    extent = "" if motion in WITHOUT_EXTENT else list(EXTENTS)[rng.choice(3, p=(0.2, 0.6, 0.2))]
    phase = 0.0 if motion == "pop" else max(0.0, float(rng.random()) - STARTING) / (1 - STARTING)
    return Act(glyph, motion, speed, extent, phase)


def draw_clip(
    key: tuple[object, ...], resolution: int, count: int, splits: str = "train", held_out: bool = False
) -> tuple[Clip, str, Act]:
    """A clip of `count` frames for a key, with its caption and the act behind it. One frame is a still thing.

    Half of the clips are exactly a number of cycles long and loop; the others have one of the usual frame rates.
    """
    rng = numpy_generator("motion", *key)
    act = draw_act(rng, stickers.glyphs(*splits.split("+")), held_out, still=count == 1)
    cycles = 2 if act.speed == "quickly" and count >= 6 else 1
    fps = float((6, 8, 10, 12)[rng.integers(4)])
    whole = count > 2 and bool(rng.random() < 0.5) and act.motion != "slide"
    if whole:
        fps = count * SPEEDS[act.speed] / cycles
    clip = render(act, resolution, count, fps, float(rng.uniform(0.9, 1.1)))
    return Clip(clip.frames, clip.durations, loop=whole), act.caption(rng), act


def render(act: Act, resolution: int, count: int, fps: float, scale: float = 1.0) -> Clip:
    """The act as RGBA frames of `resolution` x `resolution` pixels."""
    sprite = stickers.picture(act.glyph.character)
    factor = SIDE * scale * resolution / max(sprite.size)
    shape = (max(1, round(sprite.width * factor)), max(1, round(sprite.height * factor)))
    small = sprite.convert("RGBa").resize(shape, Image.Resampling.BOX if factor < 0.5 else Image.Resampling.LANCZOS)
    # An empty border, so that what lies just outside fades in instead of being cut.
    bordered = Image.new("RGBa", (shape[0] + 2, shape[1] + 2))
    bordered.paste(small, (1, 1))
    frames = [_placed(bordered, act.pose(index / fps), resolution) for index in range(count)]
    return Clip.at_rate(frames, fps)


def _placed(sprite: Image.Image, pose: Pose, side: int) -> Image.Image:
    """A premultiplied sprite in a pose on an empty canvas, as straight RGBA."""
    turn = math.radians(pose.degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    centre_x, centre_y = side * (0.5 + pose.x), side * (0.5 + pose.y)
    # The inverse map, from a pixel of the canvas to one of the sprite.
    a, b = cos / pose.width, sin / pose.width
    d, e = -sin / pose.height, cos / pose.height
    c = sprite.width / 2 - a * centre_x - b * centre_y
    f = sprite.height / 2 - d * centre_x - e * centre_y
    canvas = sprite.transform((side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    if pose.wave:
        canvas = _waved(canvas, pose)
    if pose.alpha < 1:
        faded = np.asarray(canvas).astype(np.float32) * pose.alpha
        canvas = Image.frombytes("RGBa", canvas.size, faded.round().astype(np.uint8).tobytes())
    return canvas.convert("RGBA")


def _waved(canvas: Image.Image, pose: Pose) -> Image.Image:
    """Each row moved sideways along a sine that runs through the rows."""
    pixels = np.asarray(canvas).astype(np.float32)
    side = pixels.shape[0]
    shifts = pose.wave * side * np.sin(2 * np.pi * np.arange(side) / side * 2 + pose.wave_phase)
    columns = np.arange(side)[None] - shifts[:, None]
    left = np.floor(columns).astype(int)
    share = (columns - left)[..., None]
    rows = np.arange(side)[:, None]
    moved = pixels[rows, left.clip(0, side - 1)] * (1 - share) + pixels[rows, (left + 1).clip(0, side - 1)] * share
    return Image.frombytes("RGBa", canvas.size, moved.round().astype(np.uint8).tobytes())
