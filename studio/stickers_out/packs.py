"""Packs: several stickers with the pictures that a platform shows for all of them, in a folder to hand in.

WhatsApp: 3 to 30 animated stickers, a tray icon of 96 x 96 pixels and 50 KiB, one to three emoji for each, and the
`contents.json` of its sample app (WhatsApp/stickers). LINE: 8, 16 or 24 stickers named 01.png, 02.png, ..., a moving
main picture of 240 x 240 pixels and a still one for the tab, 96 x 74 (creator.line.me).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from studio.data.clips import Clip, fitted_to
from studio.errors import RequestError, WorkError, nearest
from studio.exporting.destination import move_into_place, refuse_existing, workshop
from studio.files import write_atomically
from studio.stickers_out.fitting import MARGIN, write_sticker
from studio.stickers_out.limits import TARGETS, Limits

TRAY = (96, 96)
TRAY_BYTES = 50 * 1024
LINE_MAIN = replace(TARGETS["line"], name="line's main picture", canvas=(240, 240))
LINE_TAB = (96, 74)


@dataclass(frozen=True)
class Pack:
    """`clips` in order; the first is shown for all of them. `emoji`: one to three, for every sticker."""

    title: str
    author: str
    clips: tuple[Clip, ...]
    emoji: tuple[str, ...]


def write_pack(pack: Pack, target: str, out: Path) -> dict[str, Any]:
    """Writes a folder for WhatsApp or LINE and tells what is in it.

    Raises RequestError before anything is written, and what `write_sticker` raises; then nothing is left at `out`.
    """
    if target not in PACKS:
        raise RequestError(f"there are no packs for '{target}'", nearest(target, PACKS))
    counts, write = PACKS[target]
    if len(pack.clips) not in counts:
        allowed = f"{counts[0]} to {counts[-1]}" if isinstance(counts, range) else ", ".join(map(str, counts))
        raise RequestError(f"a pack for {target} of {len(pack.clips)} stickers is not taken", f"it takes {allowed}")
    if not 1 <= len(pack.emoji) <= 3:
        raise RequestError(f"{len(pack.emoji)} emoji for a sticker", "give one to three")
    out = out.expanduser().absolute()
    refuse_existing(out, force=False)
    with workshop(out) as room:
        folder = room / "pack"
        folder.mkdir()
        facts = write(pack, folder)
        move_into_place(folder, out)
    return {"pack": str(out), "for": target, **facts}


def _write_whatsapp(pack: Pack, folder: Path) -> dict[str, Any]:
    limits = TARGETS["whatsapp"]
    sizes = _write_all(pack, limits, folder)
    _write_still(pack.clips[0], TRAY, folder / "tray.png", TRAY_BYTES)
    contents = {
        "identifier": "".join(c if c.isascii() and c.isalnum() else "_" for c in pack.title.lower()) or "pack",
        "name": pack.title,
        "publisher": pack.author,
        "tray_image_file": "tray.png",
        "image_data_version": "1",
        "avoid_cache": False,
        "animated_sticker_pack": True,
        "stickers": [{"image_file": name, "emojis": list(pack.emoji)} for name in sizes],
    }
    whole = {"android_play_store_link": "", "ios_app_store_link": "", "sticker_packs": [contents]}
    write_atomically(folder / "contents.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return {"stickers": len(sizes), "largest": max(sizes.values()), "tray": (folder / "tray.png").stat().st_size}


def _write_line(pack: Pack, folder: Path) -> dict[str, Any]:
    sizes = _write_all(pack, TARGETS["line"], folder)
    main = write_sticker(pack.clips[0], LINE_MAIN, folder / "main.png").facts
    _write_still(pack.clips[0], LINE_TAB, folder / "tab.png", None)
    return {"stickers": len(sizes), "largest": max(sizes.values()), "main": main["bytes"]}


def _write_all(pack: Pack, limits: Limits, folder: Path) -> dict[str, int]:
    """Each clip as 01, 02, ...; bytes by name."""
    found = {}
    for number, clip in enumerate(pack.clips, 1):
        path = folder / f"{number:02d}{limits.ending}"
        found[path.name] = int(write_sticker(clip, limits, path).facts["bytes"])
    return found


def _write_still(clip: Clip, size: tuple[int, int], path: Path, most_bytes: int | None) -> None:
    """The fullest frame as a PNG. Raises WorkError if it is too large."""
    mass = [sum(i * n for i, n in enumerate(frame.getchannel("A").histogram())) for frame in clip.frames]
    picture = fitted_to(clip.frames[mass.index(max(mass))], size, MARGIN)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    if most_bytes is not None and buffer.tell() > most_bytes:
        buffer = io.BytesIO()
        picture.quantize(64, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    if most_bytes is not None and buffer.tell() > most_bytes:
        raise WorkError(f"the picture '{path.name}' has {buffer.tell()} bytes, {most_bytes} are taken")
    write_atomically(path, buffer.getvalue())


PACKS: dict[str, tuple[Sequence[int], Callable[[Pack, Path], dict[str, Any]]]] = {
    "whatsapp": (range(3, 31), _write_whatsapp),
    "line": ((8, 16, 24), _write_line),
}
