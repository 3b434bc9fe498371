"""MuNet: an image UNet of diffusers whose every attention is three in series, on text, on beats, on chords.

Melechovsky et al. 2023, "Mustango: Toward Controllable Text-to-Music Generation", arXiv 2311.08355, section 4. The
blocks are those of `UNet2DConditionModel`; only the entries of their `attentions` are others, so xformers, SDPA and
gradient checkpointing are diffusers' own.
B batch, Z latent channels, T latent steps in time, F in frequency, L tokens of text, M beats, N chords, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch.nn.functional as F
from diffusers import (
    ModelMixin,  # noqa: F401  diffusers loads a network only if its module knows this name
    Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

PARTS = ("text", "beat", "chord")  # in the order of the forward pass
ALIGNED = 8  # xformers wants masks of such lengths


class SeriesAttention(nn.Module):
    """Text, then beats, then chords. Stands where diffusers has one `Transformer2DModel`, and is called like it."""

    has_cross_attention = True

    def __init__(self, first: Any) -> None:
        """`first` is the attention that diffusers made there; the others are built like it."""
        super().__init__()
        # Not `from_config`: it puts the default back for what diffusers' blocks pass by position, such as the heads.
        settings: dict[str, Any] = {key: value for key, value in first.config.items() if not key.startswith("_")}
        self.text: Any = first
        self.beat: Any = Transformer2DModel(**settings)
        self.chord: Any = Transformer2DModel(**settings)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """(B, C, T, F) to the same. `cross_attention_kwargs` brings (features, mask) of `beat` and `chord`."""
        told = dict(cross_attention_kwargs or {})
        pairs = [(encoder_hidden_states, encoder_attention_mask), told.pop("beat"), told.pop("chord")]
        for part, (features, mask) in zip((self.text, self.beat, self.chord), pairs, strict=True):
            hidden_states = part(
                hidden_states,
                encoder_hidden_states=features,
                encoder_attention_mask=mask,
                attention_mask=attention_mask,
                cross_attention_kwargs=told,
                return_dict=False,
            )[0]
        return (hidden_states,)


class MuNet(UNet2DConditionModel):
    """Configured as its parent is; `down_block_types` and the others name diffusers' own blocks."""

    @wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in _attending(self):
            block.attentions = nn.ModuleList(SeriesAttention(first) for first in block.attentions)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        beats: Tensor,
        beat_mask: Tensor,
        chords: Tensor,
        chord_mask: Tensor,
    ) -> Tensor:
        """The prediction, of the shape of the sample (B, Z, T, F). Features (B, L, D) with masks (B, L), 1 where told.

        Where a mask is 0 throughout, as for a piece without beats, attention is the same to all, as in the original.
        """
        text, text_bias = aligned(text, text_mask)
        return super().forward(
            sample,
            timestep,
            text,
            encoder_attention_mask=text_bias,
            cross_attention_kwargs={"beat": aligned(beats, beat_mask), "chord": aligned(chords, chord_mask)},
            return_dict=False,
        )[0]


def aligned(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features and mask, padded to a length that xformers takes.

    diffusers adds (mask - 1) 10000 to the scores. Padding has the mask -1, so that nothing of it is heard even where
    the whole mask is 0.
    """
    missing = -features.shape[1] % ALIGNED
    return F.pad(features, (0, 0, 0, missing)), F.pad(mask.to(features.dtype), (0, missing), value=-1.0)


def _attending(network: Any) -> Iterator[Any]:
    """The blocks that have attention, in the order of the forward pass."""
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        if getattr(block, "attentions", None):
            yield block


def series_of(network: Any) -> dict[str, SeriesAttention]:
    """Every triple by its path, in the order of the forward pass."""
    blocks: dict[nn.Module, str] = {module: path for path, module in network.named_modules()}
    return {
        f"{blocks[block]}.attentions.{number}": series
        for block in _attending(network)
        for number, series in enumerate(block.attentions)
    }
