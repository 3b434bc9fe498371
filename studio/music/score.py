"""What a piece is told beside words: its beats and chords, written into a prompt or a caption.

    a slow bossa nova | beats: 96 bpm 4/4 | chords: Am@0 Dm7@2.5 G7@5 Cmaj7@7.5

`beats:` is a tempo with a metre (4/4 where none is given), or `COUNT@SECONDS` one by one: `1@0.5 2@1.1 3@1.7 1@2.3`.
`chords:` are `NAME@SECONDS`, or bare names, spread evenly over the piece. `none` says that there are none, where a base
would otherwise guess them from the words. What follows a `|` and is neither stays text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from studio.errors import RequestError

Beat = tuple[float, int]  # seconds, count within the bar from 1
Chord = tuple[str, float]  # name, seconds

ROOTS = (
    "A",
    "A#",
    "Bb",
    "B",
    "Cb",
    "B#",
    "C",
    "C#",
    "Db",
    "D",
    "D#",
    "Eb",
    "E",
    "Fb",
    "E#",
    "F",
    "F#",
    "Gb",
    "G",
    "G#",
    "Ab",
)
TYPES = ("maj", "maj7", "m", "m6", "m7", "m7b5", "6", "7", "aug", "dim")
NO_CHORD = "N"
OTHER_SPELLINGS = {"": "maj", "min": "m", "min7": "m7", "M7": "maj7", "-": "m", "+": "aug", "M": "maj"}
USUAL_METRE = 4

_FIELD = re.compile(r"\s*(beats|chords)\s*:(.*)", re.DOTALL)
_TEMPO = re.compile(r"(\d+(?:\.\d+)?)\s*bpm(?:\s+(\d+)/\d+)?")
_CHORD = re.compile(r"([A-G][#b]?)([^/]*)(/[A-G][#b]?)?")


@dataclass(frozen=True)
class Score:
    """Words, and beats and chords where they are told: None says that they are not, () that there are none.

    `tempo` is (beats per minute, beats per bar). A chord at None seconds has no time of its own.
    """

    text: str
    beats: tuple[Beat, ...] | None = None
    chords: tuple[tuple[str, float | None], ...] | None = None
    tempo: tuple[float, int] | None = None

    def within(self, start: float, seconds: float) -> Score:
        """The part that lasts `seconds` from `start`, at times of its own: every beat and chord has one then."""
        beats = self.beats if self.tempo is None else _steady(*self.tempo, start + seconds)
        here = (
            None if beats is None else tuple((round(t - start, 3), n) for t, n in beats if start <= t < start + seconds)
        )
        chords = None if self.chords is None else _timed(self.chords, start, seconds)
        return replace(self, beats=here, chords=chords, tempo=None)

    @property
    def timed_chords(self) -> tuple[Chord, ...]:
        """The chords of a part, as `within` gives it."""
        return tuple((name, seconds) for name, seconds in self.chords or () if seconds is not None)


def read_score(prompt: str) -> Score:
    """The score that a prompt or caption tells. Raises RequestError for beats or chords that make no sense."""
    words, *parts = prompt.split("|")
    score = Score(words.strip())
    for part in parts:
        field = _FIELD.fullmatch(part)
        if field is None:
            score = replace(score, text=f"{score.text} | {part.strip()}")
        elif field[1] == "beats":
            score = _with_beats(score, field[2].strip())
        else:
            score = replace(score, chords=_chords(field[2].split()))
    return score


def parse_chord(name: str) -> tuple[str, str, bool]:
    """(root, type, whether another note is in the bass) of `F#m7/A`. Raises RequestError."""
    found = _CHORD.fullmatch(name)
    kind = OTHER_SPELLINGS.get(found[2], found[2]) if found else ""
    if found is None or found[1] not in ROOTS or kind not in TYPES:
        raise RequestError(
            f"'{name}' is no chord that a score can have",
            f"a note from A to G with # or b, then nothing or one of {', '.join(TYPES)}, perhaps /BASS; N for none",
        )
    return found[1], kind, found[3] is not None


# -- beats -----------------------------------------------------------------------------------------------------


def _with_beats(score: Score, text: str) -> Score:
    if text == "none":
        return replace(score, beats=(), tempo=None)
    if tempo := _TEMPO.fullmatch(text):
        speed, metre = float(tempo[1]), int(tempo[2] or USUAL_METRE)
        if not 10 <= speed <= 400 or metre < 1:
            raise RequestError(f"'beats: {text}' is no tempo", "from 10 to 400 bpm, with a metre such as 3/4")
        return replace(score, tempo=(speed, metre), beats=())
    beats = []
    for part in text.split():
        count, at, seconds = part.partition("@")
        if not at or not count.isdigit() or not count.strip("0") or _number(seconds) is None:
            raise RequestError(f"'{part}' in 'beats: {text}' is no beat", "write '96 bpm 4/4', or '1@0.5 2@1.1 1@1.7'")
        beats.append((float(seconds), int(count)))
    return replace(score, beats=tuple(sorted(beats)), tempo=None)


def _steady(speed: float, metre: int, until: float) -> tuple[Beat, ...]:
    """Beats at `speed` per minute from 0 on."""
    period = 60 / speed
    return tuple((number * period, number % metre + 1) for number in range(int(until / period) + 1))


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


# -- chords ----------------------------------------------------------------------------------------------------


def _chords(parts: list[str]) -> tuple[tuple[str, float | None], ...]:
    if parts in (["none"], []):
        return ()
    chords: list[tuple[str, float | None]] = []
    for part in parts:
        name, at, seconds = part.partition("@")
        if at and _number(seconds) is None:
            raise RequestError(f"'{part}' has no time in seconds", "write chords as 'Am@0 F@2.5', or without times")
        if name != NO_CHORD:
            parse_chord(name)
        chords.append((name, _number(seconds)))
    if len({seconds is None for _, seconds in chords}) > 1:
        raise RequestError("some chords have a time and some have none", "give all of them one, or none")
    return tuple(sorted(chords, key=lambda chord: chord[1] or 0.0))


def _timed(chords: tuple[tuple[str, float | None], ...], start: float, seconds: float) -> tuple[tuple[str, float], ...]:
    """Chords of the part from `start`: what still sounds there begins at 0; those without times share it evenly."""
    if any(at is None for _, at in chords):
        return tuple((name, round(i * seconds / len(chords), 3)) for i, (name, _) in enumerate(chords))
    placed = [(name, round((at or 0.0) - start, 3)) for name, at in chords]
    sounding = [(name, 0.0) for name, at in placed if at < 0][-1:]
    here = [(name, at) for name, at in placed if 0 <= at < seconds]
    return tuple(here if here and here[0][1] == 0.0 else sounding + here)
