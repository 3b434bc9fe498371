"""Draws the example style: stickers as two-colour prints, indigo ink on peach paper, in twelve pictures.

Run it from anywhere: `python assets/examples/draw_style.py`. It needs the studio and the colour emoji font; what is
drawn with the font is free of the font's licence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from studio.data.stickers import glyphs, picture

SIDE = 256
PAPER, INK, MIDDLE = np.array([255, 214, 186.0]), np.array([46, 40, 110.0]), np.array([238, 120, 122.0])
NAMES = "dog cat apple cup rocket tree house fish guitar car owl mushroom".split()


def printed(character: str) -> Image.Image:
    """The emoji in three flat tones of two inks, with an inked outline."""
    sprite = picture(character)
    sprite = sprite.resize((round(sprite.width * 150 / sprite.height), 150), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    canvas.paste(sprite, ((SIDE - sprite.width) // 2, (SIDE - sprite.height) // 2), sprite)
    rgba = np.asarray(canvas).astype(float)
    light = rgba[..., :3] @ [0.299, 0.587, 0.114] / 255
    inside = rgba[..., 3:] / 255
    tones = np.where(light[..., None] < 0.38, INK, np.where(light[..., None] < 0.72, MIDDLE, PAPER))
    outline = np.asarray(canvas.getchannel("A").filter(ImageFilter.MaxFilter(9))).astype(float)[..., None] / 255
    pixels = PAPER * (1 - outline) + INK * outline
    pixels = pixels * (1 - inside) + tones * inside
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def main() -> None:
    folder = Path(__file__).parent / "riso"
    folder.mkdir(exist_ok=True)
    known = {glyph.name: glyph for glyph in glyphs("train")}
    for name in NAMES:
        printed(known[name].character).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(f"a {{trigger}} {name}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
