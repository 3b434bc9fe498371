"""Mustango: latent diffusion of mel spectrograms, told words, beats and chords (Melechovsky et al. 2023).

B batch, Z latent channels, t latent steps in time, f in frequency, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from studio.attachment import Site
from studio.base import Base, Condition, Request
from studio.bases.folder import refuse_random_parts
from studio.bases.latent_diffusion import ATTENTION, frozen
from studio.data.sounds import Sound
from studio.errors import BaseError, RequestError
from studio.music.score import Score, read_score
from studio.objective import Diffusion
from studio.patch import LayerShape

TEXT_STATES = "text_encoder.encoder.final_layer_norm"
SECOND_NAME = "text_encoder.shared"  # of embed_tokens


class Mustango(Base):
    family = "mustango"
    medium = "audio"
    pipeline_class = "MustangoPipeline"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "beat_encoder", "chord_encoder")
    channels = 1
    groups: ClassVar = {
        "attention": tuple(f"unet.{pattern}" for pattern in ATTENTION),
        "cross-attention": tuple(f"unet.{pattern.replace('attn?', 'attn2')}" for pattern in ATTENTION),
        "text-attention": ("unet.*.text.*attn?.to_*:linear",),
        "beat-attention": ("unet.*.beat.*attn?.to_*:linear",),
        "chord-attention": ("unet.*.chord.*attn?.to_*:linear",),
        "linear": ("unet.*:linear",),
        "conv": ("unet.*:conv*",),
        "text-encoder": ("text_encoder.*:linear",),
        "scores": ("beat_encoder.*:linear", "chord_encoder.*:linear"),
        "all": ("unet.*:linear", "unet.*:conv*"),
        # -- places for inserted modules, in the order of the forward pass
        "text_states": (f"{TEXT_STATES}:block",),
        "after_layer": ("unet.*.attentions.?:plane", "unet.*.attentions.??:plane"),
        "after_block": ("unet.down_blocks.?:plane", "unet.mid_block:plane", "unet.up_blocks.?:plane"),
    }

    # -- loading -----------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, dtype: torch.dtype, licence: str = "", variant: str | None = None
    ) -> Self:
        from studio.bases.mustango.pipeline import MustangoPipeline

        # What turns latents into sound stays exact, and what is small.
        precisions = {"unet": dtype, "text_encoder": dtype, "default": torch.float32}
        pipe = MustangoPipeline.from_pretrained(
            folder, torch_dtype=precisions, use_safetensors=True, local_files_only=True, variant=variant
        )
        refuse_random_parts(folder, {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)})
        return cls.at_rest(name, pipe, licence)

    @classmethod
    def at_rest(cls, name: str, pipe: Any, licence: str) -> Self:
        """A base around the pipeline. Raises BaseError for a diffusion process that we cannot train."""
        base = cls(name, frozen(pipe), licence)
        base.objective  # noqa: B018  raises
        return base

    @classmethod
    def tiny(cls, seed: int = 0) -> Mustango:
        from studio.bases.mustango.building import pico

        return pico(seed)

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Diffusion:
        scheduler = self.pipe.scheduler
        prediction = scheduler.config.get("prediction_type")
        if prediction not in ("epsilon", "v_prediction", "sample") or not hasattr(scheduler, "alphas_cumprod"):
            raise BaseError(
                f"'{self.name}' has a {type(scheduler).__name__} that predicts '{prediction}', which the studio "
                "cannot train",
                "it trains models of music that predict epsilon, v or the sample",
            )
        return Diffusion(scheduler.alphas_cumprod, prediction)

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipe.spectrogram.sample_rate_hz)

    @property
    def longest_seconds(self) -> float:
        """The length of the clips that it was trained on."""
        return float(self.pipe.clip_seconds)

    @property
    def seconds(self) -> float:
        """The length of what is played where none is asked for."""
        return self.longest_seconds

    def sites(self) -> dict[str, Site]:
        """The layers of all networks that may learn, the text's states, and the UNet's triples of attention.

        A triple goes by its own name, and the last of a block by the block's name too.
        """
        from studio.bases.mustango.network import series_of

        found = {name: site for name, site in super().sites().items() if name != SECOND_NAME}
        text_encoder = self.modules["text_encoder"]
        width = LayerShape("block", (text_encoder.config.d_model,))
        found[TEXT_STATES] = Site(TEXT_STATES, text_encoder.encoder.final_layer_norm, width, carrier=text_encoder)
        for path, series in series_of(self.denoiser).items():
            plane = LayerShape("plane", (series.text.config.in_channels,))
            for name in (f"unet.{path}", f"unet.{path.split('.attentions.')[0]}"):
                found[name] = Site(name, series, plane)
        return found

    # -- sounds and scores -------------------------------------------------------------------------------------

    def encode_sounds(self, waves: Tensor) -> Tensor:
        """Latents (B, Z, t, f) of waves (B, 1, T), each brought to the level that the base knows. Deterministic."""
        from studio.bases.mustango.mel import levelled

        return self.pipe.encode_waves(levelled(waves[:, 0]))

    def decode_sounds(self, latents: Tensor) -> Tensor:
        """Waves (B, 1, T) of latents (B, Z, t, f)."""
        return self.pipe.heard(self.pipe.decode_mel(latents))[:, None]

    def encode_signs(self, scores: Sequence[Score]) -> Condition:
        """Ids and seconds of the beats and chords of parts of scores; their encoders run with the denoiser.

        Shapes are as in `MustangoPipeline.encode_signs`. Raises RequestError for beats or chords that they do not know.
        """
        return self.pipe.encode_signs(scores)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told of prompts for whole clips; beats and chords that a prompt tells are in it."""
        return self.pipe.encode_scores([read_score(prompt).within(0.0, self.seconds) for prompt in prompts])

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output for noisy latents (B, Z, t, f) at network times (B,)."""
        return self.pipe.predict(noisy, time, condition)

    # -- playing -----------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> list[Any]:
        """Sounds, each drawn under its own seed alone. Raises RequestError for what cannot be played."""
        if request.width or request.height:
            raise RequestError(f"'{self.name}' makes music and no pictures", "set the length with --seconds")
        seconds = self.seconds if request.seconds is None else request.seconds
        if not 0 < seconds <= self.longest_seconds:
            raise RequestError(
                f"'{self.name}' cannot play {seconds:g} seconds", f"it plays up to {self.longest_seconds:g} at once"
            )
        pairs = zip(request.prompts, request.seeds, strict=True)
        return [self._play(prompt, seed, seconds, request) for prompt, seed in pairs]

    def generate_together(self, request: Request) -> list[Any]:
        """The same: a MusicGen is faster so."""
        return self.generate(request)

    @torch.no_grad()
    def _play(self, prompt: str, seed: int, seconds: float, request: Request) -> Sound:
        wanted = {"num_inference_steps": request.steps, "guidance_scale": request.guidance}
        if request.guidance is None:
            wanted["guidance_scale"] = self.guidance
        options: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        on_step = request.on_step
        if on_step is not None:

            def report(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                on_step(index + 1, pipe.num_timesteps)
                return tensors

            options["callback_on_step_end"] = report
        generator = torch.Generator("cpu").manual_seed(seed)
        waves = self.pipe(prompt, seconds, negative_prompt=request.negative, generator=generator, **options).audios
        return Sound(waves.float().cpu(), self.sample_rate_hz)


def without(score: Score, *parts: str) -> Score:
    """A score that tells nothing of these parts: `text`, `beats`, `chords`."""
    blank: dict[str, Any] = {"text": "", "beats": (), "chords": ()}
    return replace(score, **{part: blank[part] for part in parts})
