"""The report as one HTML page that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from torch import Tensor

from studio.interference.clusters import dendrogram
from studio.interference.drawings import heat_map, tree
from studio.interference.report import Report

STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
figure{display:inline-block;margin:0 2em 1em 0;vertical-align:top}figcaption{font-weight:bold}
table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.verdict{font-size:18px}li{margin:.2em 0}"""
MEASURES = {
    "weight cosine": "weight_cosine",
    "input overlap": "input_overlap",
    "output overlap": "output_overlap",
    "crosstalk": "crosstalk",
    "smallest angle": "smallest_angle_degrees",
}
MANY = 4  # adapters from which a tree says more than a table
LAYERS_SHOWN = 60


def page(report: Report) -> str:
    """The whole document."""
    names, total = report.names, report.total
    parts = [f"<h1>{_title(names)}</h1>"]
    parts += [f'<p class="verdict">{escape(line)}</p>' for line in report.verdict]
    parts += ["<ul>", *(f"<li>{escape(line)}</li>" for line in report.findings), "</ul>"] if report.findings else []
    parts.append(_table(list(report.adapters[0]), [list(adapter.values()) for adapter in report.adapters]))
    parts.append("<h2>All layers together</h2>")
    parts.append(heat_map("weight cosine", names, names, _numbers(total.cosine)))
    parts.append(heat_map("input overlap", names, names, _numbers(total.input_overlap)))
    parts.append(heat_map("output overlap", names, names, _numbers(total.output_overlap)))
    if total.crosstalk is not None:
        parts.append(
            heat_map("crosstalk: pictures of the row, disturbed by the column", names, names, _numbers(total.crosstalk))
        )
    if len(names) >= MANY:
        root = dendrogram(1 - total.input_overlap)
        parts.append(tree("who reads the same inputs (joined left: much in common)", names, root))
    parts.append("<h2>By part of the model</h2>")
    parts.append(_rows(report, [report.row(name, figures) for name, figures in report.groups.items()]))
    parts.append("<h2>The worst layers</h2>")
    worst = report.worst_layers(LAYERS_SHOWN)
    labels = [label for label, key in MEASURES.items() if key != "smallest_angle_degrees"]
    strip = [[row[MEASURES[label]] or 0.0 for label in labels] for row in worst]
    parts.append(heat_map("the worst pair of each", [row["where"] for row in worst], labels, strip))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{_title(names)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _title(names: Sequence[str]) -> str:
    return escape("Interference of " + (", ".join(names) if len(names) <= MANY else f"{len(names)} adapters"))


def _numbers(matrix: Tensor) -> list[list[float]]:
    return [[float(value) for value in row] for row in matrix]


def _rows(report: Report, rows: Sequence[dict[str, Any]]) -> str:
    table = [[row["where"], row["layers"], *(row[key] for key in MEASURES.values())] for row in rows]
    return _table(["part", "layers", *MEASURES], table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(shown(value))}</{tag}>" for value in values) + "</tr>"

    return "<table>" + cells(columns, "th") + "".join(cells(row, "td") for row in rows) + "</table>"


def shown(value: Any) -> str:
    """A cell of a table."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
