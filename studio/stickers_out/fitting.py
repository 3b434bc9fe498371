"""A clip fitted to a platform's limits: canvas, time, frames, then quality by bisection until the bytes suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from studio.data.clip_files import apng_bytes, gif_bytes, webp_bytes
from studio.data.clips import Clip, fitted_to, walk
from studio.data.video_files import video_facts, webm_bytes
from studio.errors import DataError, RequestError, WorkError
from studio.files import write_atomically
from studio.stickers_out.limits import Limits

MARGIN = 0.03  # of the canvas, left free on each side
QUALITIES = tuple(range(5, 96))
COLOURS = (8, 16, 32, 64, 128, 256)
CRFS = tuple(range(63, 9, -3))  # VP9's, from worst to best


@dataclass(frozen=True)
class Written:
    """What was written: the file, and what reading it again found."""

    path: Path
    facts: dict[str, Any]


def write_sticker(clip: Clip, limits: Limits, path: Path) -> Written:
    """Fits, encodes, writes, reads again and checks. Raises RequestError, DataError, WorkError, DiskError."""
    if path.suffix.lower() != limits.ending:
        raise RequestError(f"a sticker for {limits.name} is a {limits.ending} file", f"use {path.stem}{limits.ending}")
    fitted = fit_clip(clip, limits)
    content, quality = encode(fitted, limits)
    write_atomically(path, content)
    return Written(path, {"for": limits.name, "quality": quality, **check(path, limits)})


# -- shape and time ----------------------------------------------------------------------------------------------


def fit_clip(clip: Clip, limits: Limits) -> Clip:
    """The clip on the platform's canvas, within its time and its number of frames. Raises DataError for a still."""
    if len(clip.frames) < 2:
        raise DataError(f"the clip has one frame, and a sticker for {limits.name} moves", "give an animated clip")
    clip = _telling_first(clip)
    if limits.canvas:
        clip = Clip(tuple(fitted_to(frame, limits.canvas, MARGIN) for frame in clip.frames), clip.durations, clip.loop)
    return _timed(_counted(clip, limits), limits)


def _telling_first(clip: Clip) -> Clip:
    """A looping clip turned so that the fullest frame comes first: players show it when they stop."""
    mass = [int(np.asarray(frame.getchannel("A"), np.int64).sum()) for frame in clip.frames]
    best = max(mass)
    if not clip.loop or mass[0] >= 0.9 * best:
        return clip
    start = mass.index(best)
    return Clip(clip.frames[start:] + clip.frames[:start], clip.durations[start:] + clip.durations[:start], clip.loop)


def _counted(clip: Clip, limits: Limits) -> Clip:
    """Held frames where there are too few, dropped ones where there are too many; the time stays."""
    count = max(limits.least_frames, min(len(clip.frames), limits.most_frames or len(clip.frames)))
    return clip if count == len(clip.frames) else resampled(clip, count)


def resampled(clip: Clip, count: int) -> Clip:
    """`count` frames spread evenly over the frames of the clip, in the same total time."""
    chosen = [index * len(clip.frames) // count for index in range(count)]
    each = [round(sum(clip.durations) * (i + 1) / count) - round(sum(clip.durations) * i / count) for i in range(count)]
    return Clip(tuple(clip.frames[i] for i in chosen), tuple(each), clip.loop)


def _timed(clip: Clip, limits: Limits) -> Clip:
    total = sum(clip.durations)
    wanted = float(total)
    if limits.most_seconds:
        wanted = min(wanted, limits.most_seconds * 1000)
    if limits.whole_seconds:
        wanted = max(1000, round(wanted / 1000) * 1000)
    wanted = max(wanted, limits.least_ms * len(clip.frames))
    ends = [round(sum(clip.durations[: i + 1]) * wanted / total) for i in range(len(clip.frames))]
    durations = [end - start for start, end in zip([0, *ends], ends)]
    return Clip(clip.frames, tuple(max(limits.least_ms, ms) for ms in durations), clip.loop)


# -- bytes -------------------------------------------------------------------------------------------------------


def encode(clip: Clip, limits: Limits) -> tuple[bytes, str]:
    """The best encoding within the bytes, and its quality in words; fewer frames where no quality suffices."""
    while True:
        found = _best(clip, limits)
        if found is not None:
            return found
        fewer = len(clip.frames) * 3 // 4
        if fewer < max(2, limits.least_frames):
            raise WorkError(
                f"the clip cannot be made smaller than {limits.most_bytes} bytes for {limits.name}",
                "use a plainer clip, or fewer frames",
            )
        clip = resampled(clip, fewer)


def _best(clip: Clip, limits: Limits) -> tuple[bytes, str] | None:
    loops = _loops(clip, limits)
    if limits.ending == ".gif":
        return gif_bytes(clip), "256 colours"
    if limits.rate is not None:
        rate = limits.rate
        return _largest_that_fits(CRFS, lambda crf: webm_bytes(clip, crf, rate), limits.most_bytes, "crf")
    if limits.ending == ".webp":
        return _largest_that_fits(QUALITIES, lambda q: webp_bytes(clip, q), limits.most_bytes, "quality")
    whole = apng_bytes(clip, loops=loops)
    if limits.most_bytes is None or len(whole) <= limits.most_bytes:
        return whole, "lossless"
    return _largest_that_fits(COLOURS, lambda c: apng_bytes(clip, c, loops), limits.most_bytes, "colours")


def _loops(clip: Clip, limits: Limits) -> int:
    """How often it plays; 0 is without end."""
    if limits.most_loops is None or limits.most_seconds is None:
        return 0 if clip.loop else 1
    fitting = int(limits.most_seconds * 1000) // max(1, sum(clip.durations))
    return max(1, min(limits.most_loops, fitting)) if clip.loop else 1


def _largest_that_fits(
    steps: Sequence[int], encoded: Callable[[int], bytes], most: int | None, unit: str
) -> tuple[bytes, str] | None:
    """Bisection for the highest step whose encoding has at most `most` bytes; None if not even the lowest has."""
    if most is None:
        return encoded(90), f"{unit} 90"
    low, high, best = 0, len(steps) - 1, None
    middle = high  # most clips fit at the best quality
    while low <= high:
        content = encoded(steps[middle])
        if len(content) <= most:
            best, low = (content, f"{unit} {steps[middle]}"), middle + 1
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return best


# -- check -------------------------------------------------------------------------------------------------------


def check(path: Path, limits: Limits) -> dict[str, Any]:
    """What a file holds, read again. Raises WorkError if it breaks a limit of the platform."""
    frames = list(walk(path))
    loops, video = 0, {}
    if limits.rate is not None:
        video = video_facts(path)
    else:
        with Image.open(path) as file:
            loops = int(file.info.get("loop", 1))
    times = [ms for _, ms in frames]
    facts: dict[str, Any] = {
        "bytes": path.stat().st_size,
        "width": frames[0][0].width,
        "height": frames[0][0].height,
        "frames": len(frames),
        "seconds": sum(times) / 1000,
        "loops": loops,
        "transparent": any(picture.getchannel("A").getextrema()[0] == 0 for picture, _ in frames),
    } | video
    faults = [text for broken, text in _faults(facts, min(times), limits) if broken]
    if faults:
        raise WorkError(f"'{path}' does not keep the limits of {limits.name}: {', '.join(faults)}")
    return facts


def _faults(facts: dict[str, Any], least_ms: int, limits: Limits) -> list[tuple[bool, str]]:
    played = facts["seconds"] * (facts["loops"] if limits.most_loops else 1)
    return [
        (limits.canvas is not None and (facts["width"], facts["height"]) != limits.canvas, "wrong size"),
        (limits.most_bytes is not None and facts["bytes"] > limits.most_bytes, f"{facts['bytes']} bytes"),
        (limits.most_seconds is not None and played > limits.most_seconds + 1e-6, f"{played} s"),
        (facts["frames"] < limits.least_frames, f"{facts['frames']} frames"),
        (
            limits.most_frames is not None and limits.rate is None and facts["frames"] > limits.most_frames,
            f"{facts['frames']} frames",
        ),
        (limits.rate is None and least_ms < limits.least_ms, f"a frame of {least_ms} ms"),
        (limits.most_loops is not None and not 1 <= facts["loops"] <= limits.most_loops, f"{facts['loops']} loops"),
        (limits.whole_seconds and facts["seconds"] % 1 != 0, f"{facts['seconds']} s, not whole"),
        (facts.get("codec", "vp9") != "vp9", f"codec {facts.get('codec')}"),
        (facts.get("fps", 0) > (limits.rate or 0), f"{facts.get('fps')} frames a second"),
        (bool(facts.get("audio")), "sound"),
        (limits.rate is not None and facts["transparent"] and not facts["alpha"], "transparency that is not announced"),
    ]
