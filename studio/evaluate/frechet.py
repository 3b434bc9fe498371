"""How far apart two sets of sounds are: the Frechet distance of an embedding that needs no weights.

A window of one second becomes the means and spreads of log band powers and a pitch-class profile. The distance of small
sets is biased upwards, so it is only ever to be read beside that of true sounds among themselves at the same number.
T samples, N windows, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

WINDOW_SECONDS = 1.0
BANDS = 16
CLASSES = 24  # quarter tones
LOWEST_HZ, HIGHEST_HZ = 100.0, 2000.0  # of what counts for the profile
PROFILE_WEIGHT = 10.0  # brings shares of power to the size of log powers
RIDGE = 1e-6


def embed(wave: NDArray[np.floating], rate_hz: int) -> Array:
    """(N, D) of a mono wave (T,); a last window shorter than half of one is left out, unless it is the only one."""
    length = round(WINDOW_SECONDS * rate_hz)
    starts = range(0, max(1, len(wave) - length // 2), length)
    return np.stack([_features(np.asarray(wave[s : s + length], np.float64), rate_hz) for s in starts])


def _features(wave: Array, rate_hz: int) -> Array:
    size = 1 << round(np.log2(0.12 * rate_hz))
    padded = np.pad(wave, (0, max(0, size - len(wave))))
    starts = np.arange(0, len(padded) - size + 1, size // 4)
    power = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(size)] * np.hanning(size))) ** 2
    edges = np.unique(np.geomspace(2, power.shape[1], BANDS + 1).round().astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-6 * power.max() + 1e-12)
    bands = bands - bands.mean()
    return np.concatenate([bands.mean(0), bands.std(0), PROFILE_WEIGHT * _profile(power.mean(0), size, rate_hz)])


def _profile(power: Array, size: int, rate_hz: int) -> Array:
    """The share of power in each pitch class, (CLASSES,), counted from A."""
    hz = np.fft.rfftfreq(size, 1 / rate_hz)
    heard = (hz >= LOWEST_HZ) & (hz <= HIGHEST_HZ)
    classes = np.round(CLASSES * np.log2(hz[heard] / 440)).astype(int) % CLASSES
    profile = np.bincount(classes, power[heard], CLASSES)
    return profile / max(profile.sum(), 1e-12)


def frechet(one: Array, other: Array) -> float:
    """The squared Frechet distance of Gaussians fitted to (N, D) and (M, D) features. NaN for fewer than two rows."""
    if min(len(one), len(other)) < 2:
        return float("nan")
    gap = one.mean(0) - other.mean(0)
    first, second = _covariance(one), _covariance(other)
    root = _root(first)
    mixed = np.linalg.eigvalsh(root @ second @ root)
    return float(max(0.0, gap @ gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(mixed, 0, None)).sum()))


def _covariance(rows: Array) -> Array:
    return np.cov(rows, rowvar=False) + RIDGE * np.eye(rows.shape[1])


def _root(matrix: Array) -> Array:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_of(sounds: Sequence[Array], others: Sequence[Array]) -> float:
    """The distance of two sets of sounds, each given by its windows, at as many windows of both."""
    one, other = np.concatenate(list(sounds)), np.concatenate(list(others))
    count = min(len(one), len(other))
    return frechet(one[:count], other[:count])


def spread_of(sounds: Sequence[Array]) -> float:
    """Diversity: the mean distance between the mean features of two sounds; NaN for one alone."""
    means = np.stack([rows.mean(0) for rows in sounds])
    if len(means) < 2:
        return float("nan")
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return float(apart.sum() / (len(means) * (len(means) - 1)))
