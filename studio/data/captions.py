"""Captions of pictures: a text beside the picture, else the folder's metadata file, else the preset's template.

`metadata.jsonl` and `metadata.csv` follow the imagefolder convention: `file_name`, relative to the metadata file, and
`text` (or `caption`). Where several name a picture, the one in the deepest folder counts.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from studio.data.listing import Listing
from studio.errors import DataError, PresetError, nearest

LONGEST_BYTES = 65_536  # of a caption file; far more than any text encoder reads
TEXT_KEYS = ("text", "caption")


def fill_template(template: str, fill: Mapping[str, str]) -> str:
    """The template with its {fields} filled in. Raises PresetError for an unknown field or a stray brace."""
    parts = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise PresetError(f"data.caption '{template}' is no template: {error}", "write {{ for a brace") from None
    for literal, name, spec, conversion in parsed:
        parts.append(literal)
        if name is None:
            continue
        if name not in fill or spec or conversion:
            choices = [f"{{{key}}}" for key in fill]
            raise PresetError(f"data.caption has an unknown field '{{{name}}}'", nearest(f"{{{name}}}", choices))
        parts.append(fill[name])
    return _tidy("".join(parts))


def put_words(text: str, fill: Mapping[str, str]) -> str:
    """A prompt or caption with the known {fields} filled in, empty ones without a gap; other braces stay."""
    for field, value in fill.items():
        text = text.replace(f"{{{field}}}", value)
    return _tidy(text)


def _tidy(text: str) -> str:
    return " ".join(text.split())


class Captions:
    """The captions of a folder's pictures, and what is odd about them."""

    def __init__(
        self,
        listing: Listing,
        template: str,
        fill: Mapping[str, str],
        told: Callable[[Mapping[str, Any], str], str] | None = None,
    ) -> None:
        """Reads the metadata files. Raises DataError with the line of what is malformed, PresetError.

        `told` makes a caption of a row without one, from other columns, or "" of a row that has none of them either; it
        is given where the row stands and may raise DataError.
        """
        self.listing, self.fill, self.told = listing, fill, told
        self.template = fill_template(template, fill)
        self.warnings: list[str] = []
        self.from_metadata: dict[Path, str] = {}
        by_folder: dict[Path, Path] = {}
        for path in listing.metadata:
            if path.parent in by_folder:
                self.warnings.append(f"'{listing.name(path)}' counts, and the .csv beside it does not")
            by_folder[path.parent] = path
        for path in by_folder.values():
            self.from_metadata |= self._read_metadata(path)

    def own(self, picture: Path) -> str:
        """The caption that a file gives this picture, or "". Raises DataError for a text that is not UTF-8.

        {trigger} and {class} are filled in, so that a folder can serve under any name; other braces stay as they are.
        """
        caption = self._beside(picture) or self.from_metadata.get(Path(os.path.normpath(picture)), "")
        return put_words(caption, self.fill)

    def _beside(self, picture: Path) -> str:
        path = picture.with_suffix(".txt")
        try:
            if not path.is_file():
                return ""
            with path.open("rb") as file:
                content = file.read(LONGEST_BYTES + 1)
        except OSError as error:
            raise DataError(f"the caption '{self.listing.name(path)}' cannot be read: {error.strerror}") from None
        if len(content) > LONGEST_BYTES:
            raise DataError(f"'{self.listing.name(path)}' is over {LONGEST_BYTES // 1024} KiB: no caption is that long")
        return _tidy(self._decoded(path, content))

    def _decoded(self, path: Path, content: bytes) -> str:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise DataError(f"'{self.listing.name(path)}' is not UTF-8 text", "save it as UTF-8 in a text editor")
        return text

    # -- metadata ----------------------------------------------------------------------------------------------

    def _read_metadata(self, path: Path) -> dict[Path, str]:
        try:
            text = self._decoded(path, path.read_bytes())
        except OSError as error:
            raise DataError(f"'{self.listing.name(path)}' cannot be read: {error.strerror}") from None
        rows = self._jsonl_rows(path, text) if path.suffix == ".jsonl" else self._csv_rows(path, text)
        known = {Path(os.path.normpath(picture)) for picture in self.listing.pictures}
        found: dict[Path, str] = {}
        absent = []
        for line, row in rows:
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise self._malformed(path, line, "it has no 'file_name'")
            caption = self._text_of(path, line, row)
            picture = Path(os.path.normpath(path.parent / name))
            if picture in found:
                raise self._malformed(path, line, f"it names '{name}' a second time")
            if picture not in known:
                absent.append(name)
            found[picture] = caption
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            names = ", ".join(f"'{name}'" for name in absent[:3]) + more
            self.warnings.append(f"'{self.listing.name(path)}' names pictures that are not there: {names}")
        return found

    def _text_of(self, path: Path, line: int, row: Mapping[str, Any]) -> str:
        """The caption of a row, "" if it is left empty."""
        key = next((key for key in TEXT_KEYS if key in row), None)
        if self.told is not None and (key is None or not row[key]):
            caption = self.told(row, f"'{self.listing.name(path)}', line {line}")
            if caption:
                return caption
        if key is None:
            raise self._malformed(path, line, "it has neither 'text' nor 'caption'")
        value = "" if row[key] is None else row[key]
        if not isinstance(value, str):
            raise self._malformed(path, line, f"its '{key}' is no text")
        return _tidy(value)

    def _jsonl_rows(self, path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise self._malformed(path, number, "it is no JSON") from None
            if not isinstance(row, dict):
                raise self._malformed(path, number, "it is no JSON object")
            yield number, row

    def _csv_rows(self, path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    continue
                if len(cells) != len(header):
                    raise self._malformed(
                        path, reader.line_num, f"it has {len(cells)} cells, and the first line {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise self._malformed(path, reader.line_num, str(error)) from None

    def _malformed(self, path: Path, line: int, fault: str) -> DataError:
        return DataError(
            f"'{self.listing.name(path)}', line {line}: {fault}",
            'a line has a file_name and a text: {"file_name": "a.png", "text": "a red cup"}'
            if path.suffix == ".jsonl"
            else "the first line names the columns: file_name,text",
        )
