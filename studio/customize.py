"""Teaching a base a concept from pictures: the task behind every method that adds patches.

Pictures and captions are encoded once and cached by content; then each step noises some latents and compares what the
patched denoiser predicts. B samples, C H W the latents' axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.adapter import Card
from studio.adapting import AdapterTraining
from studio.base import Condition, Request
from studio.bases.latent_diffusion import LatentDiffusion
from studio.data.cache import Cache
from studio.data.order import Order
from studio.data.pictures import Picture, PictureSet, load_mask, load_pixels
from studio.data.sticker_pool import to_pixels
from studio.errors import WorkError
from studio.inputs import base_inputs
from studio.keyed import torch_generator
from studio.method import PatchMethod
from studio.preset import Preset
from studio.run import Event, Run
from studio.samples import save_picture
from studio.sketching import concept_inputs, generic_inputs, sketches_of
from studio.words import PAIR, WordAttachment, fresh_words, layerwise_words

VALIDATION_DRAWS = 8  # noises and times per held-out picture
PRIOR_BATCH = 8  # class pictures drawn at a time


@dataclass
class Example:
    """One picture as it is trained on: latents by flip, its caption, and what its loss counts."""

    name: str
    latents: list[Tensor]
    caption: str
    bucket: tuple[int, int]
    weight: float = 1.0
    masks: list[Tensor] | None = None


class AdapterTask(AdapterTraining):
    """Trains the patches (and learned words) of one adapter on a set of pictures."""

    def __init__(
        self,
        method: PatchMethod,
        base: LatentDiffusion,
        preset: Preset,
        run: Run,
        pictures: PictureSet,
        card: Card,
        cache: Cache,
    ) -> None:
        self.base, self.cache = base, cache
        super().__init__(
            method, base, preset, run, card, base_inputs(base, method.sites(base), cache) if method.needs_inputs else {}
        )
        if preset.learned_words_layerwise:
            vectors = preset.learned_words or PAIR
            self.adapter.words = layerwise_words(base, card.trigger, card.class_word, vectors, preset.seed)
        elif preset.learned_words:
            self.adapter.words = fresh_words(base, card.trigger, card.class_word, preset.learned_words, preset.seed)
        self.encodes_in_loop = bool(self.adapter.words) or any(
            site.component in base.text_encoder_names for site in self.sites.values()
        )
        self.words = WordAttachment(base, self.adapter.words)
        self.pictures, self.held_out_pictures = pictures.pictures, pictures.held_out
        self.conditions: dict[tuple[str, tuple[int, int]], Condition] = {}

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Event]:
        """Encodes pictures and captions, draws the prior's class pictures; yields `progress` events."""
        self.attachment.weight = 0.0  # the prior is what the base draws by itself
        self.examples: list[Example] = []
        for number, picture in enumerate(self.pictures):
            yield Event("progress", 0, {"what": "encoding pictures", "done": number, "total": len(self.pictures)})
            self.examples.append(self._encode(picture))
        self.held_out = [self._encode(picture) for picture in self.held_out_pictures]
        subjects = len(self.examples)
        yield from self._draw_prior()
        self.attachment.weight = 1.0
        buckets = [example.bucket for example in self.examples]
        self.order = Order(
            buckets[:subjects], self.preset.batch_size * self.processes(), self.preset.seed, prior=buckets[subjects:]
        )
        if repeats := self.order.repeats():
            text = f"each round shows {repeats} pictures again, so that every batch is full and of one size"
            yield Event("warning", 0, {"text": text})
        if not self.encodes_in_loop:
            captions = {(e.caption, e.bucket) for e in (*self.examples, *self.held_out)}
            captions |= {("", bucket) for _, bucket in captions} if self.preset.data.caption_dropout else set()
            for caption, bucket in sorted(captions):
                self.conditions[caption, bucket] = self._encode_caption(caption, bucket)

    def _key(self, *parts: object) -> str:
        return "|".join(map(str, (self.base.identity().architecture, self.base.identity().values, *parts)))

    def _encode(self, picture: Picture) -> Example:
        flips = (False, True) if self.preset.data.flip else (False,)

        def compute() -> dict[str, Tensor]:
            pixels = torch.stack([load_pixels(picture, flip) for flip in flips])
            with torch.no_grad():
                return {"latents": self.base.encode_pictures(pixels).float().cpu()}

        latents = self.cache.get(self._key("latents", picture.content, picture.bucket, flips), compute)["latents"]
        masks = None
        if picture.mask is not None:
            masks = [load_mask(picture, (latents.shape[-1], latents.shape[-2]), flip) for flip in flips]
        return Example(picture.name, list(latents), picture.caption, picture.bucket, masks=masks)

    def _encode_caption(self, caption: str, bucket: tuple[int, int]) -> Condition:
        def compute() -> Condition:
            with torch.no_grad():
                return {k: v.float().cpu() for k, v in self.base.encode_prompts([caption], bucket).items()}

        return self.cache.get(self._key("caption", caption, bucket), compute)

    def _draw_prior(self) -> Iterator[Event]:
        """The class pictures, a batch at a time: a picture depends a little, by rounding, on its batch."""
        prior, side = self.preset.data.prior, self.preset.data.resolution or self.base.resolution
        prompts = self._prior_prompts()
        for first in range(0, prior.pictures, PRIOR_BATCH):
            yield Event("progress", 0, {"what": "drawing class pictures", "done": first, "total": prior.pictures})
            seeds = range(first, min(first + PRIOR_BATCH, prior.pictures))
            asked = [prompts[seed % len(prompts)] for seed in seeds]
            request = Request(asked, seeds, steps=prior.steps, width=side, height=side)

            def compute(request: Request = request) -> dict[str, Tensor]:
                with torch.no_grad():
                    pixels = to_pixels(self.base.generate_batch(request))
                    return {"latents": self.base.encode_pictures(pixels).float().cpu()}

            found = self.cache.get(self._key("prior", asked, first, side, prior.steps), compute)["latents"]
            for seed, prompt, latents in zip(seeds, asked, found, strict=True):
                self.examples.append(Example(f"class picture {seed}", [latents], prompt, (side, side), prior.weight))

    def _prior_prompts(self) -> list[str]:
        """What the class pictures show: the preset's prompts, else the base's own, else the class."""
        prompts = self.preset.data.prior.prompts or self.base.prompts or ("a {class}",)
        return [self._fill(prompt) for prompt in prompts]

    # -- what the loop asks ------------------------------------------------------------------------------------

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        batch = self.order.batch(step * self.preset.gradient_accumulation_steps + micro)
        examples = [self.examples[batch[slot]] for slot in slots]
        return self._losses(examples, [(self.preset.seed, step, micro, slot) for slot in slots])

    def _losses(self, examples: list[Example], keys: list[tuple[object, ...]]) -> Tensor:
        generators = [torch_generator("sample", *key) for key in keys]
        flips = [int(torch.randint(len(e.latents), (), generator=g)) for e, g in zip(examples, generators)]
        dropped = [float(torch.rand((), generator=g)) < self.preset.data.caption_dropout for g in generators]
        objective, device = self.base.objective, self.base.device
        times = torch.stack([objective.draw_time(g) for g in generators])
        clean = torch.stack([e.latents[flip] for e, flip in zip(examples, flips)]).to(device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(device)
        captions = ["" if drop else e.caption for e, drop in zip(examples, dropped)]
        noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
        condition = self._condition(captions, examples[0].bucket)

        def distance() -> Tensor:
            predicted = self.base.predict(noisy, objective.network_time(times), condition).float()
            return self._masked((predicted - target).square(), examples, flips).mean((1, 2, 3))

        loss = self._consistent(distance) if self.preset.dco_beta else distance()
        loss = loss * torch.tensor([e.weight for e in examples], device=device)
        if self.preset.min_snr_gamma:
            loss = loss * objective.min_snr_weight(times, self.preset.min_snr_gamma).to(device)
        return loss

    def _consistent(self, distance: Callable[[], Tensor]) -> Tensor:
        """-log sigmoid(-beta (d - d_base)) (Lee et al. 2024, DCO); d_base with the patches off."""
        self.attachment.weight = 0.0
        with torch.no_grad():
            reference = distance()
        self.attachment.weight = 1.0
        assert self.preset.dco_beta is not None
        return -F.logsigmoid(-self.preset.dco_beta * (distance() - reference))

    def _condition(self, captions: list[str], bucket: tuple[int, int]) -> Condition:
        if self.encodes_in_loop:
            return self.base.encode_prompts(captions, bucket)
        parts = [self.conditions[caption, bucket] for caption in captions]
        return {key: torch.cat([part[key] for part in parts]).to(self.base.device) for key in parts[0]}

    @staticmethod
    def _masked(error: Tensor, examples: list[Example], flips: list[int]) -> Tensor:
        """Weights the error by the masks, each scaled to a mean of 1 so that the loss keeps its size."""
        if all(example.masks is None for example in examples):
            return error
        ones = torch.ones(1, *error.shape[-2:])
        masks = torch.stack([ones if e.masks is None else e.masks[flip] for e, flip in zip(examples, flips)])
        masks = masks / masks.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        return error * masks.to(error)

    def describe(self, step: int, micro: int, slots: range) -> str:
        batch = self.order.batch(step * self.preset.gradient_accumulation_steps + micro)
        names = ", ".join(self.examples[batch[slot]].name for slot in slots)
        return f"pictures {names}, with the times of seed {self.preset.seed}, step {step + 1}"

    def held_out_losses(self) -> Iterator[Tensor]:
        for example in self.held_out:
            for draw in range(VALIDATION_DRAWS):
                yield self._losses([example], [("validation", self.preset.seed, example.name, draw)])

    def save_sample(self, work: Any, step: int, column: int, prompt: str) -> Event:
        return save_picture(self.run, work, step, column, prompt, column)

    def sketch_inputs(self) -> Iterator[Event]:
        """Puts sketches of the layers' inputs into the adapter, as it stands; yields a `warning` where it cannot."""
        if not self.preset.sketches:
            return
        card = self.adapter.card
        self._train_mode(False)
        try:
            concept = concept_inputs(self.base, self.sites, card.trigger)
            self.attachment.weight = 0.0
            generic = generic_inputs(self.base, self.sites, self.cache)
            card.shared_inputs, self.adapter.sketches = sketches_of(concept, generic, self.preset.sketches)
        except WorkError as error:
            text = f"the adapter carries no sketches of its layers' inputs: {error.message}"
            yield Event("warning", card.steps, {"text": text})
        finally:
            self.attachment.weight = 1.0
            self._train_mode(True)

    def close(self) -> None:
        super().close()
        self.words.detach()
