"""Melodies as walks over a mode in the figures of a cycle, with the ornaments of their tradition.

A line rises over the mode's rising degrees and falls over its falling ones, likes to rest on its strong degrees, turns
at the ends of its range, and ends on the tonic. Cents are above the tonic, seconds from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from studio.data.melodies.cycles import CYCLES, TEMPI, Cycle
from studio.data.melodies.fields import KEYS, Fields
from studio.data.melodies.modes import OCTAVE, Mode, mode_of
from studio.data.melodies.voices import VOICES

LOWEST, HIGHEST = -500.0, 1700.0  # range of a line
SHORTEST = 0.09  # seconds of a note
C0_HZ = 440 * 2 ** (-4.75)


@dataclass(frozen=True)
class Note:
    """`glide_from`: the pitch it slides from, within `glide` seconds (meend). `shake_*`: andolan, gamak."""

    start: float
    seconds: float
    cents: float
    glide_from: float | None = None
    glide: float = 0.0
    shake_hz: float = 0.0
    shake_cents: float = 0.0


@dataclass(frozen=True)
class Score:
    """All that a rendering needs, and all that a measurement may be compared with."""

    fields: Fields
    mode: Mode
    tonic_hz: float
    beats_per_minute: float
    notes: tuple[Note, ...]
    strokes: tuple[tuple[float, str], ...]  # of a drum: seconds, kind
    seconds: float

    @property
    def beats(self) -> tuple[float, ...]:
        """The times of the beats."""
        step = 60 / self.beats_per_minute
        return tuple(step * i for i in range(int(np.ceil(self.seconds / step))))


def compose(fields: Fields, rng: np.random.Generator, seconds: float, intonation: str = "theory") -> Score:
    """A random piece of this kind."""
    mode = mode_of(fields.tradition, fields.mode, intonation)
    cycle = CYCLES[fields.tradition][fields.cycle]
    tempo = float(rng.uniform(*TEMPI[fields.tradition][fields.tempo]))
    notes = _ornamented(_walk(mode, _rhythm(cycle, 60 / tempo, seconds, rng), rng), fields, mode, rng)
    round_seconds = cycle.beats * 60 / tempo
    strokes = [
        (turn * round_seconds + beat * 60 / tempo, kind)
        for turn in range(int(np.ceil(seconds / round_seconds)))
        for beat, kind in cycle.strokes
    ]
    played = tuple((at, kind) for at, kind in strokes if at < seconds)
    return Score(fields, mode, tonic_of(fields), tempo, tuple(notes), played, seconds)


def tonic_of(fields: Fields) -> float:
    """Hz: the key within the instrument's register, or without one the tonic that the instrument is tuned to."""
    foot = VOICES[fields.instrument].tonic_hz
    if not fields.key:
        return float(foot)
    tonic = C0_HZ * 2 ** (KEYS.index(fields.key) / 12)
    return float(tonic * 2 ** np.ceil(np.log2(foot * 0.999 / tonic)))


# -- time ------------------------------------------------------------------------------------------------------


def _rhythm(cycle: Cycle, beat_seconds: float, seconds: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """(start, length) of notes that fill the time; the last one may be cut."""
    found: list[tuple[float, float]] = []
    at = 0.0
    while at < seconds:
        for beats in cycle.figures[int(rng.integers(len(cycle.figures)))]:
            length = beats * beat_seconds
            if at < seconds:
                found.append((at, min(length, seconds - at)))
            at += length
    return [(start, length) for start, length in found if length >= SHORTEST]


# -- pitch -----------------------------------------------------------------------------------------------------


def ladder(degrees: tuple[float, ...]) -> np.ndarray:
    """The degrees over all octaves of a line's range, sorted."""
    all_octaves = np.array([d + OCTAVE * o for o in (-1, 0, 1) for d in degrees])
    return np.sort(all_octaves[(all_octaves >= LOWEST) & (all_octaves <= HIGHEST)])


def _walk(mode: Mode, rhythm: list[tuple[float, float]], rng: np.random.Generator) -> list[Note]:
    rising, falling = ladder(mode.up), ladder(mode.down)
    pitch, direction = mode.begins, 1 if rng.random() < 0.6 else -1
    notes: list[Note] = []
    for index, (start, length) in enumerate(rhythm):
        if index:
            if rng.random() < 0.22:
                direction = -direction
            pitch, direction = _next_pitch(pitch, direction, mode, rising, falling, rng)
        if index == len(rhythm) - 1 and index:
            pitch = OCTAVE * round(pitch / OCTAVE)
        notes.append(Note(start, length, float(pitch)))
    return notes


def _next_pitch(
    pitch: float, direction: int, mode: Mode, rising: np.ndarray, falling: np.ndarray, rng: np.random.Generator
) -> tuple[float, int]:
    """The next pitch of a line, and where it is heading: steps mostly, strong degrees rather than others."""
    if rng.random() < 0.06:
        return pitch, direction
    ahead = _ahead(pitch, direction, rising, falling)
    if not len(ahead):
        direction = -direction
        ahead = _ahead(pitch, direction, rising, falling)
    ahead = ahead[:3]
    weights = np.array([0.72, 0.2, 0.08])[: len(ahead)]
    at_rest = np.array([_is_strong(p, mode) for p in ahead])
    weights = weights * np.where(at_rest, 1.8, 1.0)
    return float(ahead[int(rng.choice(len(ahead), p=weights / weights.sum()))]), direction


def _ahead(pitch: float, direction: int, rising: np.ndarray, falling: np.ndarray) -> np.ndarray:
    return rising[rising > pitch + 1] if direction > 0 else falling[falling < pitch - 1][::-1]


def _is_strong(pitch: float, mode: Mode) -> bool:
    return any(abs((pitch - s + 600) % OCTAVE - 600) < 1 for s in (*mode.strong, 0.0))


# -- ornaments -------------------------------------------------------------------------------------------------


def _ornamented(notes: list[Note], fields: Fields, mode: Mode, rng: np.random.Generator) -> list[Note]:
    """Glides and shakes as the tradition has them, where the note is long enough; none in western melodies."""
    if fields.tradition == "western" or not VOICES[fields.instrument].glides:
        return notes
    gliding, shaking = (0.4, 0.12) if fields.tradition == "raga" else (0.22, 0.06)
    found = []
    for before, note in zip([None, *notes[:-1]], notes):
        source, glide, shake = None, 0.0, (0.0, 0.0)
        near = before is not None and 0 < abs(before.cents - note.cents) <= 520
        if before is not None and near and note.seconds > 0.2 and rng.random() < gliding:
            source, glide = before.cents, float(rng.uniform(0.06, min(0.4, 0.55 * note.seconds)))
        if note.seconds > 0.35:
            sways = any(abs((note.cents - s) % OCTAVE) < 1 for s in mode.swaying)
            if sways and rng.random() < 0.7:
                shake = (float(rng.uniform(1, 2)), float(rng.uniform(30, 50)))  # andolan
            elif rng.random() < shaking:
                shake = (float(rng.uniform(4, 6)), float(rng.uniform(100, 200)))  # gamak
        found.append(Note(note.start, note.seconds, note.cents, source, glide, *shake))
    return found
