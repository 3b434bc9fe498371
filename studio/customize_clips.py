"""Teaching a base of clips a motion, or who moves, from clips: the task behind every method that adds patches.

Clips are encoded once and cached by content; each step noises some and compares what the patched network predicts, for
half of the samples with one frame given, so that the adapter serves text and pictures alike. B clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from studio.adapter import Card
from studio.adapting import AdapterTraining
from studio.base import Request
from studio.bases.sticker_video import alpha
from studio.bases.sticker_video.batches import denoising_losses
from studio.bases.sticker_video.family import StickerVideo
from studio.data.animations import Animation, AnimationSet
from studio.data.cache import Cache
from studio.data.clip_files import webp_bytes
from studio.data.clip_pool import EncodedClip, encoded
from studio.data.clips import Clip
from studio.data.order import Order
from studio.errors import PresetError
from studio.files import write_atomically
from studio.keyed import torch_generator
from studio.method import PatchMethod
from studio.preset import Preset
from studio.run import Event, Run
from studio.samples import save_picture
from studio.words import WordAttachment, fresh_words

GIVEN_SHARE = 0.5  # of the samples that are told one of their frames
VALIDATION_DRAWS = 8  # noises and times per held-out clip


class ClipLesson(AdapterTraining):
    """Trains the patches (and learned words) of one adapter on a set of clips."""

    base: StickerVideo

    def __init__(
        self,
        method: PatchMethod,
        base: StickerVideo,
        preset: Preset,
        run: Run,
        animations: AnimationSet,
        card: Card,
        cache: Cache,
    ) -> None:
        refuse_still_settings(method, preset, base)
        super().__init__(method, base, preset, run, card)
        self.base, self.cache, self.animations = base, cache, animations
        self.side = preset.data.resolution or base.resolution
        if preset.learned_words:
            self.adapter.words = fresh_words(base, card.trigger, card.class_word, preset.learned_words, preset.seed)
        self.words = WordAttachment(base, self.adapter.words)

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Event]:
        self.attachment.weight = 0.0
        clips = self.animations.clips
        self.examples: list[EncodedClip] = []
        for number, animation in enumerate(clips):
            yield Event("progress", 0, {"what": "encoding clips", "done": number, "total": len(clips)})
            self.examples.append(self._encode(animation))
        self.held_out = [self._encode(animation) for animation in self.animations.held_out]
        self.attachment.weight = 1.0
        counts = [example.count for example in self.examples]
        self.order = Order(counts, self.preset.batch_size * self.processes(), self.preset.seed)
        if repeats := self.order.repeats():
            text = f"each round shows {repeats} clips again, so that every batch is full and of one length"
            yield Event("warning", 0, {"text": text})

    def _encode(self, animation: Animation) -> EncodedClip:
        def latents_of(clip: Clip) -> Tensor:
            def compute() -> dict[str, Tensor]:
                return {"latents": self.base.encode_clips(alpha.to_tensor(clip.frames)).float().cpu()}

            identity = self.base.identity()
            key = (identity.architecture, identity.values, "clip", animation.content, self.side, animation.file.kept)
            return self.cache.get("|".join(map(str, key)), compute)["latents"]

        clip = animation.file.load(partial(alpha.fitted, size=(self.side, self.side)))
        return encoded(clip, animation.caption, latents_of)

    # -- what the loop asks ------------------------------------------------------------------------------------

    def _batch(self, step: int, micro: int, slots: range) -> list[int]:
        batch = self.order.batch(step * self.preset.gradient_accumulation_steps + micro)
        return [batch[slot] for slot in slots]

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        chosen = [self.examples[index] for index in self._batch(step, micro, slots)]
        return self._losses(chosen, [(self.preset.seed, step, micro, slot) for slot in slots])

    def _losses(self, clips: list[EncodedClip], keys: list[tuple[object, ...]]) -> Tensor:
        generators = [torch_generator("clip lesson", *key) for key in keys]
        dropped = [float(torch.rand((), generator=g)) < self.preset.data.caption_dropout for g in generators]
        given = [_given(clip.count, g) for clip, g in zip(clips, generators)]
        captions = ["" if drop else clip.caption for clip, drop in zip(clips, dropped)]
        loss, times = denoising_losses(self.base, clips, given, captions, generators)
        if self.preset.min_snr_gamma:
            loss = loss * self.base.objective.min_snr_weight(times, self.preset.min_snr_gamma).to(loss.device)
        return loss

    def describe(self, step: int, micro: int, slots: range) -> str:
        names = ", ".join(self.animations.clips[index].name for index in self._batch(step, micro, slots))
        return f"clips {names}, with the times of seed {self.preset.seed}, step {step + 1}"

    def held_out_losses(self) -> Iterator[Tensor]:
        for number, clip in enumerate(self.held_out):
            for draw in range(VALIDATION_DRAWS):
                yield self._losses([clip], [("validation", self.preset.seed, number, draw)])

    def sample_request(self, prompt: str, seed: int) -> Request:
        frames = min(self.preset.data.frames, self.base.max_frames)
        steps = self.preset.sample_steps
        return Request([prompt], [seed], steps=steps, width=self.side, height=self.side, frames=frames, loop=True)

    def save_sample(self, work: Any, step: int, column: int, prompt: str) -> Event:
        """The frames side by side as a PNG, and the clip itself beside it as a WebP."""
        write_atomically(self.run.samples / f"{step:06d}-{column}.webp", webp_bytes(work))
        return save_picture(self.run, work.sheet(), step, column, prompt, column)

    def close(self) -> None:
        super().close()
        self.words.detach()


def _given(count: int, generator: torch.Generator) -> list[bool]:
    """Which frames of a clip are given: one of them, or none."""
    place = int(torch.randint(count, (), generator=generator))
    told = float(torch.rand((), generator=generator)) < GIVEN_SHARE
    return [told and index == place for index in range(count)]


def refuse_still_settings(method: PatchMethod, preset: Preset, base: StickerVideo) -> None:
    """Raises PresetError for settings that mean nothing to a base of clips, or that it cannot draw."""
    data = preset.data
    set_ones = {
        "data.prior.pictures": data.prior.pictures,
        "data.flip": data.flip,
        "data.masks": data.masks,
        "learned_words_layerwise": preset.learned_words_layerwise,
        "dco_beta": preset.dco_beta,
        f"method.kind={method.kind}, which looks at the base's pictures": method.needs_inputs,
    }
    wrong = next((key for key, value in set_ones.items() if value), None)
    if wrong is not None:
        message = f"{wrong}: that is for bases of pictures, and '{preset.base}' makes clips"
        raise PresetError(message, f"leave {wrong} out")
    if data.frames > base.max_frames:
        raise PresetError(f"data.frames={data.frames}: '{base.name}' draws {base.max_frames} at most")
    if (data.resolution or 0) % base.size_multiple:
        raise PresetError(f"data.resolution={data.resolution} is no multiple of {base.size_multiple}")
