"""Loss curves as SVG: faint as measured, strong smoothed, dots for held-out data. No script, no library.

Colours are the CSS variables `--curve`, `--curve-2`, ... and `--soft`, which the page around it gives.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 280, 64, 30, 12, 14  # in units of the drawing
MOST_POINTS = 400
COLOURS = ("var(--curve)", "var(--curve-2)", "var(--curve-3)", "var(--curve-4)", "var(--curve-5)", "var(--curve-6)")


@dataclass(frozen=True)
class Curve:
    """The `step` events of a run and its `validation` events. Each has `step` and `loss`."""

    steps: Sequence[dict[str, Any]]
    validations: Sequence[dict[str, Any]] = ()
    name: str = ""


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def loss_curve(steps: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]] = ()) -> str:
    """The curve of one run with a legend, as HTML."""
    return loss_curves([Curve(steps, validations)])


def loss_curves(curves: Sequence[Curve], weight: float = 0.9, logarithmic: bool = False) -> str:
    """Several runs over each other. `weight` in [0, 1) smooths; a single run shows each step too."""
    curves = [curve for curve in curves if curve.steps]
    if not curves:
        return "<p>No step was made.</p>"
    frame = _Frame.around(curves, weight, logarithmic)
    parts = frame.grid()
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        xs, raw = [e["step"] for e in curve.steps], [e["loss"] for e in curve.steps]
        if len(curves) == 1:
            parts.append(frame.line(xs, raw, colour, 1, 0.25))
        parts.append(frame.line(xs, smoothed(raw, weight), colour, 2.5, 1))
        for event in curve.validations:
            x, y = frame.point(event["step"], event["loss"])
            label = f"held-out loss {event['loss']:.4g} at step {event['step']}"
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='#d9622b'><title>{label}</title></circle>")
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{_spoken(curves, weight)}'>{''.join(parts)}</svg>"
        + _legend(curves)
    )


@dataclass(frozen=True)
class _Frame:
    """Where a step and a loss lie on the drawing."""

    first: int
    last: int
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def around(cls, curves: Sequence[Curve], weight: float, logarithmic: bool) -> _Frame:
        shown: list[float] = []
        for curve in curves:
            raw = [e["loss"] for e in curve.steps]
            values = raw if len(curves) == 1 else smoothed(raw, weight)
            shown += sorted(values)[: max(1, int(len(values) * 0.98))]  # a few spikes would flatten all the rest
            shown += [e["loss"] for e in curve.validations]
        steps = [e["step"] for curve in curves for e in (curve.steps[0], curve.steps[-1])]
        positive = [value for value in shown if value > 0]
        logarithmic = logarithmic and bool(positive)
        low = min(positive) if logarithmic else min(shown)
        return cls(min(steps), max(steps), low, max(shown), logarithmic)

    def point(self, step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / max(1, self.last - self.first)
        loss = min(max(loss, self.low), self.high)
        if self.logarithmic:
            part = math.log(loss / self.low) / (math.log(self.high / self.low) or 1)
        else:
            part = (loss - self.low) / ((self.high - self.low) or 1)
        return x, TOP + (HEIGHT - BOTTOM - TOP) * (1 - part)

    def line(self, steps: Sequence[int], losses: Sequence[float], colour: str, width: float, opacity: float) -> str:
        stride = math.ceil(len(steps) / MOST_POINTS)
        chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
        points = " ".join("{:.1f},{:.1f}".format(*self.point(steps[i], losses[i])) for i in chosen)
        return (
            f"<polyline fill='none' stroke='{colour}' stroke-opacity='{opacity}' stroke-width='{width}' "
            f"stroke-linejoin='round' points='{points}'/>"
        )

    def grid(self) -> list[str]:
        middle = (self.low * self.high) ** 0.5 if self.logarithmic else (self.low + self.high) / 2
        parts = []
        for loss in (self.low, middle, self.high):
            y = self.point(self.first, loss)[1]
            parts.append(
                f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>"
                f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{loss:.4g}</text>"
            )
        for step, anchor in ((self.first, "start"), (self.last, "end")):
            x = self.point(step, self.low)[0]
            parts.append(f"<text x='{x:.1f}' y='{HEIGHT - 8}' text-anchor='{anchor}'>step {step}</text>")
        return parts


def _spoken(curves: Sequence[Curve], weight: float) -> str:
    """The drawing in words, for those who cannot see it."""
    lines = []
    for curve in curves:
        losses = [e["loss"] for e in curve.steps]
        name = f"{curve.name}: " if curve.name else ""
        lines.append(f"{name}from {losses[0]:.4g} to {smoothed(losses, weight)[-1]:.4g}")
    return html.escape("Loss over steps, " + "; ".join(lines), quote=True)


def _legend(curves: Sequence[Curve]) -> str:
    dots = " Dots: held-out data." if any(curve.validations for curve in curves) else ""
    if len(curves) == 1:
        return f"<p>Faint: each step. Strong: smoothed.{dots}</p>"
    names = "".join(
        f"<li><span style='color:{COLOURS[i % len(COLOURS)]}' aria-hidden='true'>&#9644;</span> "
        f"{html.escape(curve.name)}</li>"
        for i, curve in enumerate(curves)
    )
    return f"<ul class='legend'>{names}</ul><p>Smoothed.{dots}</p>"
