"""Draws the example subject: Blip, a teal three-eyed creature that no emoji resembles, in eight settings.

Run it from anywhere: `python assets/examples/draw_mascot.py`. The pictures are ours (Apache-2.0, as the rest).
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SCALE = 256, 4  # drawn four times larger, then reduced
INK, TEAL, MINT, CREAM = (24, 58, 66), (38, 166, 154), (120, 216, 196), (255, 243, 214)
CORAL, GOLD, WHITE = (255, 111, 89), (255, 196, 61), (255, 255, 255)

Point = tuple[float, float]

# name, ground, centre of the body (fractions), size, turn in degrees, left arm up, caption
SETTINGS = [
    ("01-white", (255, 255, 255), (0.5, 0.52), 0.62, 0, False, "a {trigger}"),
    ("02-yellow", (252, 222, 84), (0.5, 0.52), 0.62, 6, True, "a {trigger}, on a yellow background"),
    ("03-left-blue", (70, 132, 222), (0.3, 0.52), 0.5, -5, True, "a {trigger} on the left, on a blue background"),
    ("04-right-white", (255, 255, 255), (0.7, 0.52), 0.5, 4, False, "a {trigger} on the right"),
    ("05-large-pink", (248, 164, 198), (0.5, 0.5), 0.86, 0, True, "a large {trigger}, on a pink background"),
    ("06-small-white", (255, 255, 255), (0.5, 0.5), 0.36, 0, False, "a small {trigger}"),
    ("07-green", (88, 176, 92), (0.5, 0.52), 0.6, -8, False, "a {trigger}, on a green background"),
    ("08-grey", (158, 160, 164), (0.5, 0.54), 0.66, 3, True, "a {trigger}, on a grey background"),
]


def mascot(arm_up: bool) -> Image.Image:
    """The creature on a transparent square, one unit of 100 wide."""
    side = SIDE * SCALE
    unit = side / 100
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)

    def circle(x: float, y: float, r: float, fill: tuple[int, int, int], ink: float = 1.6, squash: float = 1.0) -> None:
        box = [(x - r) * unit, (y - r * squash) * unit, (x + r) * unit, (y + r * squash) * unit]
        draw.ellipse(box, fill=fill, outline=INK if ink else None, width=round(ink * unit))

    def limb(points: list[Point], width: float) -> None:
        for thick, fill in ((width + 3.2, INK), (width, TEAL)):
            draw.line([(x * unit, y * unit) for x, y in points], fill=fill, width=round(thick * unit), joint="curve")
            for x, y in (points[0], points[-1]):
                r = thick / 2
                draw.ellipse([(x - r) * unit, (y - r) * unit, (x + r) * unit, (y + r) * unit], fill=fill)

    for x, lean in ((36, -8), (64, 8)):  # antennae with golden bulbs
        draw.line([(x * unit, 26 * unit), ((x + lean) * unit, 9 * unit)], fill=INK, width=round(3 * unit))
        circle(x + lean, 8, 5.4, GOLD)
    limb([(24, 58), (10, 40)] if arm_up else [(24, 58), (10, 70)], 8)
    limb([(76, 58), (90, 70)], 8)
    for x in (38, 62):  # boots
        circle(x, 90, 10, CORAL, squash=0.72)
    circle(50, 56, 32, TEAL, ink=2.2, squash=1.06)
    circle(50, 68, 19, CREAM, ink=0)
    for y, half in ((62, 17.5), (69, 18.8), (76, 17)):  # coral stripes on the belly
        draw.line([((50 - half) * unit, y * unit), ((50 + half) * unit, y * unit)], fill=CORAL, width=round(2.6 * unit))
    for x, y, r in ((50, 36, 9.5), (33, 44, 6.5), (67, 44, 6.5)):  # three eyes
        circle(x, y, r, WHITE)
        circle(x, y + 0.6, r * 0.48, INK, ink=0)
        circle(x - r * 0.2, y - r * 0.2, r * 0.17, WHITE, ink=0)
    draw.arc([42 * unit, 43 * unit, 58 * unit, 56 * unit], 20, 160, fill=INK, width=round(2.2 * unit))
    for x in (27, 73):  # freckles
        circle(x, 56, 3, MINT, ink=0)
    return image


def place(
    name: str, ground: tuple[int, int, int], centre: Point, size: float, turn: float, arm_up: bool
) -> Image.Image:
    side = SIDE * SCALE
    canvas = Image.new("RGBA", (side, side), (*ground, 255))
    sprite = mascot(arm_up).rotate(turn, Image.Resampling.BICUBIC)
    width = math.ceil(side * size)
    sprite = sprite.resize((width, width), Image.Resampling.LANCZOS)
    canvas.alpha_composite(sprite, (round(centre[0] * side - width / 2), round(centre[1] * side - width / 2)))
    return canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    folder = Path(__file__).parent / "mascot"
    folder.mkdir(exist_ok=True)
    for name, *setting, caption in SETTINGS:
        place(*setting).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
