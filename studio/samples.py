"""Pictures as files: names, metadata, grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from studio.files import disk_error
from studio.run import Event, Run


def to_picture(pixels: Tensor) -> Image.Image:
    """A PIL picture from (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


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
