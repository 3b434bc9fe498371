"""Beats and chords guessed from the words (Melechovsky et al. 2023, section 4.3), where a prompt tells none.

A DeBERTa reads the caption: at its first token how many beats a bar has, at every token the seconds to the next beat.
A T5 then reads caption, beats and bar, and writes `Am at 0.46 n F at 2.3 n ...`. A pipeline may lack both.
B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,  # noqa: F401  diffusers loads a network only if its module knows this name
)
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2PreTrainedModel

from studio.bases.musicgen import LONGEST_TEXT
from studio.errors import RequestError
from studio.music.score import NO_CHORD, Beat, Chord, parse_chord

LONGEST_BAR = 4
LAST_SECOND = 10.0  # the clips that both were trained on


class BeatPredictor(DebertaV2PreTrainedModel):
    """Two heads on a DeBERTa, each of two layers with nothing between them, as published."""

    config_class = DebertaV2Config

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.deberta = DebertaV2Model(config)
        self.hidden1, self.classifier = nn.Linear(width, width), nn.Linear(width, LONGEST_BAR)
        self.hidden2, self.regressor = nn.Linear(width, width), nn.Linear(width, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        """(scores of bars of 1 to 4 beats (B, L, 4), seconds to the next beat (B, L))."""
        states = self.deberta(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(self.hidden1(states)), self.regressor(self.hidden2(states))[..., 0]


@torch.no_grad()
def predict_beats(network: BeatPredictor, tokenizer: Any, prompt: str, longest: int) -> tuple[tuple[Beat, ...], int]:
    """(beats, beats in a bar) that suit the words; at most `longest` beats."""
    told = tokenizer(prompt, max_length=LONGEST_TEXT, truncation=True, return_tensors="pt").to(network.device)
    bars, intervals = network(told.input_ids, told.attention_mask)
    bar = int(bars[0, 0].argmax()) + 1
    beats: list[Beat] = []
    for seconds in accumulate(round(interval, 4) for interval in intervals[0].float().tolist()):
        if not seconds < LAST_SECOND or len(beats) == longest:
            break
        beats.append((max(0.0, round(seconds, 2)), len(beats) % bar + 1))
    return tuple(beats), bar


@torch.no_grad()
def predict_chords(network: Any, tokenizer: Any, prompt: str, beats: Sequence[Beat], bar: int) -> tuple[Chord, ...]:
    """Chords that suit the words and the beats. What the network writes that is no chord is left out."""
    times = " , ".join(str(seconds) for seconds, _ in beats)
    question = rf"Caption: {prompt} \n Timestamps: {times} \n Max Beat: {bar}"  # a backslash and an n, as in training
    told = tokenizer(question, max_length=LONGEST_TEXT, truncation=True, return_tensors="pt").to(network.device)
    written = network.generate(
        input_ids=told.input_ids,
        attention_mask=told.attention_mask,
        min_length=8,
        max_length=128,
        num_beams=5,
        early_stopping=True,
    )
    return read_chords(tokenizer.decode(written[0], skip_special_tokens=True))


def read_chords(text: str) -> tuple[Chord, ...]:
    """The chords in `Am at 0.46 n F at 2.3`."""
    chords = []
    for item in text.split(" n "):
        name, _, seconds = item.strip().partition(" at ")
        try:
            if name != NO_CHORD:
                parse_chord(name)
            chords.append((name, float(seconds)))
        except (RequestError, ValueError):
            continue
    return tuple(chords)
