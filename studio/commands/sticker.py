"""`studio sticker`: a clip as a file that a platform takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.errors import RequestError, nearest
from studio.files import slugify
from studio.terminal import out, print_json

if TYPE_CHECKING:
    from studio.data.clips import Clip

EMOJI = "🙂"
MOST_FRAMES = 240  # of a longer clip its key frames are taken


def sticker(
    clips: Annotated[
        list[Path],
        typer.Argument(metavar="CLIP...", help="GIF, APNG, animated WebP, WebM, MP4, or a folder of frames."),
    ],
    target: Annotated[str, typer.Option("--for", help="whatsapp, telegram, line, discord, gif, apng or webp.")],
    out_path: Annotated[Path | None, typer.Option("--out", help="The file to write; with --pack, the folder.")] = None,
    pack: Annotated[str | None, typer.Option("--pack", help="Make a pack of this title (whatsapp, line).")] = None,
    author: Annotated[str, typer.Option("--author", help="Who publishes the pack.")] = "",
    emoji: Annotated[str, typer.Option("--emoji", help="One to three emoji for a pack's stickers, spaced.")] = EMOJI,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Fit a clip to a platform's limits. Example: studio sticker fox.webp --for whatsapp --out fox-sticker.webp"""
    from studio.stickers_out.limits import TARGETS

    if target not in TARGETS:
        raise RequestError(f"there are no limits of '{target}'", nearest(target, TARGETS))
    missing = next((clip for clip in clips if not clip.exists()), None)
    if missing is not None:
        raise RequestError(f"there is no clip '{missing}'", "give a GIF, APNG or WebP file, or a folder of frames")
    if pack is not None:
        facts = _pack(clips, target, out_path or Path(f"{slugify(pack)}-{target}"), (pack, author), emoji.split())
    elif len(clips) == 1:
        facts = _one(clips[0], target, out_path, force)
    else:
        raise RequestError(f"{len(clips)} clips make no one sticker", "give one, or make a pack: --pack TITLE")
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        out.print(f"{key + ':':<14}{value}", soft_wrap=True, markup=False)


def _one(clip: Path, target: str, out_path: Path | None, force: bool) -> dict[str, Any]:
    from studio.stickers_out.fitting import write_sticker
    from studio.stickers_out.limits import TARGETS

    limits = TARGETS[target]
    path = out_path or Path(f"{clip.stem}-{target}{limits.ending}")
    if path.exists() and not force:
        raise RequestError(f"'{path}' exists already", "choose another --out, or overwrite with --force")
    return {"sticker": str(path), **write_sticker(_read(clip), limits, path).facts}


def _pack(clips: list[Path], target: str, folder: Path, told: tuple[str, str], emoji: list[str]) -> dict[str, Any]:
    from studio.stickers_out.packs import Pack, write_pack

    return write_pack(Pack(*told, tuple(_read(clip) for clip in clips), tuple(emoji)), target, folder)


def _read(clip: Path) -> Clip:
    from studio.data.clips import look_at

    return look_at(clip, "", MOST_FRAMES).load()
