"""A folder of pictures as training data: every file decoded before anything trains, every oddity told by name.

The folder is only ever read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studio.data import remarks
from studio.data.buckets import Size, bucket_table, nearest_bucket, square
from studio.data.captions import Captions
from studio.data.decode import Unusable, decode, frames_of
from studio.data.listing import Listing, list_folder
from studio.data.masks import Masks
from studio.data.picture import Picture, load_mask, load_pixels
from studio.data.report import Report
from studio.errors import DataError
from studio.files import sha256_of
from studio.preset import Data

__all__ = ["Picture", "PictureSet", "Report", "fingerprint_of", "load_mask", "load_pixels", "scan"]


@dataclass(frozen=True)
class PictureSet:
    """The pictures to train on and those held out. `fingerprint` tells contents and captions, and no file names."""

    pictures: list[Picture]
    held_out: list[Picture]
    report: Report
    fingerprint: str
    noun = "pictures"

    @property
    def count(self) -> int:
        return len(self.pictures)

    def with_captions(self, change: Callable[[str], str]) -> PictureSet:
        """The same pictures under other captions."""

        def changed(pictures: list[Picture]) -> list[Picture]:
            return [replace(picture, caption=change(picture.caption)) for picture in pictures]

        pictures = changed(self.pictures)
        return replace(self, pictures=pictures, held_out=changed(self.held_out), fingerprint=fingerprint_of(pictures))


def scan(
    folder: Path,
    data: Data,
    fill: Mapping[str, str],
    resolution: int,
    multiple: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PictureSet:
    """Looks through a folder and its sub-folders. `progress` is told (done, total) files.

    `fill` holds the values of {trigger} and {class}; sides of buckets are multiples of `multiple`.
    Raises DataError if the folder, a caption or a mask is at fault or nothing usable is left, PresetError for a
    template with unknown fields.
    """
    listing = list_folder(folder)
    if not listing.pictures:
        raise _no_pictures(listing)
    captions = Captions(listing, data.caption, fill)
    masks = Masks(listing) if data.masks else None
    table = bucket_table(resolution, multiple) if data.buckets else [square(resolution, multiple)]
    usable: list[Picture] = []
    captioned: list[Picture] = []
    dropped: list[tuple[str, str]] = []
    for number, path in enumerate(listing.pictures):
        progress(number, len(listing.pictures))
        name = listing.name(path)
        try:
            content, size = _examine(path)
        except Unusable as reason:
            dropped.append((name, str(reason)))
            continue
        own = captions.own(path)
        mask = masks.of(path, size) if masks else None
        picture = Picture(path, name, own or captions.template, *size, content, nearest_bucket(size, table), mask)
        usable.append(picture)
        if own:
            captioned.append(picture)
    progress(len(listing.pictures), len(listing.pictures))
    if not usable:
        reasons = "; ".join(f"'{name}' {reason}" for name, reason in dropped[:3])
        raise DataError(
            f"none of the pictures in '{folder}' can be used: {reasons}", "put whole pictures in their place"
        )

    kept, held_out, copies = _hold_out(usable, data.validation)
    warnings = [
        *remarks.on_files(listing),
        *remarks.on_masks(listing, masks),
        *captions.warnings,
        *remarks.on_captions(usable, captioned, captions.template, fill.get("trigger", "")),
        *remarks.on_pictures(kept),
        *remarks.on_animations([picture for picture in usable if frames_of(picture.path) > 1]),
    ]
    counts = sorted(Counter(picture.bucket for picture in kept).items())
    buckets = {f"{width}x{height}": count for (width, height), count in counts}
    names, held_out_names = [p.name for p in kept], [p.name for p in held_out]
    report = Report(names, held_out_names, dropped + copies, warnings, buckets)
    return PictureSet(kept, held_out, report, fingerprint_of(kept))


def _examine(path: Path) -> tuple[str, Size]:
    """(SHA-256, size after the EXIF turn) of a picture, all of which has been decoded. Raises Unusable."""
    try:
        if not path.is_file():  # a pipe of that name would keep us waiting for ever
            raise Unusable("is no file, or a link to nothing")
        size = decode(path).size
        return sha256_of(path), size
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def _no_pictures(listing: Listing) -> DataError:
    hint = "put PNG, JPEG or WebP files into it"
    if listing.other_pictures:
        hint = f"save {listing.names(listing.other_pictures)} as PNG or JPEG"
    elif listing.masks:
        hint = "NAME.mask.png belongs beside a picture NAME.png; masks alone cannot be trained on"
    elif listing.linked_folders:
        hint = f"links to folders are not followed: give '{listing.linked_folders[0]}' itself"
    return DataError(f"there are no pictures in '{listing.root}'", hint)


def _hold_out(pictures: list[Picture], count: int) -> tuple[list[Picture], list[Picture], list[tuple[str, str]]]:
    """(kept, held out, dropped copies of held-out ones). Chosen by content, so renaming files changes nothing.

    A copy of a held-out picture must not be trained on: the validation loss would measure memory.
    """
    firsts: dict[str, Picture] = {}
    for picture in pictures:
        firsts.setdefault(picture.content, picture)
    if count >= len(firsts):
        raise DataError(
            f"data.validation holds out {count} of {len(firsts)} different pictures, and none is left to train on",
            f"set it to {len(firsts) - 1} or less",
        )
    chosen = [firsts[content] for content in sorted(firsts)[:count]]
    contents = {picture.content: picture.name for picture in chosen}
    kept = [picture for picture in pictures if picture.content not in contents]
    copies = [
        (picture.name, f"is the same picture as the held-out '{contents[picture.content]}'")
        for picture in pictures
        if contents.get(picture.content, picture.name) != picture.name
    ]
    return kept, sorted(chosen, key=lambda picture: picture.name), copies


def fingerprint_of(pictures: list[Picture]) -> str:
    parts = sorted((p.content, p.caption, sha256_of(p.mask) if p.mask else "") for p in pictures)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
