"""Scales: major and minor in equal temperament, ragas in just intonation, makams in Holdrian commas.

A mode has one set of degrees for rising and one for falling lines, two strong degrees, and degrees that sway. Ragas are
more than that: of phrases and of crooked (vakra) motion only these rules are kept. Swaras are 5-limit ratios.
Makams have two intonations: `theory`, the Arel-Ezgi-Uzdilek steps of 53 commas to the octave, and `performed`, with the
degrees that players are known to place elsewhere moved to about where they do; the latter are rounded to half commas
and stand for a tendency, not for a measurement of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OCTAVE = 1200.0
COMMA = OCTAVE / 53  # Holdrian
TRADITIONS = ("western", "raga", "makam")

#: Capitals are the higher of two, as usual: r is komal re, M is tivra ma.
SWARAS = {
    "S": 0.0,
    "r": 111.73,
    "R": 203.91,
    "g": 315.64,
    "G": 386.31,
    "m": 498.04,
    "M": 590.22,
    "P": 701.96,
    "d": 813.69,
    "D": 884.36,
    "n": 1017.60,
    "N": 1088.27,
}


@dataclass(frozen=True)
class Mode:
    """A scale within one octave, in cents above the tonic.

    `up`, `down`: degrees of rising and falling lines, sorted. `strong`: where a line likes to rest (vadi and samvadi,
    the dominant called güçlü). `swaying`: degrees played with a slow oscillation. `begins`: where a melody starts.
    """

    name: str
    tradition: str
    up: tuple[float, ...]
    down: tuple[float, ...]
    strong: tuple[float, ...]
    swaying: tuple[float, ...] = ()
    begins: float = 0.0

    @property
    def degrees(self) -> tuple[float, ...]:
        return tuple(sorted({*self.up, *self.down}))

    @property
    def drone(self) -> float:
        """What a tanpura sounds beside the tonic: the fifth, or else the fourth or the seventh."""
        return next((s for s in (SWARAS["P"], SWARAS["m"], SWARAS["N"]) if s in self.degrees), SWARAS["P"])


def _western(name: str, semitones: str) -> Mode:
    degrees = tuple(100.0 * int(s) for s in semitones.split())
    return Mode(name, "western", degrees, degrees, (0.0, 700.0))


def _raga(name: str, up: str, down: str, strong: str, swaying: str = "", begins: str = "S") -> Mode:
    def degrees(swaras: str) -> tuple[float, ...]:
        return tuple(sorted(SWARAS[s] for s in swaras))

    vadi, samvadi = (SWARAS[s] for s in strong)
    return Mode(name, "raga", degrees(up), degrees(down), (vadi, samvadi), degrees(swaying), SWARAS[begins])


def _makam(name: str, commas: str, strong: float, begins: float = 0, falling: Mapping[float, float] = {}) -> Mode:
    up = tuple(float(c) for c in commas.split())
    down = tuple(falling.get(c, c) for c in up)
    cents = [tuple(sorted(c * COMMA for c in part)) for part in (up, down)]
    return Mode(name, "makam", cents[0], cents[1], (0.0, strong * COMMA), (), begins * COMMA)


def _by_name(*modes: Mode) -> dict[str, Mode]:
    return {mode.name: mode for mode in modes}


WESTERN = _by_name(_western("major", "0 2 4 5 7 9 11"), _western("minor", "0 2 3 5 7 8 10"))

RAGAS = _by_name(
    _raga("Yaman", "SRGMDN", "SRGMPDN", "GN", begins="N"),
    _raga("Bhairav", "SrGmPdN", "SrGmPdN", "dr", swaying="rd"),
    _raga("Bhimpalasi", "SgmPn", "SRgmPDn", "mS", begins="n"),
    _raga("Malkauns", "Sgmdn", "Sgmdn", "mS"),
    _raga("Bhupali", "SRGPD", "SRGPD", "GD"),
    _raga("Bageshri", "SgmDn", "SRgmDn", "mS"),
    _raga("Darbari", "SRgmPdn", "SRgmPdn", "RP", swaying="gd"),
    _raga("Todi", "SrgMdN", "SrgMPdN", "dg"),
    _raga("Marwa", "SrGMDN", "SrGMDN", "rD"),
    _raga("Desh", "SRmPN", "SRGmPDn", "RP"),
)

MAKAMS = _by_name(
    _makam("Rast", "0 9 17 22 31 40 48", 31, falling={48: 44}),
    _makam("Uşşak", "0 8 13 22 31 35 44", 22),
    _makam("Hüseyni", "0 8 13 22 31 39 44", 31, begins=31),
    _makam("Hicaz", "0 5 17 22 31 35 44", 22, begins=22),
    _makam("Uzzal", "0 5 17 22 31 39 44", 31, begins=31),
    _makam("Zirgüleli", "0 5 17 22 31 36 48", 31),
    _makam("Buselik", "0 9 13 22 31 35 44", 31),
    _makam("Kürdi", "0 4 13 22 31 35 44", 22),
    _makam("Segâh", "0 5 14 22 31 36 49", 31),
    _makam("Karcığar", "0 8 13 22 27 39 44", 22, begins=22),
    _makam("Nikriz", "0 9 14 26 31 40 48", 31),
    _makam("Saba", "0 8 13 18 31 35 44", 13, begins=18),
)

#: Degrees in commas that are played elsewhere than the theory has them: the second of Uşşak and its kin is lower, the
#: wide step of Hicaz narrower on both sides.
_PLAYED: dict[str, dict[float, float]] = {
    "Uşşak": {8: 6.5},
    "Hüseyni": {8: 7.0},
    "Karcığar": {8: 7.0, 27: 28.0, 39: 38.5},
    "Saba": {8: 6.5, 18: 17.5},
    "Hicaz": {5: 6.0, 17: 16.5},
    "Uzzal": {5: 6.0, 17: 16.5},
    "Zirgüleli": {5: 6.0, 17: 16.5, 36: 37.0, 48: 47.5},
}

OTHER_NAMES = {"Beyati": "Uşşak", "Neva": "Hüseyni", "Hümayun": "Hicaz", "Nihavend": "Buselik"}


def _performed(mode: Mode) -> Mode:
    moved = {c * COMMA: played * COMMA for c, played in _PLAYED.get(mode.name, {}).items()}

    def there(degrees: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(moved.get(d, d) for d in degrees)

    up, down, strong = there(mode.up), there(mode.down), there(mode.strong)
    return Mode(mode.name, mode.tradition, up, down, strong, mode.swaying, there((mode.begins,))[0])


PERFORMED = {name: _performed(mode) for name, mode in MAKAMS.items()}
MODES: dict[str, dict[str, Mode]] = {"western": WESTERN, "raga": RAGAS, "makam": MAKAMS}

#: What the bundled bases are never taught, so that an adapter has something to teach: of each tradition some modes, and
#: of makams the whole kin of Hicaz, since one that is known would give the others away. Codec and autoencoder, which
#: are told nothing, hear all modes.
UNTAUGHT = frozenset({"Yaman", "Todi", "Hicaz", "Uzzal", "Zirgüleli", "Saba"})
EVERY = frozenset(name for modes in MODES.values() for name in modes)
TAUGHT = EVERY - UNTAUGHT


def mode_of(tradition: str, name: str, intonation: str = "theory") -> Mode:
    """A mode by its exact name; `intonation` is `theory` or `performed` and matters to makams alone."""
    table = PERFORMED if tradition == "makam" and intonation == "performed" else MODES[tradition]
    return table[name]
