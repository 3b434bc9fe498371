"""Small versions of pictures from anywhere, decoded in a process of its own with limits on pixels, memory and time.

A server shows what people bring along; a file made to exhaust or confuse a decoder only ends that process.
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
MOST_PIXELS = 64_000_000
MEMORY_BYTES = 2 << 30
SECONDS_EACH = 10


def make_thumbnails(pictures: list[Path], folder: Path, side: int = 256) -> dict[str, dict[str, Any]]:
    """By path: `thumbnail` (a WebP in `folder`), `width`, `height` and `facts` of a picture's making; or `error`."""
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
    from PIL import Image, ImageOps

    resource.setrlimit(resource.RLIMIT_CPU, (_used_seconds() + SECONDS_EACH, resource.RLIM_INFINITY))
    with Image.open(path) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"has {width} x {height} pixels, which is too many")
        picture.load()
        facts = _making(picture)
        small = ImageOps.exif_transpose(picture).convert("RGBA")
    small.thumbnail((side, side))
    ground = Image.new("RGB", small.size, "white")
    ground.paste(small, mask=small.getchannel("A"))
    target = folder / f"{path.stem}-{path.stat().st_mtime_ns:x}-{side}.webp"
    ground.save(target, "WEBP", quality=85)
    return {"thumbnail": str(target), "width": width, "height": height, "facts": facts}


def _used_seconds() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime)


def _making(picture: Any) -> dict[str, Any]:
    """What a picture of the studio says of its own making, or {}."""
    text = getattr(picture, "text", {}).get("studio") or picture.getexif().get(0x010E) or "{}"
    try:
        facts = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "is no picture that can be read" if "cannot identify" in text else text[:200]


if __name__ == "__main__":
    _answer(json.loads(sys.stdin.read()))
