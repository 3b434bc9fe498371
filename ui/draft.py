"""What a person has prepared and not yet started: pictures, clips or sounds, captions, settings.

It lies on the server's disk, so a refresh, a second tab or another server loses nothing; the browser keeps only the
draft's name.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio import library
from studio.errors import RequestError
from studio.files import slug, slugify, write_atomically
from studio.paths import studio_home
from studio.thumbnails import CLIP_SUFFIXES, SOUND_SUFFIXES, SUFFIXES

MOST_PICTURES = 1000
MOST_BYTES = {"image": 64 << 20, "video": 128 << 20, "audio": 512 << 20}  # of one file
ENDINGS = {"image": SUFFIXES, "video": CLIP_SUFFIXES, "audio": SOUND_SUFFIXES}
NOUNS = {"image": "picture", "video": "clip", "audio": "recording"}


@dataclass(frozen=True)
class Draft:
    """One draft. Creating the object touches nothing. What is brought along lies in a folder for each medium."""

    name: str
    medium: str = "image"

    @property
    def folder(self) -> Path:
        return studio_home() / "drafts" / slug(self.name)

    @property
    def pictures_dir(self) -> Path:
        return self.folder / f"{NOUNS[self.medium]}s"

    # -- settings ----------------------------------------------------------------------------------------------

    def form(self, name: str = "form") -> dict[str, Any]:
        """What a form says: that of a training, or another one of this browser's."""
        return self._read(f"{slug(name)}.json")

    def save_form(self, form: dict[str, Any], name: str = "form") -> None:
        write_atomically(self.folder / f"{slug(name)}.json", json.dumps(form))

    def report(self) -> dict[str, Any]:
        """What `studio check` said of this draft, or {} if something has changed since."""
        return self._read("report.json")

    def save_report(self, report: dict[str, Any]) -> None:
        write_atomically(self.folder / "report.json", json.dumps(report))

    def changed(self) -> None:
        """The last check no longer counts."""
        (self.folder / "report.json").unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    # -- pictures ----------------------------------------------------------------------------------------------

    def pictures(self) -> list[Path]:
        """The pictures, in the order of their names."""
        if not self.pictures_dir.is_dir():
            return []
        return sorted(path for path in self.pictures_dir.iterdir() if path.suffix.lower() in ENDINGS[self.medium])

    def add(self, files: Sequence[Path]) -> list[str]:
        """Takes in copies of pictures and of the captions beside them. Returns a sentence for each left out."""
        self.pictures_dir.mkdir(parents=True, exist_ok=True)
        left_out = []
        noun, endings, most = NOUNS[self.medium], ENDINGS[self.medium], MOST_BYTES[self.medium]
        for path in sorted(files, key=lambda path: path.suffix.lower() == ".txt"):
            suffix = path.suffix.lower()
            target = self.pictures_dir / f"{slugify(path.stem)}{suffix}"
            if suffix == ".txt":
                if any(picture.stem == target.stem for picture in self.pictures()):
                    target.write_text(path.read_text(errors="replace")[:2000])
                else:
                    left_out.append(f"'{path.name}' belongs to no {noun}")
            elif suffix not in endings:
                left_out.append(f"'{path.name}' is no {noun}: {', '.join(endings)} are")
            elif path.stat().st_size > most:
                left_out.append(f"'{path.name}' is larger than {most >> 20} MB")
            elif len(self.pictures()) >= MOST_PICTURES:
                left_out.append(f"'{path.name}' is one too many: {MOST_PICTURES} {noun}s at most")
            else:
                shutil.copyfile(path, self._free(target))
        self.changed()
        return left_out

    def _free(self, target: Path) -> Path:
        number, free = 1, target
        while any(free.stem == picture.stem for picture in self.pictures()):
            number += 1
            free = target.with_stem(f"{target.stem}-{number}")
        return free

    def caption(self, picture: Path) -> str:
        try:
            return picture.with_suffix(".txt").read_text(errors="replace")
        except OSError:
            return ""

    def set_caption(self, name: str, text: str) -> None:
        picture = self._picture(name)
        if text.strip():
            write_atomically(picture.with_suffix(".txt"), " ".join(text.split())[:2000])
        else:
            picture.with_suffix(".txt").unlink(missing_ok=True)
        self.changed()

    def replace_in_captions(self, find: str, by: str) -> int:
        """Replaces in all captions; without `find`, puts `by` in front. Returns how many changed."""
        count = 0
        for picture in self.pictures():
            old = self.caption(picture)
            new = old.replace(find, by) if find else f"{by} {old}".strip()
            if new != old:
                self.set_caption(picture.name, new)
                count += 1
        return count

    def remove(self, name: str) -> None:
        picture = self._picture(name)
        picture.with_suffix(".txt").unlink(missing_ok=True)
        picture.unlink()
        self.changed()

    def clear(self) -> None:
        shutil.rmtree(self.pictures_dir, ignore_errors=True)
        self.changed()

    def _picture(self, name: str) -> Path:
        found = next((path for path in self.pictures() if path.name == name), None)
        if found is None:
            raise RequestError(f"there is no {NOUNS[self.medium]} '{name}' here", "reload the page")
        return found

    def freeze(self, name: str) -> Path:
        """A copy of the pictures for a run, which later changes of the draft do not touch."""
        target = studio_home() / "data" / slug(name)
        shutil.copytree(self.pictures_dir, target)
        return target


def draft_of(name: Any, medium: str = "image") -> Draft:
    """The draft that a browser names, or a new one."""
    text = str(name or "")
    plain = len(text) == 12 and all(letter in "0123456789abcdef" for letter in text)
    return Draft(text if plain else uuid.uuid4().hex[:12], medium)


def free_run(name: str) -> tuple[str, str]:
    """A name in the library that nothing has, made from any text."""
    wanted = slugify(name)
    return wanted, library.free_name(wanted)
