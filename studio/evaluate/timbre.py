"""Which instrument of the melody world is playing: ridge regression on statistics of the spectrum, fitted in a second.

Nothing is stored: the judge is fitted to renderings whenever it is needed. T samples, N sounds, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

BANDS = 40
RIDGE = 1.0
FLOOR = 1e-4  # of the loudest band: below it a codec's noise would decide


def timbre_features(wave: NDArray[np.floating], rate_hz: int) -> Array:
    """Features (D,) of a mono wave (T,).

    Means, spreads and cepstra of log band powers, loudness taken out, then how loudness changes.
    """
    wave = np.asarray(wave, np.float64)
    window, hop = 1 << round(np.log2(0.06 * rate_hz)), round(0.02 * rate_hz)
    starts = np.arange(0, max(1, len(wave) - window), hop)
    frames = np.pad(wave, (0, window))[starts[:, None] + np.arange(window)] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(2, power.shape[1], BANDS + 1).round().astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + FLOOR * power.max() + 1e-12)
    loudness = bands.mean(1, keepdims=True)
    loud = loudness[:, 0] >= np.quantile(loudness, 0.3)
    shape = (bands - loudness)[loud]
    change = np.diff(loudness[:, 0])
    tail = [change.std(), np.quantile(change, 0.1), np.quantile(change, 0.5), np.quantile(change, 0.95)]
    cepstrum = np.abs(np.fft.rfft(shape - shape.mean(0), axis=1)).mean(0)
    return np.concatenate([shape.mean(0), shape.std(0), cepstrum, tail])


@dataclass(frozen=True)
class TimbreJudge:
    """Tells instruments by their features.

    `mean` and `spread` (D,) are those of the features it was fitted to; `weights` (D + 1, I) are for I `names`.
    """

    names: tuple[str, ...]
    mean: Array
    spread: Array
    weights: Array

    @classmethod
    def fitted(cls, features: Array, labels: Sequence[str]) -> TimbreJudge:
        """From features (N, D) and the names (N) that go with them."""
        names = tuple(sorted(set(labels)))
        mean, spread = features.mean(0), features.std(0) + 1e-6
        inputs = _with_one((features - mean) / spread)
        wanted = np.array([[label == name for name in names] for label in labels], np.float64)
        gram = inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1])
        return cls(names, mean, spread, np.linalg.solve(gram, inputs.T @ wanted))

    def name(self, features: Array) -> str:
        """The instrument that features (D,) are likeliest of."""
        scores = _with_one(((features - self.mean) / self.spread)[None]) @ self.weights
        return self.names[int(scores.argmax())]


def _with_one(features: Array) -> Array:
    return np.concatenate([features, np.ones((len(features), 1))], 1)
