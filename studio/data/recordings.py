"""A folder of recordings as training data: every file looked through before anything trains, every oddity told by name.

A recording longer than `data.seconds` is cut into pieces of that length, which keep their recording: what is held out
for validation is whole recordings. The folder is only ever read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from studio.data.captions import Captions
from studio.data.listing import SOUND_ENDINGS, Listing, list_folder
from studio.data.melodies.fields import misspelt_mode, told_by_fields
from studio.data.report import Report
from studio.data.sounds import Sound, UnusableSound, read_sound
from studio.errors import DataError
from studio.files import sha256_of
from studio.preset import Data

SILENT = 1e-3  # peak, -60 dB
CLIPPED_SHARE = 0.01  # of samples at full scale
SHORTEST_SECONDS = 0.25
LONG_SECONDS = 60.0  # a recording that may be used in part
REST = 0.5  # the last piece of a recording is kept if it has this share of a whole one


@dataclass(frozen=True)
class Piece:
    """A recording or a part of it. `content` is the file's SHA-256."""

    path: Path
    name: str
    caption: str
    content: str
    start_seconds: float
    seconds: float

    def load(self, sample_rate_hz: int, channels: int) -> Tensor:
        """The wave (C, T) at a base's rate."""
        return read_sound(self.path, self.start_seconds, self.seconds).at(sample_rate_hz, channels).wave


@dataclass(frozen=True)
class SoundSet:
    """The pieces to train on and those held out. `fingerprint` tells contents and captions, and no file names."""

    pieces: list[Piece]
    held_out: list[Piece]
    report: Report
    fingerprint: str
    noun = "pieces of sound"

    @property
    def count(self) -> int:
        return len(self.pieces)

    @property
    def example(self) -> str:
        """A caption, of what is held out if anything is."""
        return (self.held_out or self.pieces)[0].caption

    def with_captions(self, change: Callable[[str], str]) -> SoundSet:
        """The same sounds under other captions."""

        def changed(pieces: list[Piece]) -> list[Piece]:
            return [replace(piece, caption=change(piece.caption)) for piece in pieces]

        pieces = changed(self.pieces)
        return replace(self, pieces=pieces, held_out=changed(self.held_out), fingerprint=fingerprint_of(pieces))


def scan_recordings(
    folder: Path,
    data: Data,
    fill: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SoundSet:
    """Looks through a folder and its sub-folders. `progress` is told (done, total) files.

    Raises DataError if the folder or a caption is at fault or nothing usable is left, PresetError for a template with
    unknown fields.
    """
    listing = list_folder(folder)
    if not listing.sounds:
        raise DataError(f"there are no sounds in '{folder}'", f"put {', '.join(SOUND_ENDINGS)} files into it")
    captions = sound_captions(listing, data.caption, fill)
    recordings: list[list[Piece]] = []
    dropped: list[tuple[str, str]] = []
    warnings: list[str] = []
    uncaptioned: list[str] = []
    misspelt: dict[str, list[str]] = {}
    for number, path in enumerate(listing.sounds):
        progress(number, len(listing.sounds))
        name, own = listing.name(path), captions.own(path)
        try:
            sound = _examine(path)
        except UnusableSound as reason:
            dropped.append((name, str(reason)))
            continue
        warnings += _remarks(name, sound)
        if not own:
            uncaptioned.append(name)
        if found := misspelt_mode(own):
            misspelt.setdefault(found, []).append(name)
        whole = Piece(path, name, own or captions.template, sha256_of(path), 0.0, sound.seconds)
        recordings.append(cut(whole, data.seconds, data.part))
    progress(len(listing.sounds), len(listing.sounds))
    if not recordings:
        reasons = "; ".join(f"'{name}' {reason}" for name, reason in dropped[:3])
        raise DataError(f"none of the sounds in '{folder}' can be used: {reasons}", "put whole recordings there")
    if uncaptioned and len(uncaptioned) < len(recordings):
        warnings.append(
            f"{len(uncaptioned)} of {len(recordings)} have no caption of their own: '{uncaptioned[0]}', ..."
        )
    for found, names in misspelt.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.append(f"the caption of '{names[0]}'{more} has {found}")
    kept, held_out, copies = _hold_out(recordings, data.validation)
    lengths = Counter(f"{piece.seconds:.1f} s" for piece in kept)
    report = Report(
        list(dict.fromkeys(piece.name for piece in kept)),
        list(dict.fromkeys(piece.name for piece in held_out)),
        dropped + copies,
        [*captions.warnings, *warnings, *_on_listing(listing)],
        dict(sorted(lengths.items())),
    )
    return SoundSet(kept, held_out, report, fingerprint_of(kept))


def sound_captions(listing: Listing, template: str, fill: Mapping[str, str]) -> Captions:
    """The captions of a folder's sounds; fields of music in its metadata are checked and put into words."""
    return Captions(replace(listing, pictures=listing.sounds), template, fill, told_by_fields)


def cut(whole: Piece, seconds: float, part: tuple[float, float] = (0.0, 1.0)) -> list[Piece]:
    """A recording in pieces of a length; of what is left over, what is at least half of one.

    Of one of `LONG_SECONDS` or more only a `part`, from and to these shares of it.
    """
    begin, end = (share * whole.seconds for share in (part if whole.seconds >= LONG_SECONDS else (0, 1)))
    if end - begin <= seconds:
        return [replace(whole, start_seconds=begin, seconds=end - begin)]
    count = int((end - begin) / seconds + 1 - REST)
    starts = [begin + i * seconds for i in range(max(1, count))]
    return [replace(whole, start_seconds=s, seconds=min(seconds, end - s)) for s in starts]


def _examine(path: Path) -> Sound:
    if not path.is_file():  # a pipe of that name would keep us waiting for ever
        raise UnusableSound("is no file, or a link to nothing")
    sound = read_sound(path)
    if sound.seconds < SHORTEST_SECONDS:
        raise UnusableSound(f"is only {sound.seconds:.2g} seconds long")
    if not torch.isfinite(sound.wave).all():
        raise UnusableSound("has samples that are not finite")
    if float(sound.wave.abs().max()) < SILENT:
        raise UnusableSound("is silent")
    return sound


def _remarks(name: str, sound: Sound) -> list[str]:
    clipped = float((sound.wave.abs() >= 0.999).float().mean())
    return [f"'{name}' is clipped: {clipped:.0%} of it is at full scale"] if clipped > CLIPPED_SHARE else []


def _on_listing(listing: Listing) -> list[str]:
    return [f"links to folders are not followed: {listing.names(listing.linked_folders)}"] * bool(
        listing.linked_folders
    )


def _hold_out(recordings: list[list[Piece]], count: int) -> tuple[list[Piece], list[Piece], list[tuple[str, str]]]:
    """(pieces kept, pieces held out, dropped copies of what is held out), by whole recordings, chosen by content."""
    contents = sorted({pieces[0].content for pieces in recordings})
    if count >= len(contents):
        raise DataError(
            f"data.validation holds out {count} of {len(contents)} different recordings, and none is left to train on",
            f"set it to {len(contents) - 1} or less",
        )
    chosen = set(contents[:count])
    held: dict[str, list[Piece]] = {}
    kept: list[Piece] = []
    copies: list[tuple[str, str]] = []
    for pieces in recordings:
        first = pieces[0]
        if first.content not in chosen:
            kept += pieces
        elif first.content in held:
            copies.append((first.name, f"is the same sound as the held-out '{held[first.content][0].name}'"))
        else:
            held[first.content] = pieces
    return kept, [piece for pieces in held.values() for piece in pieces], copies


def fingerprint_of(pieces: list[Piece]) -> str:
    parts = sorted((p.content, p.caption, p.start_seconds, p.seconds) for p in pieces)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
