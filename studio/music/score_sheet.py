"""Beats and chords of a folder's recordings, where its metadata files have them beside the captions.

Columns as in MusicBench, the data of Mustango: `beats` is [[seconds, ...], [counts, ...]], `chords` a list of names,
`chords_time` a list of their seconds. In a CSV they are JSON.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.data.listing import list_folder
from studio.errors import DataError, RequestError
from studio.music.score import NO_CHORD, Beat, Score, parse_chord

COLUMNS = ("beats", "chords", "chords_time")


class ScoreSheet:
    """The scores that metadata files tell. The captions' reader has checked the files by then."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for beats or chords that make no sense, with the file and the name of the sound."""
        self.rows: dict[Path, Score] = {}
        for path in list_folder(folder).metadata:
            for row in _rows(path):
                if any(row.get(column) for column in COLUMNS):
                    where = f"'{path.name}', {row['file_name']}"
                    sound = Path(os.path.normpath(path.parent / str(row["file_name"])))
                    self.rows[sound] = Score("", _beats(row, where), _chords(row, where))

    def completed(self, path: Path, score: Score) -> Score:
        """A caption's score with what the sheet has for this file and the caption does not tell."""
        found = self.rows.get(Path(os.path.normpath(path)))
        if found is None:
            return score
        beats = found.beats if score.beats is None else score.beats
        return replace(score, beats=beats, chords=found.chords if score.chords is None else score.chords)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
        return
    for row in csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True):
        plain: dict[str, Any] = {str(name).strip(): value for name, value in row.items()}
        yield plain | {name: _json(plain.get(name)) for name in COLUMNS}


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text  # refused by name below


def _beats(row: Mapping[str, Any], where: str) -> tuple[Beat, ...] | None:
    value = row.get("beats")
    if not value:
        return None
    try:
        times, counts = value
        return tuple(sorted((float(t), int(c)) for t, c in zip(times, counts, strict=True)))
    except (TypeError, ValueError):
        raise DataError(f"{where}: its 'beats' are no beats", "write [[seconds, ...], [counts, ...]]") from None


def _chords(row: Mapping[str, Any], where: str) -> tuple[tuple[str, float | None], ...] | None:
    names, times = row.get("chords"), row.get("chords_time")
    if not names:
        return None
    try:
        chords = [(str(name), float(time)) for name, time in zip(names, times or (), strict=True)]
    except (TypeError, ValueError):
        raise DataError(f"{where}: not every chord has a time", "give 'chords' and 'chords_time', as long") from None
    try:
        for name, _ in chords:
            if name != NO_CHORD:
                parse_chord(name)
    except RequestError as fault:
        raise DataError(f"{where}: {fault.message}", fault.hint) from None
    return tuple(sorted(chords, key=lambda chord: chord[1]))
