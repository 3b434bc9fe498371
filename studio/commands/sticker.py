"""`studio sticker`: a clip as a file that a platform takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studio.errors import RequestError, nearest
from studio.terminal import out, print_json


def sticker(
    clip: Annotated[Path, typer.Argument(help="GIF, APNG, animated WebP, or a folder of frames.")],
    target: Annotated[str, typer.Option("--for", help="whatsapp, line, discord, gif, apng or webp.")],
    out_path: Annotated[Path | None, typer.Option("--out", help="The file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Fit a clip to a platform's limits. Example: studio sticker fox.webp --for whatsapp --out fox-sticker.webp"""
    from studio.data.clips import look_at
    from studio.stickers_out.fitting import write_sticker
    from studio.stickers_out.limits import TARGETS

    if target not in TARGETS:
        raise RequestError(f"there are no limits of '{target}'", nearest(target, TARGETS))
    if not clip.exists():
        raise RequestError(f"there is no clip '{clip}'", "give a GIF, APNG or WebP file, or a folder of frames")
    limits = TARGETS[target]
    path = out_path or Path(f"{clip.stem}-{target}{limits.ending}")
    if path.exists() and not force:
        raise RequestError(f"'{path}' exists already", "choose another --out, or overwrite with --force")
    found = look_at(clip, "", most_frames=240)
    written = write_sticker(found.load(), limits, path)
    facts = {"sticker": str(path), **written.facts}
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        out.print(f"{key + ':':<14}{value}", soft_wrap=True, markup=False)
