"""Beats and chords as features for cross-attention (Melechovsky et al. 2023, section 4.2; Guo et al. 2023).

A beat is its count, one-hot, beside its time; a chord its root, type and inversion beside its time. Times are sines and
cosines of seconds / 10001^(2i/D); so is the root, of its number, where all rates are 1, plus a learned bias.
Ids and layout are those of the published weights. B batch, M beats, N chords, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from studio.errors import RequestError
from studio.music.score import NO_CHORD, ROOTS, TYPES, Beat, Chord, parse_chord

PAD, NONE = 0, 1  # ids of padding and of "no chord", in each vocabulary
ROOT_IDS = dict(zip(ROOTS, (2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 13, 13), strict=True))
TYPE_IDS = {name: number + 2 for number, name in enumerate(TYPES)}
INVERTED, UPRIGHT = 2, 3
TYPE_COUNT, INVERSION_COUNT = len(TYPES) + 2, 4
TIME_BASE = 10001.0


def waves_of(numbers: Tensor, width: int, base: float) -> Tensor:
    """(B, N, D) of numbers (B, N): sin at even places, cos at odd, of number / base^(2 floor(i/2) / D), in fp32."""
    places = torch.arange(width, device=numbers.device)
    angles = numbers.float()[..., None] / base ** (2 * (places // 2) / width)
    return torch.where(places % 2 == 0, angles.sin(), angles.cos())


class BeatEncoder(ModelMixin, ConfigMixin):
    """`counts` is how many ids there are: padding, none, and the counts 1 to `counts - 2`."""

    @register_to_config
    def __init__(self, width: int = 1024, length: int = 50, counts: int = 7) -> None:
        super().__init__()
        self.ffn = nn.Linear(counts + width, width)

    def ids_of(self, beats: Sequence[Beat]) -> tuple[Tensor, Tensor]:
        """(ids (M,), seconds (M,)), cut or padded to `length`. Raises RequestError for a bar of too many beats."""
        length, highest = self.config["length"], self.config["counts"] - 2
        beats = sorted(beats)[:length]
        if (wrong := max((count for _, count in beats), default=0)) > highest:
            raise RequestError(f"the beats count to {wrong}", f"this base knows bars of up to {highest} beats")
        times = [seconds for seconds, _ in beats]
        missing = length - len(beats)
        ids = [count + 1 for _, count in beats] + [PAD] * missing
        return torch.tensor(ids), torch.tensor(times + [times[-1] if times else 0.0] * missing, dtype=torch.float32)

    def forward(self, ids: Tensor, seconds: Tensor) -> Tensor:
        """(B, M, D) of ids and seconds (B, M)."""
        known = F.one_hot(ids, self.config["counts"])
        features = torch.cat([known, waves_of(seconds, self.config["width"], TIME_BASE)], -1)
        return self.ffn(features.to(self.ffn.weight.dtype))


class ChordEncoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 1024, length: int = 20) -> None:
        super().__init__()
        self.root_bias = nn.Parameter(torch.rand(1, width))
        self.ffn = nn.Linear(TYPE_COUNT + INVERSION_COUNT + 2 * width, width)

    def ids_of(self, chords: Sequence[Chord]) -> tuple[Tensor, Tensor]:
        """(ids (N, 3) of root, type and inversion, seconds (N,)), cut or padded. Without chords there is one: none."""
        length = self.config["length"]
        chords = sorted(chords, key=lambda chord: chord[1])[:length] or [(NO_CHORD, 0.0)]
        missing = length - len(chords)
        ids = [chord_ids(name) for name, _ in chords] + [(PAD, PAD, PAD)] * missing
        times = [seconds for _, seconds in chords]
        return torch.tensor(ids), torch.tensor(times + [times[-1]] * missing, dtype=torch.float32)

    def forward(self, ids: Tensor, seconds: Tensor) -> Tensor:
        """(B, N, D) of ids (B, N, 3) and seconds (B, N)."""
        width = self.config["width"]
        root = waves_of(ids[..., 0], width, 1.0) + self.root_bias.float()
        kind, inversion = F.one_hot(ids[..., 1], TYPE_COUNT), F.one_hot(ids[..., 2], INVERSION_COUNT)
        features = torch.cat([root, kind, inversion, waves_of(seconds, width, TIME_BASE)], -1)
        return self.ffn(features.to(self.ffn.weight.dtype))


def chord_ids(name: str) -> tuple[int, int, int]:
    """(root, type, inversion) of a chord's name."""
    if name == NO_CHORD:
        return NONE, NONE, NONE
    root, kind, inverted = parse_chord(name)
    return ROOT_IDS[root], TYPE_IDS[kind], INVERTED if inverted else UPRIGHT
