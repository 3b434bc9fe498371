"""A table of measurements, and the bars that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over the rounds, and its quartiles. A ratio of exact figures has no spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        middle = f"{self.median:.3f}"
        return middle if self.low == self.high else f"{middle} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One trainee in one case. `figures` are in the units that their names say; `ratios` are against a named peer."""

    case: str
    name: str
    trained: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def value(figures: str, row: Row) -> float | None:
    """A figure by its name, or the median of a ratio by that of the peer."""
    if figures in row.ratios:
        return row.ratios[figures].median
    return row.figures.get(figures)


@dataclass(frozen=True)
class Bar:
    """Figure or ratio `what` of the rows whose case and name match is at most `limit`, at two decimals."""

    case: str
    name: str
    what: str
    limit: float
    text: str

    def verdicts(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        found = [row for row in rows if fnmatchcase(row.name, self.name) and fnmatchcase(row.case, self.case)]
        measured = [(row, value(self.what, row)) for row in found]
        return [
            {
                "bar": f"{row.name}: {self.text}",
                "case": row.case,
                "limit": self.limit,
                "measured": number,
                "met": round(number, 2) <= self.limit,
            }
            for row, number in measured
            if number is not None
        ]


def judge(bars: Sequence[Bar], rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [verdict for bar in bars for verdict in bar.verdicts(rows)]


# -- shown ---------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Heads and what stands beneath them: all figures, then all ratios that any row has."""
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    shown: list[tuple[str, Callable[[Row], str]]] = [
        ("case", lambda row: row.case),
        ("method", lambda row: row.name),
        ("trained", lambda row: f"{row.trained:,}" if row.trained else ""),
    ]
    shown += [(name.replace("_", " "), lambda row, name=name: _number(row.figures.get(name))) for name in figures]  # type: ignore[misc]
    shown += [(f"/ {name}", lambda row, name=name: str(row.ratios.get(name, ""))) for name in peers]  # type: ignore[misc]
    if any(row.note for row in rows):
        shown.append(("note", lambda row: row.note))
    return shown


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}" if number < 1000 else f"{number:,.0f}"


def markdown(rows: Sequence[Row], verdicts: Sequence[dict[str, Any]]) -> str:
    """Both tables, for a document."""
    columns = columns_of(rows)
    lines = [_line([head for head, _ in columns]), _line(["---"] * len(columns))]
    lines += [_line([cell(row) for _, cell in columns]) for row in rows]
    if verdicts:
        lines += ["", _line(["bar", "case", "at most", "measured", "met"]), _line(["---"] * 5)]
        lines += [_line(verdict_cells(verdict)) for verdict in verdicts]
    return "\n".join(lines) + "\n"


def verdict_cells(verdict: dict[str, Any]) -> list[str]:
    limit, measured = f"{verdict['limit']:.2f}", f"{verdict['measured']:.3f}"
    return [verdict["bar"], verdict["case"], limit, measured, "yes" if verdict["met"] else "NO"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
