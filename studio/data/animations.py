"""A folder of clips as lessons for an adapter: every file looked through before anything trains, oddities told by name.

Captions are those of pictures: NAME.txt (caption.txt in a folder of frames), else the preset's template; {trigger} and
{class} are filled in. The folder is only ever read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studio.data.captions import fill_template, put_words
from studio.data.clips import ClipFile, frame_files, scan_clips
from studio.data.report import Report
from studio.errors import DataError
from studio.files import sha256_of
from studio.preset import Data


@dataclass(frozen=True)
class Animation:
    """A clip on disk with its caption. `content` is a hash of what is in the file, or in the files of its frames."""

    file: ClipFile
    caption: str
    content: str

    @property
    def name(self) -> str:
        return self.file.path.name


@dataclass(frozen=True)
class AnimationSet:
    """The clips to train on and those held out. `fingerprint` tells contents and captions, and no file names."""

    clips: list[Animation]
    held_out: list[Animation]
    report: Report
    fingerprint: str
    noun = "clips"

    @property
    def count(self) -> int:
        return len(self.clips)

    def with_captions(self, change: Callable[[str], str]) -> AnimationSet:
        """The same clips under other captions."""
        clips, held_out = (
            [replace(one, caption=change(one.caption)) for one in some] for some in (self.clips, self.held_out)
        )
        return replace(self, clips=clips, held_out=held_out, fingerprint=fingerprint_of(clips))


def scan_animations(
    folder: Path,
    data: Data,
    fill: Mapping[str, str],
    looking: Callable[[int, int], None] = lambda done, total: None,
) -> AnimationSet:
    """Looks through a folder. Raises DataError if it holds no clip that moves, PresetError for a wrong template."""
    template = fill_template(data.caption, fill)
    found = scan_clips(folder, data.frames, "", looking)
    moving = [file for file in found.clips if len(file.kept) > 1]
    dropped = [
        *found.dropped,
        *((f.path.name, "has one frame, and a clip needs two") for f in found.clips if f not in moving),
    ]
    if len(moving) <= data.validation:
        reason = f": '{dropped[0][0]}' {dropped[0][1]}" if dropped else ""
        raise DataError(
            f"'{folder}' has {len(moving)} clips that move, and {data.validation} are held out{reason}",
            "give GIF, APNG, WebP, WebM or MP4 files, or folders of frames",
        )
    clips = [Animation(file, put_words(file.caption, fill) or template, _content(file.path)) for file in moving]
    order = sorted(clips, key=lambda one: one.content)
    held_out, kept = order[: data.validation], [one for one in clips if one not in order[: data.validation]]
    lengths = Counter(f"{len(one.file.kept)} frames" for one in kept)
    report = Report(
        [one.name for one in kept],
        [one.name for one in held_out],
        dropped,
        _remarks(kept, template),
        dict(sorted(lengths.items())),
    )
    return AnimationSet(kept, held_out, report, fingerprint_of(kept))


def _remarks(clips: list[Animation], template: str) -> list[str]:
    thinned = [one.name for one in clips if one.file.total > len(one.file.kept)]
    plain = [one.name for one in clips if one.caption == template]
    remarks = []
    if thinned:
        remarks.append(f"of {len(thinned)} longer clips the key frames are taken, first '{thinned[0]}'")
    if plain and len(plain) < len(clips):
        remarks.append(f"{len(plain)} of {len(clips)} have no caption of their own: '{plain[0]}', ...")
    return remarks


def _content(path: Path) -> str:
    if not path.is_dir():
        return sha256_of(path)
    return hashlib.sha256("".join(sha256_of(file) for file in frame_files(path)).encode()).hexdigest()


def fingerprint_of(clips: list[Animation]) -> str:
    return hashlib.sha256(repr(sorted((one.content, one.caption) for one in clips)).encode()).hexdigest()
