"""What counts more of the codes of a piece: the first codebook, and in it the first frames of notes.

Within a note nearly everything is known; what is played is decided in a tenth of the frames (docs/bases/melody.md).
K codebooks, F frames.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from studio.preset import Preset

BEGINNING = 5  # frames in which a pitch is chosen: the first of plucked strings, the third of slow attacks


def emphasis(shape: tuple[int, int], beginnings: Iterable[int], preset: Preset) -> Tensor:
    """How much each code of a piece of this shape (K, F) counts, with notes that begin in these frames."""
    weights = torch.ones(shape)
    weights[0] = preset.first_codebook
    for frame in beginnings:
        weights[0, frame : frame + BEGINNING] = preset.first_codebook * preset.note_beginnings
    return weights
