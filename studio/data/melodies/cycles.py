"""Rhythms: bars of western melodies, talas and usuls, as note lengths and strokes of a drum.

Lengths are in beats (matras, units of an usul). A stroke is low (düm, ge, dha), high (tek, na, tin) or rim (ke, ka).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cycle:
    """One round: its beats, `strokes` of the drum as (beat, kind), and `figures`, ways to fill beats with notes."""

    name: str
    tradition: str
    beats: int
    strokes: tuple[tuple[float, str], ...]
    figures: tuple[tuple[float, ...], ...]


KINDS = {"L": "low", "H": "high", "K": "rim"}


def _strokes(pattern: str) -> tuple[tuple[float, str], ...]:
    """From "L2 H1 H1": kinds and their lengths in beats."""
    found, at = [], 0.0
    for word in pattern.split():
        found.append((at, KINDS[word[0]]))
        at += float(word[1:])
    return tuple(found)


def _length(pattern: str) -> int:
    return sum(int(word[1:]) for word in pattern.split())


def _western(name: str, beats: int, *figures: str) -> Cycle:
    return Cycle(name, "western", beats, (), tuple(tuple(map(float, f.split())) for f in figures))


RHYTHMS = {
    cycle.name: cycle
    for cycle in (
        _western("steady", 4, "1 1 1 1", "1 1 2", "2 1 1"),
        _western("flowing", 4, ".5 .5 .5 .5 .5 .5 .5 .5", ".5 .5 .5 .5 1 1", "1 .5 .5 .5 .5 1"),
        _western("dotted", 4, "1.5 .5 1.5 .5", "1.5 .5 1 1", "1.5 .5 2"),
        _western("waltz", 3, "1 1 1", "2 1", "1 .5 .5 1"),
    )
}

#: Lengths that fill two beats, for traditions whose lines float over the cycle.
FREE = ((2.0,), (1.0, 1.0), (1.5, 0.5), (0.5, 0.5, 1.0), (0.5, 0.5, 0.5, 0.5), (1.0, 0.5, 0.5))


def _counted(tradition: str, name: str, pattern: str) -> Cycle:
    return Cycle(name, tradition, _length(pattern), _strokes(pattern), FREE)


TALAS = {
    name: _counted("raga", name, pattern)
    for name, pattern in {
        "Teental": "L1 H1 H1 L1 L1 H1 H1 L1 H1 K1 K1 H1 H1 H1 H1 L1",
        "Jhaptal": "L1 H1 L1 L1 H1 K1 H1 L1 L1 H1",
        "Ektal": "L1 L1 H1 K1 K1 H1 K1 H1 L1 K1 L1 H1",
        "Rupak": "H1 H1 K1 L1 H1 L1 H1",
        "Keherwa": "L1 H1 K1 H1 K1 H1 L1 H1",
        "Dadra": "L1 H1 H1 L1 K1 H1",
    }.items()
}

USULS = {
    name: _counted("makam", name, pattern)
    for name, pattern in {
        "Sofyan": "L2 H1 K1",
        "Düyek": "L1 H2 H1 L2 H2",
        "Aksak": "L2 H1 K1 L2 H2 H1",
        "Curcuna": "L2 H1 K2 L2 H2 H1",
        "Semai": "L1 H1 H1",
        "Yürük Semai": "L1 H1 H1 L1 H2",
        "Devr-i Hindi": "L1 H1 K1 L2 H2",
        "Türk Aksağı": "L2 H2 H1",
    }.items()
}

CYCLES: dict[str, dict[str, Cycle]] = {"western": RHYTHMS, "raga": TALAS, "makam": USULS}
FIELD_OF = {"western": "rhythm", "raga": "tala", "makam": "usul"}  # what a cycle is called
MODE_FIELD_OF = {"western": "mode", "raga": "raga", "makam": "makam"}  # what a scale is called
TEMPI: dict[str, dict[str, tuple[float, float]]] = {  # beats a minute
    "western": {"slow": (50, 72), "": (88, 112), "fast": (136, 176)},
    "raga": {"slow": (40, 60), "": (84, 130), "fast": (170, 240)},
    "makam": {"slow": (50, 72), "": (88, 120), "fast": (140, 200)},
}
