"""A grid of pictures over one or two settings, with a column that wears no adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import RequestError

MOST_CELLS = 64
STRENGTH, SEED, STEPS, GUIDANCE = "strength", "seed", "steps", "guidance"
AXES = [
    ("nothing", ""), ("strength of the adapters", STRENGTH), ("seed", SEED), ("steps", STEPS), ("guidance", GUIDANCE),
]  # fmt: skip
EXAMPLES = {STRENGTH: "0.4, 0.7, 1, 1.3", SEED: "0, 1, 2, 3", STEPS: "10, 25, 50", GUIDANCE: "2, 4, 7"}
WITHOUT = "no adapter"


@dataclass(frozen=True)
class Axis:
    """A setting and its values; none stands for a single row or column as the form has it."""

    kind: str
    values: tuple[float, ...]

    @property
    def labels(self) -> list[str]:
        return [f"{self.kind} {value:g}" for value in self.values] or [""]


def axis_of(kind: str | None, text: str | None) -> Axis:
    """Raises RequestError for values that the setting cannot have."""
    if not kind:
        return Axis("", ())
    if kind not in EXAMPLES:
        raise RequestError(f"there is no setting '{kind}' to sweep over")
    words = [word for word in str(text or EXAMPLES[kind]).replace(";", ",").split(",") if word.strip()]
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        raise RequestError(f"'{text}' are no numbers", f"write for example {EXAMPLES[kind]}") from None
    low = {STRENGTH: -5.0, SEED: 0.0, STEPS: 1.0, GUIDANCE: 0.0}[kind]
    high = {STRENGTH: 5.0, SEED: 2.0**32, STEPS: 1000.0, GUIDANCE: 50.0}[kind]
    whole = kind in (SEED, STEPS)
    if not all(low <= value <= high and not (whole and value % 1) for value in values):  # NaN fails, too
        kinds = "whole numbers" if whole else "numbers"
        raise RequestError(f"{kind} must be {kinds} from {low:g} to {high:g}", f"for example {EXAMPLES[kind]}")
    return Axis(kind, values)


@dataclass(frozen=True)
class Sweep:
    """Columns go over `x`, rows over `y`; `without` adds a first column that wears no adapter."""

    x: Axis
    y: Axis
    without: bool

    @property
    def columns(self) -> list[str]:
        return [*([WITHOUT] if self.without else []), *self.x.labels]

    @property
    def rows(self) -> list[str]:
        return self.y.labels

    def cells(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """What each picture changes of the request, row by row. Raises RequestError for too many."""
        if len(self.rows) * len(self.columns) > MOST_CELLS:
            raise RequestError(f"that would be {len(self.rows) * len(self.columns)} pictures", f"{MOST_CELLS} at most")
        found = []
        for y in self.y.values or (None,):
            row = [_changed(request, self.y.kind, y)]
            cells = [_changed({**request, **row[0]}, self.x.kind, x) for x in self.x.values or (None,)]
            bare = [{**row[0], "adapters": []}] if self.without else []
            found += [{**row[0], **cell} for cell in (*bare, *cells)]
        return found

    def grid(self, pictures: Sequence[Path | None]) -> list[tuple[str, list[Path | None]]]:
        width = len(self.columns)
        return [(label, [*pictures[i * width : (i + 1) * width]]) for i, label in enumerate(self.rows)]


def _changed(request: dict[str, Any], kind: str, value: float | None) -> dict[str, Any]:
    if not kind or value is None:
        return {}
    if kind == STRENGTH:
        return {"adapters": [_stronger(use, value) for use in request["adapters"]]}
    return {kind: value if kind == GUIDANCE else int(value)}


def _stronger(use: str, factor: float) -> str:
    """The strength in the form, times the value of the sweep."""
    name, _, weight = use.rpartition(":")
    return f"{name}:{float(weight) * factor:g}"


def sweep_of(x: str | None, xs: str, y: str | None, ys: str, without: bool, adapters: Sequence[str]) -> Sweep | None:
    """The sweep that the form says, or None. Raises RequestError."""
    if not x and not y:
        return None
    if x and x == y:
        raise RequestError("both axes sweep over the same setting", "choose another one for the rows")
    if STRENGTH in (x, y) and not adapters:
        raise RequestError("a sweep over strengths needs an adapter", "choose one above")
    return Sweep(axis_of(x, xs), axis_of(y, ys), without and bool(adapters))
