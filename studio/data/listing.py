"""What lies in a folder of pictures and its sub-folders, by role. Looks, and never writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from studio.errors import DataError

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURE_ENDINGS = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jfif")
SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


@dataclass
class Listing:
    """Paths below `root`, in sorted order; a folder comes before its sub-folders."""

    root: Path
    pictures: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    other_pictures: list[Path] = field(default_factory=list)  # formats that are not read
    sounds: list[Path] = field(default_factory=list)
    linked_folders: list[Path] = field(default_factory=list)  # not entered: they could lead round in circles

    def name(self, path: Path) -> str:
        """How messages call a file: relative to the root, printable whatever its bytes are."""
        text = path.relative_to(self.root).as_posix().encode("utf-8", "backslashreplace").decode()
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)

    def names(self, paths: Sequence[Path], shown: int = 3) -> str:
        """The first few names, and how many more there are."""
        text = ", ".join(f"'{self.name(path)}'" for path in paths[:shown])
        return text + (f" and {len(paths) - shown} more" if len(paths) > shown else "")


def list_folder(folder: Path) -> Listing:
    """Walks the folder. Raises DataError if it, or a folder in it, is not there or cannot be read."""
    try:
        if not folder.exists():
            raise DataError(f"there is no folder '{folder}'", "check the spelling of the path")
        if not folder.is_dir():
            raise DataError(f"'{folder}' is a file, and pictures come from a folder", f"try '{folder.parent}'")
    except OSError as error:
        raise _unreadable(folder, error) from None
    listing = Listing(folder)
    waiting = [folder]
    while waiting:
        waiting += reversed(_enter(waiting.pop(), listing))
    return listing


def _enter(folder: Path, listing: Listing) -> list[Path]:
    """Sorts a folder's files in; returns its sub-folders."""
    folders = []
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                _sort_in(path, listing)
            elif path.is_symlink():
                listing.linked_folders.append(path)
            else:
                folders.append(path)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return folders


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(f"the folder '{folder}' cannot be read: {error.strerror or error}", "check who may read it")


def _sort_in(path: Path, listing: Listing) -> None:
    ending = path.suffix.lower()
    if ending in PICTURE_ENDINGS:
        is_mask = Path(path.stem).suffix.lower() == ".mask"
        (listing.masks if is_mask else listing.pictures).append(path)
    elif path.name in METADATA_NAMES:
        listing.metadata.append(path)
    elif ending in SOUND_ENDINGS:
        listing.sounds.append(path)
    elif ending in OTHER_PICTURE_ENDINGS:
        listing.other_pictures.append(path)
