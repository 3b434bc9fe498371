"""Heat maps and a dendrogram as inline SVG. Sizes are in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from studio.interference.clusters import Branch

CELL, SHORT = 30, 14


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A matrix of figures in [0, 1] (larger ones are shown as 1, negative ones by their size), each with a tooltip."""
    left, top, cell = _room(rows), _room(columns), CELL if len(columns) <= 20 else SHORT
    height = cell if len(rows) <= 20 else SHORT
    parts = [_text(left - 6, top + (r + 0.5) * height + 4, name, "end") for r, name in enumerate(rows)]
    parts += [_upright(left + (c + 0.5) * cell + 4, top - 6, name) for c, name in enumerate(columns)]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            tip = escape(f"{rows[r]} / {columns[c]}: {value:.3g}")
            parts.append(
                f'<rect x="{left + c * cell}" y="{top + r * height}" width="{cell - 1}" height="{height - 1}" '
                f'fill="{_colour(value)}"><title>{tip}</title></rect>'
            )
            if cell == CELL and height == CELL:
                ink = "#fff" if abs(value) > 0.6 else "#222"
                parts.append(
                    _text(left + (c + 0.5) * cell, top + (r + 0.5) * height + 4, f"{value:.2f}", "middle", ink)
                )
    size = (left + len(columns) * cell + 10, top + len(rows) * height + 10)
    return f"<figure><figcaption>{escape(title)}</figcaption>{_svg(size, parts)}</figure>"


def tree(title: str, names: Sequence[str], root: Branch) -> str:
    """A dendrogram, leaves downwards in a column; the further right two join, the less they have in common."""
    left, width, step = _room(names), 320, 18
    order = {leaf: place for place, leaf in enumerate(root.leaves)}
    parts = [_text(left - 6, (place + 0.5) * step + 4, names[leaf], "end") for leaf, place in order.items()]
    scale = width / max(root.height, 1e-9)

    def draw(branch: Branch) -> tuple[float, float]:
        if not branch.parts:
            return left, (order[branch.leaf] + 0.5) * step
        x = left + branch.height * scale
        ends = [draw(part) for part in branch.parts]
        parts.extend(_line(end_x, y, x, y) for end_x, y in ends)
        parts.append(_line(x, ends[0][1], x, ends[1][1]))
        return x, (ends[0][1] + ends[1][1]) / 2

    draw(root)
    size = (left + width + 20, len(names) * step + 10)
    return f"<figure><figcaption>{escape(title)}</figcaption>{_svg(size, parts)}</figure>"


def _colour(value: float) -> str:
    """White at 0 over orange to dark red at 1."""
    strength = min(1.0, abs(value))
    return f"rgb({255 - int(115 * strength**2)},{255 - int(225 * strength)},{255 - int(245 * strength**0.7)})"


def _room(names: Sequence[str]) -> int:
    return 20 + 7 * max((len(name) for name in names), default=0)


def _text(x: float, y: float, text: str, anchor: str, ink: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{escape(text)}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" transform="rotate(-90 {x:.1f} {y:.1f})">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#555"/>'


def _svg(size: tuple[float, float], parts: Sequence[str]) -> str:
    width, height = size
    head = f'<svg width="{width:.0f}" height="{height:.0f}" font-size="11" font-family="sans-serif" role="img">'
    return head + "".join(parts) + "</svg>"
