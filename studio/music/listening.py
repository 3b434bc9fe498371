"""Samples of a training as sound files."""

from __future__ import annotations

from studio.data.sounds import Sound, save_sound
from studio.run import Event, Run


def save_sample(run: Run, sound: Sound, step: int, column: int, prompt: str, seed: int) -> Event:
    """Stores a training sample as `samples/<step>-<column>.wav` and returns its event."""
    path = run.samples / f"{step:06d}-{column}.wav"
    save_sound(sound, path, {"prompt": prompt, "seed": seed, "step": step})
    return Event("sample", step, {"path": str(path.relative_to(run.folder)), "prompt": prompt, "seed": seed})
