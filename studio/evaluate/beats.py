"""When notes begin, how fast they go, and whether they fall on beats. T samples, F frames, times in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

HOP_SECONDS = 0.01
BANDS = 24
SLOWEST, FASTEST = 40.0, 240.0  # beats a minute
USUAL, OCTAVES = 110.0, 0.9  # the tempo that is likeliest beforehand, and the spread around it
TOLERANCE = 0.07  # seconds that a beat may be off
APART = 0.08  # seconds between two onsets at least
LATENCY = 0.005
FLOOR = 0.01  # of the loudest, under which nothing is heard: a codec's noise would be onsets


def onset_envelope(wave: NDArray[np.floating], rate_hz: int) -> Array:
    """How much louder each 10 ms is than before in bands of the spectrum, (F,); frame i is at i * 10 ms."""
    wave = np.asarray(wave, np.float64)
    hop, window = round(HOP_SECONDS * rate_hz), 1 << round(np.log2(0.04 * rate_hz))
    padded = np.pad(wave, (window // 2, window))
    starts = np.arange(0, len(wave), hop)
    shape = np.hanning(window)
    power = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(window)] * shape)) ** 2
    edges = np.unique(np.geomspace(1, power.shape[1], BANDS + 1).round().astype(int))
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    loudness = np.log(bands + FLOOR * bands.max() + 1e-12)
    rise = np.maximum(loudness[2:] - loudness[:-2], 0).mean(1)
    return np.concatenate([[0.0], rise, [0.0]])


def onsets(envelope: Array) -> Array:
    """The times of its peaks that stand out."""
    reach = round(APART / HOP_SECONDS / 2)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(envelope, reach), 2 * reach + 1).max(1)
    slow = np.convolve(envelope, np.ones(51) / 51, "same")
    peaks = (envelope >= around) & (envelope > 1.6 * slow) & (envelope > 0.15 * envelope.max())
    return np.flatnonzero(peaks) * HOP_SECONDS + LATENCY


def estimate_tempo(envelope: Array) -> float:
    """Beats a minute: the period at which the envelope is most like itself, where usual tempi count for more.

    NaN for an envelope without onsets. Half and double tempi are easily mistaken for each other.
    """
    centred = envelope - envelope.mean()
    size = 2 * len(centred)
    likeness = np.fft.irfft(np.abs(np.fft.rfft(centred, size)) ** 2, size)[: len(centred)]
    lags = np.arange(int(60 / FASTEST / HOP_SECONDS), min(len(centred) - 1, int(60 / SLOWEST / HOP_SECONDS)) + 1)
    if not len(lags) or likeness[0] <= 0:
        return float("nan")
    tempi = 60 / (lags * HOP_SECONDS)
    prior = np.exp(-0.5 * (np.log2(tempi / USUAL) / OCTAVES) ** 2)
    folded = sum(np.interp(lags * k, np.arange(len(likeness)), likeness, right=0.0) / k for k in (1, 2))
    return float(tempi[int(np.argmax(np.maximum(folded, 0) * prior))])


def f_measure(found: Sequence[float] | Array, truth: Sequence[float] | Array, tolerance: float = TOLERANCE) -> float:
    """Harmonic mean of precision and recall of times within the tolerance, each matched once; 0 where none is."""
    waiting = sorted(truth)
    hits = 0
    for time in sorted(found):
        near = [other for other in waiting if abs(other - time) <= tolerance]
        if near:
            waiting.remove(min(near, key=lambda other: abs(other - time)))
            hits += 1
    return 2 * hits / (len(found) + len(truth)) if hits else 0.0


def cycle_correlation(envelope: Array, strokes: Sequence[float], beats: int, beats_per_minute: float) -> float:
    """How well onsets folded at a cycle's length fit its strokes (in beats), wherever it begins; in [-1, 1]."""
    length = round(beats * 60 / beats_per_minute / HOP_SECONDS)
    if length < 2 or len(envelope) < length:
        return float("nan")
    rounds = len(envelope) // length
    folded = envelope[: rounds * length].reshape(rounds, length).mean(0)
    template = np.zeros(length)
    places = np.arange(length)
    for beat in strokes:
        gap = (places - beat / beats * length + length / 2) % length - length / 2
        template += np.exp(-0.5 * (gap * HOP_SECONDS / 0.03) ** 2)
    a, b = folded - folded.mean(), template - template.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    likeness = np.fft.irfft(np.fft.rfft(a) * np.fft.rfft(b).conj(), length)
    return float(likeness.max() / scale) if scale > 0 else 0.0
