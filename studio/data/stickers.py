"""The sticker world: colour emoji on coloured grounds, rendered on the fly with captions that tell what is seen.

The bundled base `sticker` is trained on this world and nothing else, and the world's own classifier judges what it
draws: so it doubles as a measuring instrument. Everything here is a function of a numpy generator, hence of a seed.

Glyphs come from the font Noto Color Emoji (SIL OFL 1.1; pictures made with it are free of that licence). Their names
and the split into trained and held-out ones stand in `assets/stickers/glyphs.tsv`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from studio.errors import MissingPart
from studio.paths import assets_dir

FONT_SIZE = 109  # the only size of the CBDT bitmaps
FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (252, 222, 84),
    "orange": (247, 152, 53),
    "red": (222, 60, 55),
    "pink": (248, 164, 198),
    "purple": (146, 92, 190),
    "blue": (70, 132, 222),
    "green": (88, 176, 92),
    "brown": (136, 92, 62),
    "grey": (158, 160, 164),
    "black": (34, 34, 38),
}
TINTS = ("yellow", "orange", "red", "pink", "purple", "blue", "green", "brown")
SIZES = {"small": 0.32, "": 0.52, "large": 0.80}  # longest side of the thing as a fraction of the canvas
POSITIONS = {
    "": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
RELATIONS = {"on the left of": (1, 0), "on the right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
PAIR_SIZE = 0.40


@dataclass(frozen=True)
class Glyph:
    """One emoji: its character, its plain name, and its split.

    `train`: the base knows it. `held-out`: no network has seen it; a new subject for tests and comparisons.
    `other`: only the autoencoder has seen it, without a caption.
    """

    character: str
    name: str
    split: str


@dataclass(frozen=True)
class Thing:
    """A glyph as it is drawn: `tint` is a colour of `TINTS` or "" for its own colours, `size` a key of `SIZES`."""

    glyph: Glyph
    tint: str = ""
    size: str = ""

    def phrase(self) -> str:
        """A noun phrase, such as "a small blue cup"."""
        words = " ".join(word for word in (self.size, self.tint, self.glyph.name) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Ground:
    """The background: a colour, or a pattern of two colours."""

    colour: str = "white"
    pattern: str = "plain"
    second: str = "white"

    def phrase(self) -> str:
        if self.pattern == "plain":
            return f"{self.colour} background"
        return f"{self.colour} and {self.second} {self.pattern} background"


@dataclass(frozen=True)
class Scene:
    """One or two things on a ground. With two, `relation` says where the first stands as seen from the second."""

    things: tuple[Thing, ...]
    ground: Ground = Ground()
    position: str = ""
    relation: str = ""

    def caption(self, rng: np.random.Generator) -> str:
        """A sentence that tells the scene; white grounds may go unsaid."""
        if self.relation:
            subject = f"{self.things[0].phrase()} {self.relation} {self.things[1].phrase()}"
        else:
            subject = f"{self.things[0].phrase()} {self.position}".rstrip()
        subject = ("", "", "a sticker of ", "a picture of ")[rng.integers(4)] + subject
        if self.ground == Ground() and rng.random() < 0.5:
            return subject
        ground = self.ground.phrase()
        article = "an" if ground[0] in "aeiou" else "a"
        return f"{subject}, on {article} {ground}"


def font_path() -> Path | None:
    """Where the emoji font lies on this machine, if anywhere."""
    return next((Path(path) for path in FONT_PATHS if Path(path).exists()), None)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = font_path()
    if path is None:
        raise MissingPart(
            "the colour emoji font is not installed, and the data source 'stickers' draws with it",
            hint="install the package fonts-noto-color-emoji (Debian, Ubuntu) or noto-fonts-emoji (Arch, Fedora)",
        )
    return ImageFont.truetype(str(path), FONT_SIZE)


@lru_cache(maxsize=1)
def all_glyphs() -> tuple[Glyph, ...]:
    """The whole table, in its order."""
    with (assets_dir() / "stickers" / "glyphs.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return tuple(Glyph(chr(int(r["codepoint"], 16)), r["name"], r["split"]) for r in rows)


def glyphs(*splits: str) -> tuple[Glyph, ...]:
    """The glyphs of the given splits, in the table's order."""
    return tuple(glyph for glyph in all_glyphs() if glyph.split in splits)


@lru_cache(maxsize=8192)
def picture(character: str, tint: str = "") -> Image.Image:
    """The emoji as a tightly cropped RGBA picture, about 128 px, in its own colours or tinted."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), character, font=_font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font has no picture for U+{ord(character):X}")
    cropped = canvas.crop(box)
    return _tinted(cropped, COLOURS[tint]) if tint else cropped


def _tinted(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Keeps light and dark, replaces the hue: black - colour - white along the luminance."""
    rgba = np.asarray(image).astype(np.float32)
    light = (rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255.0)[..., None]
    # The middle of the ramp is the colour itself; the exponent lifts dark glyphs so that the colour shows.
    light = light**0.7
    tone = np.array(colour, np.float32)
    ramp = np.where(light < 0.6, tone * (0.25 + 0.75 * light / 0.6), tone + (255 - tone) * 0.8 * (light - 0.6) / 0.4)
    return Image.fromarray(np.concatenate([ramp, rgba[..., 3:]], -1).clip(0, 255).astype(np.uint8))


def draw_scene(rng: np.random.Generator, choices: Sequence[Glyph]) -> Scene:
    """A random scene over the given glyphs: a fifth are pairs, a quarter of the things are tinted."""
    first = choices[int(rng.integers(len(choices)))]
    ground = _draw_ground(rng)
    if rng.random() < 0.2 and len(choices) > 1:
        second = first
        while second == first:
            second = choices[int(rng.integers(len(choices)))]
        things = (Thing(first, _draw_tint(rng, ground)), Thing(second, _draw_tint(rng, ground)))
        return Scene(things, ground, relation=list(RELATIONS)[rng.integers(len(RELATIONS))])
    size = ("", "", "small", "large")[rng.integers(4)]
    roaming = size != "large" and rng.random() < 0.5
    position = list(POSITIONS)[rng.integers(1, len(POSITIONS))] if roaming else ""
    return Scene((Thing(first, _draw_tint(rng, ground), size),), ground, position)


def draw_alone(rng: np.random.Generator, choices: Sequence[Glyph]) -> Scene:
    """One thing in its own colours on a plain ground: what teaches shapes."""
    glyph = choices[int(rng.integers(len(choices)))]
    return Scene((Thing(glyph),), Ground(list(COLOURS)[rng.integers(len(COLOURS))]) if rng.random() < 0.5 else Ground())


def _draw_tint(rng: np.random.Generator, ground: Ground) -> str:
    if rng.random() > 0.25:
        return ""
    usable = [tint for tint in TINTS if tint not in (ground.colour, ground.second if ground.pattern != "plain" else "")]
    return usable[rng.integers(len(usable))]


def _draw_ground(rng: np.random.Generator) -> Ground:
    if rng.random() < 0.35:
        return Ground()
    names = list(COLOURS)
    colour = names[rng.integers(len(names))]
    if rng.random() < 0.7:
        return Ground(colour)
    second = colour
    while second == colour:
        second = names[rng.integers(len(names))]
    return Ground(colour, PATTERNS[rng.integers(1, len(PATTERNS))], second)


def render(scene: Scene, resolution: int, rng: np.random.Generator, fill: float | None = None) -> Image.Image:
    """The scene as an RGB picture of `resolution` x `resolution` pixels, with small jitter in place, size and turn.

    `fill` replaces the size of a single thing: its longest side as a fraction of the canvas.
    """
    canvas = _render_ground(scene.ground, resolution)
    if scene.relation:
        x, y = RELATIONS[scene.relation]
        shift = 0.24
        places = [(0.5 - shift * x, 0.5 - shift * y), (0.5 + shift * x, 0.5 + shift * y)]
        sizes = [PAIR_SIZE, PAIR_SIZE]
    else:
        places = [POSITIONS[scene.position]]
        sizes = [fill or SIZES[scene.things[0].size]]
    for thing, place, size in zip(scene.things, places, sizes, strict=True):
        sprite = picture(thing.glyph.character, thing.tint)
        scale = size * rng.uniform(0.93, 1.07) * resolution / max(sprite.size)
        shape = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
        sprite = sprite.resize(shape, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            sprite = sprite.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
        jitter = rng.uniform(-0.025, 0.025, 2)
        left = round((place[0] + jitter[0]) * resolution - sprite.width / 2)
        top = round((place[1] + jitter[1]) * resolution - sprite.height / 2)
        canvas.paste(sprite, (left, top), sprite)
    return canvas


@lru_cache(maxsize=512)
def _ground_pixels(ground: Ground, resolution: int) -> Image.Image:
    first, second = COLOURS[ground.colour], COLOURS[ground.second]
    scale = 4  # supersampled, so that edges are smooth
    side = resolution * scale
    y, x = np.mgrid[0:side, 0:side] / side
    if ground.pattern == "striped":
        mask = np.floor(x * 8) % 2 == 1
    elif ground.pattern == "dotted":
        mask = ((x * 6) % 1 - 0.5) ** 2 + ((y * 6) % 1 - 0.5) ** 2 < 0.06
    elif ground.pattern == "checkered":
        mask = (np.floor(x * 6) + np.floor(y * 6)) % 2 == 1
    else:
        return Image.new("RGB", (resolution, resolution), first)
    pixels = np.where(mask[..., None], np.array(second), np.array(first)).astype(np.uint8)
    return Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BOX)


def _render_ground(ground: Ground, resolution: int) -> Image.Image:
    return _ground_pixels(ground, resolution).copy()


def sample(
    rng: np.random.Generator,
    resolution: int,
    choices: Sequence[Glyph],
    alone: float = 0.0,
    fill: float | None = None,
) -> tuple[Image.Image, str, Scene]:
    """One random picture with its caption and the scene behind it.

    With probability `alone` it shows one thing in the middle, in its own colours and, if `fill` is given, so large.
    """
    simple = rng.random() < alone if alone else False
    scene = draw_alone(rng, choices) if simple else draw_scene(rng, choices)
    return render(scene, resolution, rng, fill if simple else None), scene.caption(rng), scene


def vocabulary() -> list[str]:
    """Every word that a caption can hold, trained or held out, for the base's tokenizer."""
    fixed = "a an and of on the at left right top bottom above below sticker picture background small large".split()
    words = set(fixed) | set(COLOURS) | set(PATTERNS)
    words |= {word for glyph in glyphs("train", "held-out") for word in glyph.name.split()}
    return sorted(words)
