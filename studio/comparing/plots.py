"""Scatter plots as PNG, drawn with Pillow: a numbered point per cell with its spread both ways, and a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from studio.comparing.table import Summary

SCALE = 2  # drawn larger, then shrunk, so that lines are smooth
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, LEGEND = 900, 480, 80, 58, 40, 270  # pixels
INK, SOFT, LINE = (29, 33, 41), (102, 102, 119), (224, 227, 233)
COLOURS = [
    (47, 111, 221), (224, 123, 57), (46, 148, 96), (196, 60, 80), (132, 92, 190), (140, 102, 70), (214, 106, 170),
    (110, 116, 128), (160, 150, 30), (30, 150, 170),
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    name: str
    x: Summary
    y: Summary


@dataclass(frozen=True)
class Axis:
    label: str
    logarithmic: bool = False

    def of(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.logarithmic else value


def scatter(
    title: str, x: Axis, y: Axis, points: Sequence[Point], levels: dict[str, float] | None = None
) -> Image.Image:
    """One plot. `levels` are dashed lines across: floors and ceilings of y by name."""
    frame = _Frame(title, x, y, points, levels or {})
    frame.draw()
    return frame.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Frame:
    """The canvas with its scales."""

    def __init__(self, title: str, x: Axis, y: Axis, points: Sequence[Point], levels: dict[str, float]) -> None:
        self.title, self.x, self.y, self.points, self.levels = title, x, y, points, levels
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.labels: list[tuple[float, float, float, float]] = []  # boxes of the names of levels
        self.x_range = _range([x.of(v) for p in points for v in _ends(p.x, x.logarithmic)])
        self.y_range = _range([y.of(v) for p in points for v in _ends(p.y, y.logarithmic)] + list(levels.values()))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels, before shrinking, of scaled coordinates."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - LEGEND)
        return across * SCALE, (HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)) * SCALE

    def text(self, at: tuple[float, float], text: str, size: int = 13, anchor: str = "la", fill: tuple = INK) -> None:
        self.pen.text(at, text, fill=fill, anchor=anchor, font=ImageFont.load_default(size * SCALE))

    def draw(self) -> None:
        self.text((LEFT * SCALE, 10 * SCALE), self.title, 15)
        self._grid()
        for name, level in self.levels.items():
            self._level(name, level)
        for number, point in enumerate(self.points):
            self._point(number, point)
        step = min(22, (HEIGHT - TOP - 20) // max(1, len(self.points)))
        for number, point in enumerate(self.points):
            self._legend(number, point.name, TOP + number * step)

    def _grid(self) -> None:
        for value in _ticks(self.x_range, self.x.logarithmic):
            at = self.place(value, self.y_range[0])
            self.pen.line([at, self.place(value, self.y_range[1])], fill=LINE, width=SCALE)
            self.text((at[0], at[1] + 6 * SCALE), _number(value, self.x.logarithmic), 12, "ma", SOFT)
        for value in _ticks(self.y_range, self.y.logarithmic):
            at = self.place(self.x_range[0], value)
            self.pen.line([at, self.place(self.x_range[1], value)], fill=LINE, width=SCALE)
            self.text((at[0] - 6 * SCALE, at[1]), _number(value, self.y.logarithmic), 12, "rm", SOFT)
        middle = (LEFT + WIDTH - LEGEND) / 2
        self.text((middle * SCALE, (HEIGHT - 24) * SCALE), self.x.label, 13, "ma", SOFT)
        self.text((8 * SCALE, (TOP - 16) * SCALE), self.y.label, 13, "la", SOFT)

    def _level(self, name: str, level: float) -> None:
        (left, y), (right, _) = self.place(self.x_range[0], level), self.place(self.x_range[1], level)
        for start in range(int(left), int(right), 12 * SCALE):
            self.pen.line([(start, y), (min(start + 6 * SCALE, right), y)], fill=SOFT, width=SCALE)
        beside = [box[0] - 12 * SCALE for box in self.labels if abs(box[3] - y) < 14 * SCALE]
        at, font = (min([right - 4 * SCALE, *beside]), y - 2 * SCALE), ImageFont.load_default(11 * SCALE)
        self.labels.append(self.pen.textbbox(at, name, anchor="rs", font=font))
        self.pen.text(at, name, fill=SOFT, anchor="rs", font=font)

    def _point(self, number: int, point: Point) -> None:
        colour = COLOURS[number % len(COLOURS)]
        pale = tuple((2 * 255 + c) // 3 for c in colour)
        x, y = self.x.of(point.x.mean), self.y.of(point.y.mean)
        for low, high in ((_ends(point.x, self.x.logarithmic), None), (None, _ends(point.y, self.y.logarithmic))):
            if low is not None:
                line = [self.place(self.x.of(value), y) for value in low]
            else:
                assert high is not None
                line = [self.place(x, self.y.of(value)) for value in high]
            self.pen.line(line, fill=pale, width=3 * SCALE)
        self._mark(number, self.place(x, y))

    def _legend(self, number: int, name: str, y: int) -> None:
        at = ((WIDTH - LEGEND + 24) * SCALE, (y + 8) * SCALE)
        self._mark(number, at)
        self.text((at[0] + 16 * SCALE, at[1]), name, 12, "lm")

    def _mark(self, number: int, at: tuple[float, float]) -> None:
        radius = 9 * SCALE
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        self.pen.ellipse(box, fill=COLOURS[number % len(COLOURS)], outline="white", width=SCALE)
        self.text(at, str(number + 1), 11, "mm", (255, 255, 255))


def _ends(value: Summary, logarithmic: bool) -> tuple[float, float]:
    low = value.mean - value.spread
    return (max(low, value.mean / 10) if logarithmic else low), value.mean + value.spread


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With a margin; never empty."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(span: tuple[float, float], logarithmic: bool) -> list[float]:
    """Four to ten round values; of a logarithmic axis 1, 2, 5 times powers of ten."""
    low, high = span
    if logarithmic:
        every = [
            power + math.log10(digit) for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)
        ]
        inside = [value for value in every if low <= value <= high]
        whole = [value for value in inside if abs(value - round(value)) < 1e-9]
        return whole if len(whole) > 4 or not inside else inside
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float, logarithmic: bool) -> str:
    if not logarithmic:
        return f"{value:.4g}" if abs(value) > 1e-12 else "0"
    real = 10**value
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if real >= size * 0.999:
            return f"{real / size:.3g}{letter}"
    return f"{real:.3g}"
