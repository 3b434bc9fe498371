"""A score as sound: the line, and around it a drone and a drum where the tradition has them.

T samples, mono, fp32 in [-1, 1].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from studio.data.melodies.composing import Note, Score
from studio.data.melodies.modes import OCTAVE
from studio.data.melodies.voices import TANPURA, VOICES, Wave, drum_stroke

PEAK = 0.7
DRONE, DRUM = 0.16, 0.35  # of the line's level
STRING_SECONDS, STRING_RINGS = 0.9, 2.6  # between two plucks of a tanpura, and how long each sounds


def play(score: Score, rng: np.random.Generator, rate_hz: int, stem: bool = False) -> Wave:
    """The wave (T,). A `stem` is the line alone."""
    mixed = play_line(score, rng, rate_hz)
    if not stem:
        if score.fields.tradition == "raga":
            mixed = mixed + DRONE * _tanpura(score, rng, rate_hz)
        if score.strokes:
            mixed = mixed + DRUM * _drum(score, rng, rate_hz)
    return (mixed * (PEAK / max(float(np.abs(mixed).max()), 1e-6))).astype(np.float32)


def play_line(score: Score, rng: np.random.Generator, rate_hz: int) -> Wave:
    """The melody alone, with a peak of about one."""
    voice = VOICES[score.fields.instrument]
    wave = np.zeros(round(score.seconds * rate_hz), np.float32)
    for note in score.notes:
        sound = voice.play(pitch_of(note, score.tonic_hz, rate_hz), rng, rate_hz)
        _add(wave, sound * np.float32(rng.uniform(0.75, 1.0)), note.start, rate_hz)
    return wave / max(float(np.abs(wave).max()), 1e-6)


def pitch_of(note: Note, tonic_hz: float, rate_hz: float) -> Wave:
    """The pitch in Hz at each sample of a note, (T,), without the voice's own vibrato."""
    seconds = np.arange(max(1, round(note.seconds * rate_hz))) / rate_hz
    cents = np.full(len(seconds), note.cents)
    if note.glide_from is not None:
        done = 0.5 - 0.5 * np.cos(np.pi * np.clip(seconds / note.glide, 0, 1))
        cents += (note.glide_from - note.cents) * (1 - done)
    if note.shake_hz:
        begun = np.clip((seconds - note.glide) / 0.1, 0, 1)
        cents += note.shake_cents * begun * np.sin(2 * np.pi * note.shake_hz * (seconds - note.glide))
    return (tonic_hz * 2 ** (cents / OCTAVE)).astype(np.float32)


def _tanpura(score: Score, rng: np.random.Generator, rate_hz: int) -> Wave:
    """Four strings in turn: the drone below, the tonic twice, the tonic an octave below."""
    tonic = TANPURA.tonic_hz * 2 * 2 ** (np.log2(score.tonic_hz / TANPURA.tonic_hz) % 1)
    strings = (score.mode.drone - OCTAVE, 0.0, 0.0, -OCTAVE)
    wave = np.zeros(round(score.seconds * rate_hz), np.float32)
    start = -float(rng.uniform(0, 4)) * STRING_SECONDS
    for number in range(int(score.seconds / STRING_SECONDS) + 5):
        at = start + number * STRING_SECONDS
        sound = _string(tonic * 2 ** (strings[number % 4] / OCTAVE), rate_hz)
        _add(wave, sound * np.float32(rng.uniform(0.85, 1)), at, rate_hz)
    return wave / max(float(np.abs(wave).max()), 1e-6)


@lru_cache(maxsize=64)
def _string(pitch_hz: float, rate_hz: int) -> Wave:
    """A plucked string of a tanpura; there are few, and each costs more than a melody."""
    pitch = np.full(round(STRING_RINGS * rate_hz), pitch_hz, np.float32)
    return TANPURA.play(pitch, np.random.default_rng(0), rate_hz)


def _drum(score: Score, rng: np.random.Generator, rate_hz: int) -> Wave:
    wave = np.zeros(round(score.seconds * rate_hz), np.float32)
    for at, kind in score.strokes:
        _add(wave, drum_stroke(kind, rng, rate_hz) * np.float32(rng.uniform(0.7, 1)), at, rate_hz)
    return wave


def _add(wave: Wave, sound: Wave, start_seconds: float, rate_hz: int) -> None:
    """Adds a sound in place, cut at both ends of the wave."""
    first = round(start_seconds * rate_hz)
    sound = sound[max(0, -first) :]
    first = max(0, first)
    room = wave[first : first + len(sound)]
    room += sound[: len(room)]
