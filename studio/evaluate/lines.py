"""What a melodic line does: the notes it is made of, whether it moves as its mode allows, how it is ornamented.

Direction is a rule over many notes: a raga that leaves a degree out rising and plays it falling. Ornaments are within a
note: glides, shakes, vibrato. F frames of a pitch track, cents above the tonic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from studio.data.melodies.composing import compose
from studio.data.melodies.cycles import CYCLES
from studio.data.melodies.fields import Fields
from studio.data.melodies.modes import OCTAVE, Mode
from studio.data.melodies.voices import PLAYED
from studio.evaluate.pitch import HOP_SECONDS, PitchTrack
from studio.evaluate.scales import TOLERANCE, log_likelihood
from studio.keyed import numpy_generator

Array = NDArray[np.floating]

COUNTED_PIECES = 24
TONICS_HZ = tuple(220 * 2 ** (i / 120) for i in range(120))
SHORTEST_FRAMES = 6  # of a note, 60 ms
SLOPES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, np.inf)  # cents in 10 ms


def likeliest_tonic(track: PitchTrack, degrees: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Of every tenth of a semitone of an octave, in Hz, that under which a line fits a scale best."""
    return max(TONICS_HZ, key=lambda tonic: _or_least(log_likelihood(track.cents(tonic), degrees, weights)))


@lru_cache(maxsize=64)
def weights_of(mode: Mode) -> tuple[float, ...]:
    """How long lines of a mode rest on each of its degrees, as shares, counted in pieces that are composed for it.

    Without them a short line fits nearly every scale of seven degrees on some tonic.
    """
    instrument, cycle = PLAYED[mode.tradition][0], next(iter(CYCLES[mode.tradition]))
    fields = Fields(mode.tradition, instrument, mode.name, cycle, key="C" if mode.tradition == "western" else "")
    seconds = np.full(len(mode.degrees), 1e-3)
    for number in range(COUNTED_PIECES):
        for note in compose(fields, numpy_generator("weights", number), 10.0).notes:
            near = np.abs((np.array(mode.degrees) - note.cents + OCTAVE / 2) % OCTAVE - OCTAVE / 2)
            seconds[int(near.argmin())] += note.seconds
    return tuple(seconds / seconds.sum())


def mode_likelihood(cents: NDArray[np.float64], mode: Mode) -> float:
    """Of a line (F,) above the tonic, the log likelihood of a mode in nats per frame, degrees weighted."""
    return log_likelihood(cents, mode.degrees, weights_of(mode))


def _or_least(value: float) -> float:
    return -np.inf if np.isnan(value) else value


def notes_of(track: PitchTrack, degrees: Sequence[float], tonic_hz: float) -> list[float]:
    """The degrees that a line rests on, in turn, in cents from the tonic over all octaves."""
    ladder = np.array([d + OCTAVE * o for o in range(-3, 5) for d in degrees])
    cents = 1200 * np.log2(track.hz / tonic_hz)
    found: list[float] = []
    resting, since = np.nan, 0
    for value in cents:
        near = ladder[np.argmin(np.abs(ladder - value))] if np.isfinite(value) else np.nan
        if not np.isfinite(value) or abs(near - value) > TOLERANCE:
            near = np.nan
        since = since + 1 if near == resting else 1
        resting = near
        if since == SHORTEST_FRAMES and np.isfinite(resting) and (not found or found[-1] != resting):
            found.append(float(resting))
    return found


def moves_a_second(track: PitchTrack) -> float:
    """How often a line goes to another pitch, a quarter tone away or more within 60 ms; 0 where nothing is voiced.

    Onsets of what went through a codec are drowned in its noise; pitches are not.
    """
    cents = median_filter(track.cents(440.0), 5, mode="nearest")
    far = np.abs(cents[SHORTEST_FRAMES:] - cents[:-SHORTEST_FRAMES]) > 50
    return np.count_nonzero(far[1:] & ~far[:-1]) / (max(len(track.hz), 1) * HOP_SECONDS)


def direction_kept(notes: Sequence[float], mode: Mode) -> float:
    """Of the moves between notes the share that goes to a degree which the mode has in that direction; NaN without."""
    moves = list(pairwise(notes))
    if not moves:
        return float("nan")
    return float(np.mean([_has(mode.up if after > before else mode.down, after) for before, after in moves]))


def _has(degrees: Sequence[float], cents: float) -> bool:
    return any(abs((cents - d + OCTAVE / 2) % OCTAVE - OCTAVE / 2) < 1 for d in degrees)


def slopes_of(tracks: Sequence[PitchTrack]) -> Array:
    """How fast pitch moves within voiced stretches: shares of frames by cents in 10 ms, over all tracks."""
    moved = [np.abs(1200 * np.diff(np.log2(track.hz))) for track in tracks if len(track.hz) > 1]
    every = np.concatenate(moved) if moved else np.empty(0)
    every = every[np.isfinite(every) & (every < OCTAVE / 2)]  # a leap is no glide
    counts = np.histogram(every, SLOPES)[0].astype(float)
    return counts / max(counts.sum(), 1.0)


def ornament_distance(one: Sequence[PitchTrack], other: Sequence[PitchTrack]) -> float:
    """Total variation between how two sets of lines glide, in [0, 1]."""
    return float(0.5 * np.abs(slopes_of(one) - slopes_of(other)).sum())
