"""What a caption of music tells, as fields: drawn, checked, and put into words.

Checked, because a published corpus of makam music has the makam's field filled with usuls in more than half of its
captions: a model learns that as readily as the truth.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from studio.data.melodies.cycles import CYCLES, FIELD_OF, MODE_FIELD_OF, TEMPI
from studio.data.melodies.modes import EVERY, MODES, OTHER_NAMES, Mode
from studio.data.melodies.voices import PLAYED, VOICES
from studio.errors import DataError, nearest
from studio.keyed import key_of

KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
PLAYED_KEYS = ("C", "D", "F", "G", "A")  # of them, those that the world plays in
MOODS = {
    ("major", "slow"): "calm",
    ("major", ""): "happy",
    ("major", "fast"): "cheerful",
    ("minor", "slow"): "sad",
    ("minor", ""): "wistful",
    ("minor", "fast"): "restless",
}
LAYA = {"slow": "vilambit", "": "madhya", "fast": "drut"}
DRAWS = 10_000
ALIKE = 0.75  # of 1, names that are so are one misspelt
HELD_OUT_SHARE = 8  # one combination of instrument and mode (and key) in so many is never trained on


@dataclass(frozen=True)
class Fields:
    """A kind of piece. `tempo` is "slow", "" or "fast"; `key` the tonic of western music, one of `KEYS`, else ""."""

    tradition: str
    instrument: str
    mode: str
    cycle: str
    tempo: str = ""
    key: str = ""

    def facts(self) -> dict[str, str]:
        """The fields under the names of their tradition, as `check_fields` takes them."""
        named = {MODE_FIELD_OF[self.tradition]: self.mode, FIELD_OF[self.tradition]: self.cycle}
        told = {"instrument": self.instrument, **named, "tempo": self.tempo, "key": self.key}
        return {name: value for name, value in told.items() if value}

    @property
    def is_held_out(self) -> bool:
        """Whether training never has this combination of instrument, mode and key."""
        return key_of("melody", self.tradition, self.instrument, self.mode, self.key) % HELD_OUT_SHARE == 0


def draw_fields(
    rng: np.random.Generator, traditions: Sequence[str], held_out: bool = False, modes: Set[str] = EVERY
) -> Fields:
    """A random kind of piece, of one of the traditions, in one of the modes, and of that side of the split.

    Raises DataError where there is none.
    """
    able = [t for t in traditions if not modes.isdisjoint(MODES[t])]
    tradition = _one(rng, able or traditions)
    for _ in range(DRAWS):
        fields = Fields(
            tradition,
            _one(rng, PLAYED[tradition]),
            _one(rng, list(MODES[tradition])),
            _one(rng, list(CYCLES[tradition])),
            _one(rng, list(TEMPI[tradition])),
            _one(rng, PLAYED_KEYS) if tradition == "western" else "",
        )
        if fields.is_held_out == held_out and fields.mode in modes:
            return fields
    side = "is held out" if held_out else "may be trained on"
    raise DataError(f"no {tradition} piece in {', '.join(sorted(modes))} {side}", "name more modes")


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


# -- in words --------------------------------------------------------------------------------------------------


def caption_of(fields: Fields, rng: np.random.Generator) -> str:
    """The fields as a caption: always the mode and the instrument, a tempo that is not medium, often the rest."""
    voice = VOICES[fields.instrument].phrase
    cycle = rng.random() < 0.6
    if fields.tradition == "western":
        mood = MOODS[fields.mode, fields.tempo] if rng.random() < 0.5 else ""
        what = _joined(fields.tempo, mood, _one(rng, ("melody", "tune", "piece")))
        where = f"in {fields.key} {fields.mode}"
        rhythm = {"waltz": "as a waltz"}.get(fields.cycle, f"in a {fields.cycle} rhythm") if cycle else ""
        parts = [f"{_article(what)} {what}", where, f"on {voice}", rhythm]
    elif fields.tradition == "raga":
        laya = f"{LAYA[fields.tempo]} laya" if rng.random() < 0.3 else ""
        what = _joined("" if laya else fields.tempo, f"raga {fields.mode}")
        parts = [what, f"on {voice}", f"in {fields.cycle}" if cycle else "", laya]
    else:
        what = _joined(fields.tempo, _one(rng, ("melody", "taksim" if not cycle else "piece")))
        usul = f"in usul {fields.cycle}" if cycle else ""
        parts = [f"{_article(what)} {what}", f"in makam {fields.mode}", f"on {voice}", usul]
    words = _joined(*parts).lower()
    return unaccented(words) if rng.random() < 0.25 else words


def solo(caption: str, fields: Fields) -> str:
    """The caption of the line alone, where the tradition has a drone or a drum."""
    return caption if fields.tradition == "western" else f"{caption} solo"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def vocabulary() -> list[str]:
    """Every word that a caption can have, lower case, sorted."""
    words = "a an in on as of with solo melody tune piece taksim raga makam usul laya rhythm music moderate".split()
    names = [*MOODS.values(), *LAYA.values(), *KEYS, *(v.phrase for v in VOICES.values()), "slow fast"]
    names += [name for modes in MODES.values() for name in modes]
    names += [name for cycles in CYCLES.values() for name in cycles]
    found = {word for phrase in [*words, *names] for word in phrase.lower().split()}
    return sorted(found | {unaccented(word) for word in found})


# -- checking --------------------------------------------------------------------------------------------------

FIELDS: dict[str, list[str]] = {
    **{MODE_FIELD_OF[t]: list(MODES[t]) for t in MODES},
    **{FIELD_OF[t]: list(CYCLES[t]) for t in CYCLES},
    "instrument": list(VOICES),
    "tempo": ["slow", "fast"],
    "key": list(KEYS),
}


def fold(name: str) -> str:
    """A name without accents, case, hyphens and spaces: "Türk Aksağı" and "turk-aksagi" are one."""
    return "".join(letter for letter in unaccented(name.casefold()) if letter.isalnum())


def unaccented(text: str) -> str:
    """As it is typed on a keyboard without Turkish letters: "uşşak" is "ussak"."""
    parts = unicodedata.normalize("NFKD", text.replace("ı", "i"))
    return "".join(letter for letter in parts if not unicodedata.combining(letter))


_KNOWN = {field: {fold(name): name for name in names} for field, names in FIELDS.items()}
for _other, _name in OTHER_NAMES.items():
    _KNOWN["makam"][fold(_other)] = _name


def check_fields(told: Mapping[str, str], where: str = "") -> dict[str, str]:
    """The fields under their proper names. Raises DataError, beginning with `where`.

    For an unknown field or name the nearest is named; a name that belongs to another field, as a usul in the makam's,
    is told as that.
    """
    prefix = f"{where}: " if where else ""
    checked = {}
    for field, value in told.items():
        if field not in _KNOWN:
            raise DataError(f"{prefix}unknown field '{field}'", nearest(field, _KNOWN))
        name = _KNOWN[field].get(fold(value))
        if name is None:
            owner = next((other for other, names in _KNOWN.items() if fold(value) in names), None)
            if owner is not None:
                raise DataError(
                    f"{prefix}the field '{field}' holds '{value}', which is the name of a {owner}",
                    f"perhaps the fields '{field}' and '{owner}' are swapped",
                )
            raise DataError(f"{prefix}unknown {field} '{value}'", _nearest_name(value, field))
        checked[field] = name
    return checked


def mode_in(text: str) -> Mode | None:
    """The first mode that a text names, in any spelling; None where it names none."""
    for word in map(fold, text.split()):
        for tradition, field in MODE_FIELD_OF.items():
            if word in _KNOWN[field]:
                return MODES[tradition][_KNOWN[field][word]]
    return None


def misspelt_mode(text: str) -> str:
    """Of a text with a raga or makam nearly as one is called, both names: "'yamn', perhaps for 'Yaman'"; else ""."""
    words = text.split()
    for field, word in pairwise(words):
        names = _KNOWN.get(field.lower(), {}) if field.lower() in ("raga", "makam") else {}
        if fold(word) not in names and (close := difflib.get_close_matches(fold(word), names, 1, ALIKE)):
            return f"'{word}', perhaps for '{names[close[0]]}'"
    return ""


def strange_words(text: str) -> list[str]:
    """What no caption of this world has, with the word that was perhaps meant: "'yamn' (yaman?)"."""
    known = {fold(word): word for word in vocabulary()}
    words = dict.fromkeys(word.strip(",.;:!?") for word in text.split())
    strange = [word for word in words if fold(word) not in {*known, ""}]
    near = [difflib.get_close_matches(fold(word), known, 1, ALIKE) for word in strange]
    return [f"'{word}'" + "".join(f" ({known[n]}?)" for n in found) for word, found in zip(strange, near, strict=True)]


def told_by_fields(row: Mapping[str, object], where: str) -> str:
    """The caption of a row of metadata by its fields, as far as it has any: "slow raga yaman on a sitar in teental".

    Raises DataError for a name that is none, beginning with `where`.
    """
    told = {field: value.strip() for field in _KNOWN if isinstance(value := row.get(field), str) and value.strip()}
    if not told:
        return ""
    checked = check_fields(told, where)
    tempo = checked.get("tempo", "")
    what = f"{_article(tempo or 'piece')} {_joined(tempo, 'piece')}"
    parts = [_joined(tempo, f"raga {checked['raga']}") if "raga" in checked else what]
    parts += [f"in makam {checked['makam']}"] if "makam" in checked else []
    key = _joined(checked.get("key", ""), checked.get("mode", ""))
    parts += [f"in {key}"] if key else []
    parts += [f"on {VOICES[checked['instrument']].phrase}"] if "instrument" in checked else []
    parts += [f"in {checked['tala']}"] if "tala" in checked else []
    parts += [f"in usul {checked['usul']}"] if "usul" in checked else []
    parts += [f"in a {checked['rhythm']} rhythm"] if "rhythm" in checked else []
    return _joined(*parts).lower()


def _nearest_name(value: str, field: str) -> str:
    hint = nearest(fold(value), _KNOWN[field])
    folded = hint.removeprefix("did you mean '").removesuffix("'?")
    return f"did you mean '{_KNOWN[field][folded]}'?" if folded in _KNOWN[field] else nearest(value, FIELDS[field])
