"""Each part's prompt, read with its own concept's changes of the text encoders and learned words, and no other's.

The pipeline's `encode_prompt` is covered: what it would give for each part comes back as one condition, so guidance,
the negative prompt and everything else in the pipeline stay as they are. B batch, L tokens, D width, N parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from studio.base import Base
from studio.generation import Use, wearing
from studio.regions.canvas import Canvas


@contextmanager
def reading(base: Base, canvas: Canvas, texts: Sequence[tuple[str | None, Sequence[Use]]]) -> Iterator[None]:
    """Inside, the pipeline reads these texts, one for each part, with these adapters; None is the request's prompt."""
    read = base.pipe.encode_prompt

    def encode_prompt(prompt: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        readings = []
        for text, uses in texts:
            with wearing(base, uses, only=base.text_encoder_names):
                readings.append(read(_in_place_of(prompt, text), *args, **kwargs))
        return tuple(_together(own, canvas.shares) for own in zip(*readings, strict=True))

    base.pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del base.pipe.encode_prompt


def _in_place_of(prompt: Any, text: str | None) -> Any:
    """The text, as often as there are prompts; None is the prompt itself."""
    if text is None:
        return prompt
    return text if isinstance(prompt, str) else [text] * len(prompt)


def _together(readings: Sequence[Tensor | None], shares: Tensor) -> Tensor | None:
    """Texts (B, L, D) one after the other, (B, N L, D); of what is pooled, (B, P), the mean by share of the picture."""
    found = [reading for reading in readings if reading is not None]
    if not found:
        return None
    if found[0].ndim == 2:
        weights = shares.to(found[0].device, found[0].dtype)
        return sum(
            (weight * reading for weight, reading in zip(weights, found, strict=True)), torch.zeros_like(found[0])
        )
    width = max(reading.shape[-1] for reading in found)  # words by layer make a text wider (words.py)
    return torch.cat([reading.repeat(1, 1, width // reading.shape[-1]) for reading in found], 1)
