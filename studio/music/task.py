"""Teaching a base of music from recordings: the task behind every method that adds patches.

Sounds become what the network works on once, captions the text encoder's states once, both cached by content.
`SoundTask` teaches bases that write tokens: each step compares the tokens that the patched network expects with those
that are there; bases that denoise are taught in `denoising.py`. B samples, K codebooks, F frames, L tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.adapter import Card
from studio.adapting import AdapterTraining
from studio.base import Condition
from studio.bases.musicgen import MusicGen
from studio.data.cache import Cache
from studio.data.order import Order
from studio.data.recordings import Piece, SoundSet
from studio.errors import PresetError
from studio.evaluate.beats import onset_envelope, onsets
from studio.keyed import torch_generator
from studio.method import PatchMethod
from studio.music.emphasis import emphasis
from studio.music.listening import save_sample
from studio.preset import Preset
from studio.run import Event, Run


@dataclass
class Example:
    """One piece as it is trained on: its codes (K, F) or latents (Z, F, bands), and what it is told of.

    `weights` (K, F) say how much each code counts.
    """

    name: str
    codes: Tensor
    caption: str
    weights: Tensor | None = None


class SoundTraining(AdapterTraining):
    """Trains the patches of one adapter on a set of recordings. Subclasses say how a sound is encoded and judged."""

    text_encoder: str  # what the names of its sites begin with

    def __init__(
        self, method: PatchMethod, base: Any, preset: Preset, run: Run, sounds: SoundSet, card: Card, cache: Cache
    ) -> None:
        refuse_picture_settings(method, preset, base)
        super().__init__(method, base, preset, run, card)
        self.base, self.cache, self.sounds = base, cache, sounds
        self.encodes_in_loop = any(name.startswith(self.text_encoder) for name in self.sites)
        self.conditions: dict[str, Condition] = {}

    def _fill(self, text: str) -> str:
        return super()._fill(text.replace("{caption}", self.sounds.example))

    @abstractmethod
    def encode(self, piece: Piece) -> Example:
        """A piece as it is trained on, by the cache."""

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Event]:
        self.attachment.weight = 0.0
        self.examples: list[Example] = []
        for number, piece in enumerate(self.sounds.pieces):
            yield Event("progress", 0, {"what": "encoding sounds", "done": number, "total": len(self.sounds.pieces)})
            self.examples.append(self.encode(piece))
        self.held_out = [self.encode(piece) for piece in self.sounds.held_out]
        lengths = [example.codes.shape[1] for example in self.examples]
        self.order = Order(lengths, self.preset.batch_size * self.processes(), self.preset.seed)
        if repeats := self.order.repeats():
            text = f"each round plays {repeats} pieces again, so that every batch is full and of one length"
            yield Event("warning", 0, {"text": text})
        if not self.encodes_in_loop:
            for caption in sorted({"", *(self.words_of(e) for e in (*self.examples, *self.held_out))}):
                self.conditions[caption] = self._encode_caption(caption)
        self.attachment.weight = 1.0

    def words_of(self, example: Example) -> str:
        """What the text encoder reads of an example."""
        return example.caption

    def _key(self, *parts: object) -> str:
        identity = self.base.identity()
        return "|".join(map(str, (identity.architecture, identity.values, *parts)))

    def sound_of(self, piece: Piece, kind: str, dtype: torch.dtype) -> Tensor:
        """A piece as the base encodes it, from the cache if it was ever computed; `kind` is its name there."""

        def compute() -> dict[str, Tensor]:
            wave = piece.load(self.base.sample_rate_hz, self.base.channels)
            return {kind: self.base.encode_sounds(wave[None])[0].to("cpu", dtype)}

        return self.cache.get(self._key(kind, piece.content, piece.start_seconds, piece.seconds), compute)[kind]

    def _encode_caption(self, caption: str) -> Condition:
        def compute() -> Condition:
            with torch.no_grad():
                found = self.encode_words([caption])
            return {"text": found["text"].float().cpu(), "mask": found["mask"].cpu()}

        return self.cache.get(self._key("caption", caption), compute)

    def encode_words(self, captions: list[str]) -> Condition:
        """`text` (B, L, D) and `mask` (B, L)."""
        return self.base.encode_prompts(captions)

    def condition_of(self, captions: list[str]) -> Condition:
        """What the network is told of these words."""
        if self.encodes_in_loop:
            return self.encode_words(captions)
        parts = [self.conditions[caption] for caption in captions]
        longest = max(part["mask"].shape[1] for part in parts)
        return {
            "text": torch.cat([F.pad(p["text"], (0, 0, 0, longest - p["text"].shape[1])) for p in parts]),
            "mask": torch.cat([F.pad(p["mask"], (0, longest - p["mask"].shape[1])) for p in parts]),
        }

    # -- what the loop asks ------------------------------------------------------------------------------------

    def examples_at(self, step: int, micro: int, slots: range) -> list[Example]:
        batch = self.order.batch(step * self.preset.gradient_accumulation_steps + micro)
        return [self.examples[batch[slot]] for slot in slots]

    def describe(self, step: int, micro: int, slots: range) -> str:
        return "sounds " + ", ".join(example.name for example in self.examples_at(step, micro, slots))

    def save_sample(self, work: Any, step: int, column: int, prompt: str) -> Event:
        return save_sample(self.run, work, step, column, prompt, column)


class SoundTask(SoundTraining):
    """Bases that write tokens: cross-entropy of the codes."""

    base: MusicGen
    text_encoder = "musicgen.text_encoder."

    def encode(self, piece: Piece) -> Example:
        codes = self.sound_of(piece, "codes", torch.int16)
        begun = self._beginnings(piece) if self.preset.note_beginnings != 1 else []
        weights = emphasis((codes.shape[0], codes.shape[1]), begun, self.preset)
        return Example(f"{piece.name} from {piece.start_seconds:g} s", codes.long(), piece.caption, weights)

    def _beginnings(self, piece: Piece) -> list[int]:
        """The frames in which notes of a recording begin, as far as they are heard to."""
        wave = piece.load(self.base.sample_rate_hz, self.base.channels).mean(0).numpy()
        heard = onsets(onset_envelope(wave, self.base.sample_rate_hz))
        return [int(seconds * self.base.frame_rate_hz) for seconds in heard]

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        examples = self.examples_at(step, micro, slots)
        generators = [torch_generator("sample", self.preset.seed, step, micro, slot) for slot in slots]
        dropped = [float(torch.rand((), generator=g)) < self.preset.data.caption_dropout for g in generators]
        told = ["" if drop else e.caption for e, drop in zip(examples, dropped)]
        weights = torch.stack([e.weights for e in examples if e.weights is not None])
        return self.base.losses(self._codes(examples), self.condition_of(told), weights)

    def _codes(self, examples: list[Example]) -> Tensor:
        return torch.stack([example.codes for example in examples])

    def held_out_losses(self) -> Iterator[Tensor]:
        """Cross-entropy in nats per code; there is nothing random in it."""
        for example in self.held_out:
            yield self.base.losses(self._codes([example]), self.condition_of([example.caption]))


def refuse_picture_settings(method: PatchMethod, preset: Preset, base: Any) -> None:
    """Raises PresetError for settings that mean nothing to a base of music, or nothing to one that writes tokens."""
    data = preset.data
    set_ones = {
        "data.prior.pictures": data.prior.pictures,
        "data.flip": data.flip,
        "data.masks": data.masks,
        "learned_words": preset.learned_words,
        "learned_words_layerwise": preset.learned_words_layerwise,
        "dco_beta": preset.dco_beta,
        f"method.kind={method.kind}, which looks at the base's pictures": method.needs_inputs,
    }
    if not hasattr(base, "objective"):  # tokens are not denoised
        set_ones |= {"min_snr_gamma": preset.min_snr_gamma, "sample_steps": preset.sample_steps}
    wrong = next((key for key, value in set_ones.items() if value), None)
    if wrong is not None:
        raise PresetError(
            f"{wrong}: that is for bases of pictures, and '{preset.base}' makes music", f"leave {wrong} out"
        )


def refuse_token_settings(preset: Preset) -> None:
    """Raises PresetError for settings that mean something only to a base that writes tokens."""
    wrong = next((key for key in ("first_codebook", "note_beginnings") if getattr(preset, key) != 1), None)
    if wrong is not None:
        raise PresetError(f"{wrong}: '{preset.base}' writes no tokens", f"leave {wrong} out")
