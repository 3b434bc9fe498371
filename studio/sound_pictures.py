"""Pictures of sounds with axes: the spectrogram of `waves`, and where pitch lies in a mode. T samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from studio import waves
from studio.data.melodies.modes import OCTAVE, Mode
from studio.evaluate.lines import likeliest_tonic
from studio.evaluate.pitch import track_pitch

Wave = NDArray[np.floating]

WIDTH, HEIGHT = 720, 220  # pixels of a drawing, axes included
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
GROUND, INK, SOFT, LINE = (255, 255, 255), (29, 33, 41), (102, 102, 119), (216, 219, 226)
TRACED = (47, 111, 221)
FONT = 12


def spectrogram(wave: Wave, rate_hz: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Loudness by time across and pitch upwards, on a logarithmic axis up to half the rate."""
    picture, box = _canvas(width, height)
    across, up = box[2] - box[0], box[3] - box[1]
    if len(wave):
        picture.paste(waves.spectrogram(np.asarray(wave), rate_hz, across, up), (box[0], box[1]))
    pen = ImageDraw.Draw(picture)
    highest = rate_hz / 2
    for hz in (100, 200, 400, 800, 1600, 3200, 6400, 12800):
        if hz < highest:
            y = box[3] - up * np.log(hz / waves.LOWEST_HZ) / np.log(highest / waves.LOWEST_HZ)
            _label(pen, (box[0] - 6, y), f"{hz} Hz" if hz == 100 else str(hz), "rm")
    _seconds(pen, box, len(wave) / rate_hz)
    return picture


def pitch_histogram(
    wave: Wave, rate_hz: int, mode: Mode, width: int = WIDTH, height: int = HEIGHT, tonic_hz: float | None = None
) -> Image.Image:
    """How often each pitch sounds, folded into an octave above the tonic, and lines where the mode has degrees.

    Without a tonic it is the one under which the line fits best.
    """
    track = track_pitch(wave, rate_hz)
    picture, box = _canvas(width, height)
    pen = ImageDraw.Draw(picture)
    across, up = box[2] - box[0], box[3] - box[1]
    if track.voiced.any():
        tonic = tonic_hz or likeliest_tonic(track, mode.degrees)
        counts = np.histogram((track.cents(tonic) + 50) % OCTAVE, 120, (0, OCTAVE))[0]
        for number, count in enumerate(counts):
            left = box[0] + across * number / 120
            tall = up * count / counts.max()
            pen.rectangle([left + 1, box[3] - tall, left + across / 120 - 1, box[3]], fill=TRACED)
    else:
        _label(pen, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "no pitch is heard", "mm")
    for degree in mode.degrees:
        x = box[0] + across * (degree + 50) / OCTAVE
        for y in range(box[1], box[3], 8):
            pen.line([(x, y), (x, y + 4)], fill=(196, 60, 80))
        _label(pen, (x, box[3] + 6), f"{degree:.0f}", "ma")
    _label(pen, (box[0] - 6, box[3] + 6), "cents", "ra")
    return picture


# -- axes ------------------------------------------------------------------------------------------------------


def _canvas(width: int, height: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A white picture and the box to draw in: left, top, right, bottom."""
    return Image.new("RGB", (width, height), GROUND), (LEFT, TOP, width - RIGHT, height - BOTTOM)


def _seconds(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], seconds: float) -> None:
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600) if seconds / step <= 12 or step == 3600)
    at = 0.0
    while at <= seconds + 1e-9:
        x = box[0] + (box[2] - box[0]) * at / max(seconds, 1e-9)
        pen.line([(x, box[3]), (x, box[3] + 4)], fill=SOFT)
        _label(pen, (x, box[3] + 6), f"{at:g} s" if at == 0 else f"{at:g}", "ma")
        at += step


def _label(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor: str) -> None:
    pen.text(at, text, fill=SOFT, anchor=anchor, font=ImageFont.load_default(FONT))
