"""Pictures as files: names, metadata, grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from studio.files import disk_error
from studio.run import Event, Run


def to_picture(pixels: Tensor) -> Image.Image:
    """A PIL picture from (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def save_image(picture: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Writes a picture in the format of its suffix, with its making told inside. Raises DiskError."""
    if path.suffix.lower() == ".png":
        save_png(picture, path, facts)
        return
    exif = Image.Exif()
    exif[0x010E] = json.dumps(facts, sort_keys=True)  # ImageDescription
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95, exif=exif)
    except OSError as error:
        raise disk_error(path, error) from error


def save_png(picture: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Writes a PNG with its making told inside, under the text key `studio`. Raises DiskError."""
    info = PngInfo()
    info.add_text("studio", json.dumps(facts, sort_keys=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=info)
    except OSError as error:
        raise disk_error(path, error) from error


def save_picture(run: Run, picture: Image.Image | Tensor, step: int, column: int, prompt: str, seed: int) -> Event:
    """Stores a training sample as `samples/<step>-<column>.png` and returns its event."""
    if isinstance(picture, Tensor):
        picture = to_picture(picture)
    path = run.samples / f"{step:06d}-{column}.png"
    save_png(picture, path, {"prompt": prompt, "seed": seed, "step": step})
    return Event("sample", step, {"path": str(path.relative_to(run.folder)), "prompt": prompt, "seed": seed})


def grid(rows: list[list[Image.Image]], gap: int = 4, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Pictures of one size in rows and columns."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), ground)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet


def before_after(run: Run) -> Path | None:
    """Writes `before-after.png`: the base above, the last samples below, the same prompts and seeds in each column."""
    samples = [event for event in run.history() if event["kind"] == "sample"]
    steps = sorted({event["step"] for event in samples})
    if len(steps) < 2:
        return None
    shown = [[event for event in samples if event["step"] == step] for step in (steps[0], steps[-1])]
    rows = [[Image.open(run.folder / event["path"]).convert("RGB") for event in row] for row in shown]
    path = run.folder / "before-after.png"
    titles = [event["prompt"] for event in shown[-1]]
    save_png(labelled_grid(rows, titles, ["base", f"step {steps[-1]}"]), path, {"prompts": titles})
    return path


def labelled_grid(rows: list[list[Image.Image]], columns: list[str], names: list[str]) -> Image.Image:
    """A grid with a caption over each column and a name beside each row."""
    font = ImageFont.load_default(13)
    sheet = grid(rows)
    width = rows[0][0].width
    wrapped = [wrap_text(text, width, font) for text in columns]
    head, side = 18 * max(map(len, wrapped)) + 6, 72
    canvas = Image.new("RGB", (sheet.width + side, sheet.height + head), (255, 255, 255))
    canvas.paste(sheet, (side, head))
    draw = ImageDraw.Draw(canvas)
    for x, lines in enumerate(wrapped):
        draw.multiline_text((side + x * (width + 4), 2), "\n".join(lines), fill=(40, 44, 52), font=font)
    for y, name in enumerate(names):
        draw.text((4, head + y * (rows[0][0].height + 4) + 4), name, fill=(40, 44, 52), font=font)
    return canvas


def wrap_text(text: str, width: int, font: Any) -> list[str]:
    """The text as lines of at most `width` pixels; a single longer word stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
