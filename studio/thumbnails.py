"""Small versions of what people bring along, decoded in a process of its own with limits on pixels, memory and time.

Of pictures a picture, of clips a small clip, of sounds their waveform. A file made to exhaust or confuse a decoder
only ends that process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CLIP_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".webm", ".mp4", ".mov")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
VIDEO_SUFFIXES = (".webm", ".mp4", ".mov")  # that Pillow does not read
MOST_FRAMES = 48  # that a clip's thumbnail has
MOST_PIXELS = 64_000_000
MEMORY_BYTES = 2 << 30
SECONDS_EACH = 10


def make_thumbnails(pictures: list[Path], folder: Path, side: int = 256) -> dict[str, dict[str, Any]]:
    """By path: `thumbnail` (a WebP in `folder`) and `facts` of its making, of pictures and clips `width` and `height`,
    of clips `frames`, of clips and sounds `seconds`; or `error`."""
    if not pictures:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    request = json.dumps({"pictures": [str(path) for path in pictures], "folder": str(folder), "side": side})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines: list[str] = []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "studio.thumbnails"],
            input=request,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS_EACH * (1 + len(pictures)),
            check=False,
        )
        lines = done.stdout.splitlines()
    except subprocess.TimeoutExpired as late:
        lines = late.stdout.decode().splitlines() if isinstance(late.stdout, bytes) else []
    found = dict(json.loads(line) for line in lines if line.endswith("]"))
    left = {"error": "took too much time or memory to decode"}
    result = {str(path): found.get(str(path), left) for path in pictures}
    behind = [path for path in pictures if str(path) not in found]
    if behind and len(behind) < len(pictures):  # the first of these ended the process; the others deserve a try
        result |= make_thumbnails(behind[1:], folder, side)
    return result


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(request: dict[str, Any]) -> None:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    _limit()
    for name in request["pictures"]:
        try:
            facts = _thumbnail(Path(name), Path(request["folder"]), request["side"])
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
            facts = {"error": _reason(error)}
        sys.stdout.write(json.dumps([name, facts]) + "\n")
        sys.stdout.flush()


def _thumbnail(path: Path, folder: Path, side: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_CPU, (_used_seconds() + SECONDS_EACH, resource.RLIM_INFINITY))
    target = folder / f"{path.stem}-{path.stat().st_mtime_ns:x}-{side}.webp"
    if path.suffix.lower() in SOUND_SUFFIXES:
        found = _of_sound(path, target)
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        found = _of_video(path, target, side)
    else:
        found = _of_picture(path, target, side)
    return {"thumbnail": str(target), "facts": {}, **found}


def _of_picture(path: Path, target: Path, side: int) -> dict[str, Any]:
    """A still, or of an animated picture a small clip."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"has {width} x {height} pixels, which is too many")
        frames = getattr(picture, "n_frames", 1)
        picture.load()
        found = {"width": width, "height": height, "facts": _making(picture)}
        if frames == 1:
            _small(ImageOps.exif_transpose(picture).convert("RGBA"), side).save(target, "WEBP", quality=85)
            return found
        shown, times = [], []
        for index in range(frames):
            picture.seek(index)
            picture.load()
            times.append(int(picture.info.get("duration") or 100))
            if index < MOST_FRAMES:
                shown.append(_small(picture.convert("RGBA"), side))
    _save_clip(shown, times, target)
    return {**found, "frames": frames, "seconds": round(sum(times) / 1000, 2)}


def _of_video(path: Path, target: Path, side: int) -> dict[str, Any]:
    """The first frames of a WebM or MP4. Needs PyAV."""
    from studio.data.clips import walk
    from studio.errors import StudioError

    shown, times, size = [], [], (0, 0)
    try:
        for index, (frame, milliseconds) in enumerate(walk(path)):
            size = frame.size
            times.append(milliseconds)
            if index < MOST_FRAMES:
                shown.append(_small(frame, side))
    except StudioError as error:
        raise ValueError(error.message.replace(f"'{path}' ", "")) from None
    if not shown:
        raise ValueError("has no pictures in it")
    _save_clip(shown, times, target)
    seconds = round(sum(times) / 1000, 2)
    return {"width": size[0], "height": size[1], "frames": len(times), "seconds": seconds}


def _of_sound(path: Path, target: Path) -> dict[str, Any]:
    from studio.waves import read_wave, waveform

    wave, rate, seconds = read_wave(path)
    waveform(wave, 320, 80).save(target, "WEBP", lossless=True)
    return {"seconds": round(seconds, 2), "rate": rate, "facts": _told_in_sound(path)}


def _told_in_sound(path: Path) -> dict[str, Any]:
    import soundfile

    with soundfile.SoundFile(path) as file:
        return _read(file.comment)


def _small(picture: Any, side: int) -> Any:
    from PIL import Image

    picture.thumbnail((side, side))
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _save_clip(frames: list[Any], times: list[int], target: Path) -> None:
    first, *rest = frames
    first.save(target, "WEBP", save_all=True, append_images=rest, duration=times[: len(frames)], loop=0, quality=75)


def _used_seconds() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime)


def _making(picture: Any) -> dict[str, Any]:
    """What a picture of the studio says of its own making, or {}."""
    return _read(getattr(picture, "text", {}).get("studio") or picture.getexif().get(0x010E))


def _read(text: Any) -> dict[str, Any]:
    try:
        facts = json.loads(text or "{}")
    except (ValueError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _reason(error: BaseException) -> str:
    from studio.errors import reason_of

    text = reason_of(error)
    return "is no picture that can be read" if "cannot identify" in text else text[:200]


if __name__ == "__main__":
    _answer(json.loads(sys.stdin.read()))
