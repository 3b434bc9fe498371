"""WebM and MP4 through PyAV, an extra: reading them with their transparency, and writing WebM with it.

VP9 keeps alpha as a second picture in each packet. FFmpeg's own VP9 decoder drops it; libvpx's, asked for by name,
does not.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from studio.data.clips import Clip
from studio.errors import DataError, MissingPart

USUAL_MS = 40  # of a frame whose file does not say
CRF = 30  # of 63, where 0 is the best
INSTALL = "pip install 'av>=18.1,<19'"


def video_library(purpose: str) -> ModuleType:
    """PyAV. Raises MissingPart with the command that installs it."""
    try:
        import av
    except ModuleNotFoundError:
        raise MissingPart(f"{purpose} needs the package 'av'", INSTALL) from None
    return av


def walk_video(path: Path, content: BinaryIO | None = None) -> Iterator[tuple[Image.Image, int]]:
    """(RGBA picture, milliseconds) of each frame of a video in order, read from `content` if that is given.

    Raises DataError, MissingPart.
    """
    av = video_library(f"'{path}' is a video, and reading it")
    try:
        with av.open(content or str(path)) as container:
            if not container.streams.video:
                raise DataError(f"'{path}' has no pictures in it", "give a video, or remove it")
            stream = container.streams.video[0]
            usual = round(1000 / float(stream.average_rate)) if stream.average_rate else USUAL_MS
            waiting: tuple[Image.Image, float | None] | None = None
            for frame in _decoded(av, container, stream):
                seconds = float(frame.pts * stream.time_base) if frame.pts is not None else None
                if waiting is not None:
                    yield waiting[0], _milliseconds(waiting[1], seconds, usual)
                waiting = Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"), seconds
            if waiting is not None:
                yield waiting[0], usual
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"'{path}' is no video that can be read: {error}", "copy it again, or remove it") from None


def _decoded(av: ModuleType, container: Any, stream: Any) -> Iterator[Any]:
    if stream.codec_context.name not in ("vp9", "vp8"):
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create({"vp9": "libvpx-vp9", "vp8": "libvpx"}[stream.codec_context.name], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)  # the last packet is empty and asks for what is left


def _milliseconds(start: float | None, end: float | None, usual: int) -> int:
    if start is None or end is None or end <= start:
        return usual
    return max(1, round(1000 * (end - start)))


def video_facts(path: Path) -> dict[str, Any]:
    """Codec, frames a second, whether the file says that it has alpha, and audio tracks. Raises MissingPart."""
    av = video_library("checking a video")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 0)
        alpha = stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE", "0"))
        tracks = len(container.streams.audio)
        return {"codec": stream.codec_context.name, "fps": rate, "alpha": alpha == "1", "audio": tracks}


def webm_bytes(clip: Clip, crf: int = CRF, fps: int = 30, told: Mapping[str, Any] | None = None) -> bytes:
    """WebM: VP9 with alpha, no sound, at a constant rate; a frame that is shown longer is repeated.

    `crf` is the quality, from 63 up to 0. Sides must be even. Raises MissingPart.
    """
    av = video_library("writing WebM")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        if told:
            container.metadata["comment"] = str(dict(told))
        stream = container.add_stream("libvpx-vp9", rate=Fraction(fps))
        stream.width, stream.height = clip.size
        stream.pix_fmt = "yuva420p"
        # Without alternate references, which cannot carry alpha.
        stream.options = {"crf": str(crf), "b": "0", "auto-alt-ref": "0", "deadline": "good", "cpu-used": "5"}
        for number, index in enumerate(shown_at(clip, fps)):
            frame = av.VideoFrame.from_ndarray(np.asarray(clip.frames[index].convert("RGBA")), format="rgba")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def shown_at(clip: Clip, fps: int) -> list[int]:
    """Which frame of the clip is shown in each frame of a video of constant rate; every frame once at least."""
    shown: list[int] = []
    elapsed = 0
    for index, milliseconds in enumerate(clip.durations):
        elapsed += milliseconds
        shown += [index] * max(1, round(elapsed * fps / 1000) - len(shown))
    return shown
