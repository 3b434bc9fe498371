"""Sounds as pictures: the waveform, and the spectrogram with low notes below. NumPy alone, no torch.

T samples, F frequencies, N moments.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 640, 120  # pixels
WINDOW = 1024  # samples
LOWEST_HZ = 40.0
RANGE_DB = 70.0  # below the loudest, which is the darkest of the picture
MOST_SECONDS = 120.0  # of a longer sound only the beginning is drawn
INK = (138, 80, 181)
#: From silence to the loudest: positions in [0, 1] and colours.
HEAT = (
    (0.0, (24, 16, 34)),
    (0.35, (76, 41, 101)),
    (0.65, (166, 117, 203)),
    (0.85, (240, 178, 110)),
    (1.0, (255, 243, 214)),
)


def read_wave(path: Path) -> tuple[np.ndarray, int, float]:
    """(T,) in [-1, 1], mixed to one channel; samples a second; seconds of the whole. Raises OSError, ValueError."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = file.samplerate, len(file) / file.samplerate
            wave = file.read(round(min(seconds, MOST_SECONDS) * rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise ValueError("is no sound that can be read") from error
    if not len(wave):
        raise ValueError("is empty")
    return np.nan_to_num(wave.mean(1)), rate, seconds


def waveform(wave: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Loudest and quietest value of each column, on a clear ground."""
    edges = np.linspace(0, len(wave), width + 1).astype(int)
    middle = (height - 1) / 2
    pixels = np.zeros((height, width, 4), np.uint8)
    rows = np.arange(height)[:, None]
    pieces = [wave[a : max(b, a + 1)] for a, b in pairwise(edges)]
    high = middle - middle * np.array([piece.max(initial=0) for piece in pieces])
    low = middle - middle * np.array([piece.min(initial=0) for piece in pieces])
    pixels[(rows >= np.floor(high)) & (rows <= np.ceil(low))] = (*INK, 255)
    return Image.fromarray(pixels, "RGBA")


def spectrogram(wave: np.ndarray, rate: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Power in decibels over time, frequencies spaced as the ear hears them."""
    padded = np.pad(wave, WINDOW // 2)
    starts = np.linspace(0, len(padded) - WINDOW, width).astype(int)
    frames = padded[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2  # (N, F)
    wanted = np.geomspace(LOWEST_HZ, rate / 2, height) * WINDOW / rate
    below = np.clip(wanted.astype(int), 0, power.shape[1] - 2)
    part = np.clip(wanted - below, 0, 1)
    levels = 10 * np.log10(power[:, below] * (1 - part) + power[:, below + 1] * part + 1e-12).T[::-1]
    strength = np.clip((levels - levels.max() + RANGE_DB) / RANGE_DB, 0, 1)
    at = [place for place, _ in HEAT]
    channels = [np.interp(strength, at, [colour[i] for _, colour in HEAT]) for i in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8), "RGB")


def draw(path: Path) -> dict[str, Any]:
    """Writes both pictures of a sound beside it, and says where they are: `wave`, `spectrum`, `seconds`."""
    wave, rate, seconds = read_wave(path)
    found = {"wave": path.with_suffix(".wave.webp"), "spectrum": path.with_suffix(".spectrum.webp")}
    waveform(wave).save(found["wave"], "WEBP", lossless=True)
    spectrogram(wave, rate).save(found["spectrum"], "WEBP", quality=80)
    return {name: str(place) for name, place in found.items()} | {"seconds": round(seconds, 2)}
