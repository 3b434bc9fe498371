"""Sounds: waves in memory, and files of them. soundfile reads and writes; SciPy resamples.

C channels, T samples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studio.errors import RequestError, WorkError, reason_of
from studio.files import disk_error

WRITTEN = (".wav", ".flac")
LOUDEST = 0.99  # peak of what is written; louder waves are turned down as a whole


class UnusableSound(Exception):
    """Why a file cannot be used, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Sound:
    """A wave (C, T), fp32, mostly in [-1, 1]."""

    wave: Tensor
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        return self.wave.shape[-1] / self.sample_rate_hz

    def at(self, sample_rate_hz: int, channels: int) -> Sound:
        """The same sound at another rate, mixed to one channel or spread over two."""
        wave = self.wave
        if channels == 1 or wave.shape[0] > 2:
            wave = wave.mean(0, keepdim=True)
        wave = wave.expand(channels, -1)
        if sample_rate_hz == self.sample_rate_hz:
            return Sound(wave.contiguous(), sample_rate_hz)
        from scipy.signal import resample_poly

        common = gcd(sample_rate_hz, self.sample_rate_hz)
        up, down = sample_rate_hz // common, self.sample_rate_hz // common
        array = resample_poly(wave.double().numpy(), up, down, axis=-1)
        return Sound(torch.from_numpy(array.astype(np.float32)), sample_rate_hz)


def read_sound(path: Path, start_seconds: float = 0.0, seconds: float | None = None) -> Sound:
    """A file, or a part of it, as fp32. Raises UnusableSound."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            file.seek(min(round(start_seconds * rate), len(file)))
            array = file.read(-1 if seconds is None else round(seconds * rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:
        reason = reason_of(error).removeprefix("Error opening ")
        raise UnusableSound(f"cannot be read as sound: {reason.split(': ')[-1]}") from None
    return Sound(torch.from_numpy(np.ascontiguousarray(array.T)), rate)


def save_sound(sound: Sound, path: Path, facts: dict[str, Any]) -> None:
    """Writes WAV or FLAC, 16 bit, with its making told inside as a comment. Raises DiskError, RequestError.

    A wave with peaks above LOUDEST is turned down as a whole, never clipped. WorkError for one that is not finite.
    """
    import soundfile

    if path.suffix.lower() not in WRITTEN:
        raise RequestError(f"cannot write sounds as '{path.suffix}'", f"use {' or '.join(WRITTEN)}")
    if not torch.isfinite(sound.wave).all():
        raise WorkError("the sound has values that are not finite", "use fp32, or a smaller guidance or strength")
    peak = float(sound.wave.abs().max()) if sound.wave.numel() else 0.0
    wave = sound.wave * (LOUDEST / peak) if peak > LOUDEST else sound.wave
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(path, "w", sound.sample_rate_hz, wave.shape[0], subtype="PCM_16") as file:
            file.comment = json.dumps(facts, sort_keys=True)
            file.write(wave.T.contiguous().numpy())
    except OSError as error:
        raise disk_error(path, error) from error
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise disk_error(path, OSError(str(error))) from error


def facts_in(path: Path) -> dict[str, Any]:
    """What `save_sound` told in a file; empty where nothing was."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            told = json.loads(file.comment or "{}")
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
