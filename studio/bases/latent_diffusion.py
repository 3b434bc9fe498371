"""What Stable Diffusion 1.x, 2.x, XL and 3 share: a VAE, a text side, a denoiser, a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from studio.base import Base, Request
from studio.errors import RequestError
from studio.objective import Diffusion, FlowMatching, Objective

ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")


class LatentDiffusion(Base):
    """A base whose pipeline follows diffusers' conventions."""

    @property
    def objective(self) -> Objective:
        config = self.pipe.scheduler.config
        if not hasattr(self.pipe.scheduler, "alphas_cumprod"):
            return FlowMatching(getattr(config, "shift", None) or 1.0, config.num_train_timesteps)
        return Diffusion(self.pipe.scheduler.alphas_cumprod, config.prediction_type)

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def resolution(self) -> int:
        """The side of the square pictures that this base was made for, in pixels."""
        return int(self.denoiser.config.sample_size) * self.latent_factor

    @property
    def size_multiple(self) -> int:
        """Widths and heights must be multiples of this."""
        blocks = len(getattr(self.denoiser.config, "block_out_channels", (1,)))
        return self.latent_factor * 2 ** (blocks - 1)

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] from latents as `encode_pictures` gives them."""
        vae = self.pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample

    def generate(self, request: Request) -> list[Any]:
        width, height = request.width or self.resolution, request.height or self.resolution
        for side in (width, height):
            if side % self.size_multiple or not self.size_multiple <= side <= 8192:
                raise RequestError(
                    f"'{self.name}' cannot draw {width}x{height}: sides must be multiples of {self.size_multiple}",
                    hint=f"its own size is {self.resolution}x{self.resolution}",
                )
        options: dict[str, Any] = {"width": width, "height": height, "output_type": "pil"}
        if request.steps is not None:
            options["num_inference_steps"] = request.steps
        elif steps := self.default_steps:
            options["num_inference_steps"] = steps
        if request.guidance is not None:
            options["guidance_scale"] = request.guidance
        elif guidance := self.default_guidance:
            options["guidance_scale"] = guidance
        if request.on_step is not None:
            options["callback_on_step_end"] = _reporting(request.on_step, options.get("num_inference_steps", 50))
        self.pipe.set_progress_bar_config(disable=True)
        pictures = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            # One at a time, so that a picture does not depend on its neighbours in the batch.
            generator = torch.Generator("cpu").manual_seed(seed)
            negative = request.negative or None
            with torch.no_grad():
                drawn = self.pipe(prompt, negative_prompt=negative, generator=generator, **options)
            pictures += drawn.images
        return pictures

    @property
    def default_steps(self) -> int | None:
        """The number of sampling steps this base was tuned for; None leaves it to the pipeline."""
        return None

    @property
    def default_guidance(self) -> float | None:
        return None


def _reporting(on_step: Any, total: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(index + 1, total)
        return tensors

    return callback


def pad_tokens(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded and cut to the tokenizer's length as diffusers does it."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
