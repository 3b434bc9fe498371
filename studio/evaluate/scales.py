"""How well a line keeps to a scale, and which scale it keeps to best. Cents are above the tonic; F frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from studio.data.melodies.modes import OCTAVE

Array = NDArray[np.float64]

TOLERANCE = 30.0  # cents
SPREAD = 18.0  # cents, of a degree as it is played
FLOOR = 0.1  # share of frames that may be anywhere: glides, ornaments, errors


def in_scale_share(cents: Array, degrees: Sequence[float], tolerance: float = TOLERANCE) -> float:
    """The share of frames (F,) within the tolerance of a degree of the scale; NaN without frames."""
    if not len(cents):
        return float("nan")
    return float((_distances(cents, degrees).min(1) <= tolerance).mean())


def log_likelihood(cents: Array, degrees: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Mean log density per frame, in nats per cent: Gaussians at the degrees, and a floor. NaN without frames.

    The Gaussians are equal, or have these weights, which sum to one.
    """
    if not len(cents):
        return float("nan")
    bells = np.exp(-0.5 * (_distances(cents, degrees) / SPREAD) ** 2) / (SPREAD * np.sqrt(2 * np.pi))
    return float(
        np.log(
            (1 - FLOOR) * (bells.mean(1) if weights is None else bells @ np.asarray(weights)) + FLOOR / OCTAVE
        ).mean()
    )


def _distances(cents: Array, degrees: Sequence[float]) -> Array:
    """From each frame to each degree, (F, degrees), the shorter way round the octave."""
    gaps = (cents[:, None] - np.asarray(degrees)[None] + OCTAVE / 2) % OCTAVE - OCTAVE / 2
    return np.abs(gaps)
