"""Writing clips: animated WebP, APNG, GIF and WebM with transparency and times; no frame ghosts through the next."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from studio.data.clips import Clip
from studio.data.video_files import webm_bytes
from studio.errors import RequestError
from studio.files import write_atomically

CLIP_ENDINGS = (".webp", ".png", ".gif", ".webm")
UNSEEN = 8  # of 255: an alpha below is nothing to an eye
OPAQUE_FROM = 128  # of 255: a GIF's pixels are there or not


def save_clip(clip: Clip, path: Path, facts: dict[str, Any]) -> None:
    """Writes a clip in the format of its suffix. Raises RequestError for another, MissingPart, DiskError."""
    writers: dict[str, Any] = {".webp": webp_bytes, ".png": apng_bytes, ".gif": gif_bytes, ".webm": webm_bytes}
    if path.suffix.lower() not in writers:
        raise RequestError(f"cannot write clips as '{path.suffix}'", f"use {', '.join(CLIP_ENDINGS)}")
    write_atomically(path, writers[path.suffix.lower()](clip, told=facts))


def webp_bytes(clip: Clip, quality: int = 90, told: Mapping[str, Any] | None = None) -> bytes:
    """Animated WebP; alpha is kept exactly at any quality. `told` is written inside."""
    return _saved(distinct(clip), "WEBP", told, quality=quality, method=4, alpha_quality=100, exact=True)


def apng_bytes(
    clip: Clip, colours: int | None = None, loops: int | None = None, told: Mapping[str, Any] | None = None
) -> bytes:
    """APNG, lossless; with `colours`, of one palette for all frames. `loops` 0 is without end."""
    if colours is None:
        return _saved(distinct(clip), "PNG", told, loops, disposal=1, blend=0)
    reduced = Clip(tuple(with_palette(clip.frames, colours)), clip.durations, clip.loop)
    return _saved(reduced, "PNG", told, loops, disposal=0, blend=0)


def gif_bytes(clip: Clip, colours: int = 255, told: Mapping[str, Any] | None = None) -> bytes:
    """GIF: pixels are opaque or clear, times in steps of 10 ms, each frame wiped before the next."""
    frames = tuple(_gif_frame(_hardened(frame), colours) for frame in clip.frames)
    durations = tuple(max(20, round(ms / 10) * 10) for ms in clip.durations)
    options = {"disposal": 2, "transparency": colours, "optimize": False}
    return _saved(Clip(frames, durations, clip.loop), "GIF", told, **options)


def _saved(clip: Clip, kind: str, told: Mapping[str, Any] | None, loops: int | None = None, **options: Any) -> bytes:
    first, *rest = clip.frames
    buffer = io.BytesIO()
    options |= _told_inside(kind, told)
    if rest:
        loops = (0 if clip.loop else 1) if loops is None else loops
        options |= {"save_all": True, "append_images": rest, "duration": list(clip.durations), "loop": loops}
    else:
        options = {name: value for name, value in options.items() if name not in ("disposal", "blend")}
    first.save(buffer, kind, **options)
    return buffer.getvalue()


def _told_inside(kind: str, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """How each format takes a clip's making: as a text, a comment or a description."""
    if not told:
        return {}
    text = json.dumps(told, sort_keys=True)
    if kind == "PNG":
        info = PngInfo()
        info.add_text("studio", text)
        return {"pnginfo": info}
    if kind == "GIF":
        return {"comment": text.encode()}
    exif = Image.Exif()
    exif[0x010E] = text  # ImageDescription
    return {"exif": exif}


def distinct(clip: Clip) -> Clip:
    """The clip with frames that all differ from the one before and are not empty, by a corner nobody sees.

    The writers merge equal neighbours, and in an APNG an empty frame with the wiped one before; a merged frame is
    missing where a platform counts frames.
    """
    frames = [clip.frames[0]]
    for frame in clip.frames[1:]:
        candidates = (_with_corner(frame, by) for by in (0, 1, 2))
        frames.append(next(c for c in candidates if c.getbbox() and c.tobytes() != frames[-1].tobytes()))
    return Clip(tuple(frames), clip.durations, clip.loop)


def _with_corner(frame: Image.Image, by: int) -> Image.Image:
    """The frame with the alpha of its first pixel moved by so many steps of 255."""
    if by == 0:
        return frame
    frame = frame.copy()
    corner: Any = frame.getpixel((0, 0))
    red, green, blue, a = corner
    frame.putpixel((0, 0), (red, green, blue, a + by if a + by <= 255 else a - by))
    return frame


def with_palette(frames: Sequence[Image.Image], colours: int) -> list[Image.Image]:
    """The frames in one palette of RGBA colours, chosen over all of them together."""
    width, height = frames[0].size
    tall = Image.new("RGBA", (width, height * len(frames)))
    for index, frame in enumerate(frames):
        tall.paste(_cleared(frame, UNSEEN), (0, index * height))
    reduced = _with_a_clear_colour(tall.quantize(colours, Image.Quantize.FASTOCTREE))
    cut = [reduced.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames))]
    for before, after in pairwise(cut):
        if before.tobytes() == after.tobytes():  # see `distinct`; the clearest two colours take turns in a corner
            palette: Any = reduced.palette
            alphas = np.array(list(palette.colors))[:, 3]
            first, second = (int(i) for i in np.argsort(alphas, kind="stable")[:2])
            after.putpixel((0, 0), second if before.getpixel((0, 0)) == first else first)
    return cut


def _with_a_clear_colour(reduced: Image.Image) -> Image.Image:
    """The picture with the clearest colour of its palette wholly clear, if it is so nearly.

    A colour of a palette is the mean of what it stands for: a faint haze somewhere would leave no ground clear.
    """
    colours = np.array(reduced.getpalette("RGBA"), np.uint8).reshape(-1, 4)
    used = np.unique(np.asarray(reduced))
    clearest = used[colours[used, 3].argmin()]
    if colours[clearest, 3] < UNSEEN:
        colours[clearest] = 0
        reduced.putpalette(colours.tobytes(), "RGBA")
    return reduced


def _cleared(frame: Image.Image, below: int) -> Image.Image:
    """The frame without its pixels of less alpha, or of their colours."""
    pixels = np.array(frame.convert("RGBA"))
    pixels[pixels[..., 3] < below] = 0
    return Image.fromarray(pixels, "RGBA")


def _hardened(frame: Image.Image) -> Image.Image:
    pixels = np.array(_cleared(frame, OPAQUE_FROM))
    pixels[pixels[..., 3] > 0, 3] = 255
    return Image.fromarray(pixels, "RGBA")


def _gif_frame(frame: Image.Image, colours: int) -> Image.Image:
    """A palette picture whose last index is the clear one."""
    reduced = frame.convert("RGB").quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    indices = np.array(reduced)
    indices[np.asarray(frame)[..., 3] == 0] = colours
    picture = Image.fromarray(indices, "P")
    picture.putpalette([*(reduced.getpalette() or [])[: 3 * colours], 0, 0, 0])
    picture.info["transparency"] = colours
    return picture
