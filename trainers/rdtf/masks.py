"""The dual mask of RDTF: which frames of a clip are given, and which count in the loss.

After the paper's table 7 and its published code, for any number of frames and for each sample by itself, where the
code has one task for a whole step. n frames of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: The six tasks, and whether they come with text.
TASKS = {
    "image": False,  # picture to clip
    "text-image": True,
    "text": True,
    "interpolation": True,
    "prediction": True,
    "backcast": True,
}
GENERATION = ("image", "text-image", "text")


@dataclass(frozen=True)
class Draw:
    """A task as it fell for one clip: which of its n frames are given, and whether the caption is told."""

    task: str
    given: tuple[bool, ...]
    told: bool

    @property
    def targets(self) -> int:
        return len(self.given) - sum(self.given)


def tasks_for(count: int) -> tuple[str, ...]:
    """The tasks that a clip of `count` frames can serve: a still one only has its text."""
    return tuple(TASKS) if count > 1 else ("text",)


def draw_mask(task: str, count: int, rng: np.random.Generator) -> Draw:
    """The given frames of a task on `count` frames; at least one frame is left to draw."""
    given = np.zeros(count, bool)
    if count > 1:
        if task in ("image", "text-image"):
            given[rng.integers(count)] = True
        elif task == "interpolation":
            stride = int(rng.integers(2, 4)) if count > 2 else 2
            given[int(rng.integers(min(stride, count))) :: stride] = True
        elif task == "prediction":
            given[: rng.integers(max(1, count // 2), count)] = True
        elif task == "backcast":
            given[rng.integers(1, count // 2 + 1) :] = True
    return Draw(task, tuple(given.tolist()), TASKS[task])
