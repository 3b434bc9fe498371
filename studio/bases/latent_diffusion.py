"""What Stable Diffusion 1.x, 2.x, XL and 3 share: a VAE, a text side, a denoiser, a diffusers pipeline."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.base import Base, Condition, Request
from studio.bases.folder import LEFT_OUT, absent_parts, refuse_random_parts
from studio.errors import BaseError, RequestError
from studio.objective import Diffusion, FlowMatching, Objective
from studio.samples import to_picture

ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")


class LatentDiffusion(Base):
    """A base whose pipeline follows diffusers' conventions."""

    # -- what a family says ------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """What the denoiser is told of the prompts, for pictures of `size` = (W, H)."""

    @abstractmethod
    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output for noisy latents at network times (B,)."""

    # -- loading -----------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, dtype: torch.dtype, licence: str = "", variant: str | None = None
    ) -> Self:
        # diffusers reopens a folder without T5 only if it is told so once more.
        left_out: dict[str, Any] = dict.fromkeys((*absent_parts(folder), *_accepted(cls.pipeline_class)))
        pipe = _pipeline(cls.pipeline_class).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant, **left_out
        )
        refuse_random_parts(folder, {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)})
        return cls.at_rest(name, pipe, licence)

    @classmethod
    def from_checkpoint(cls, file: Path, configs: Path, name: str, dtype: torch.dtype, licence: str = "") -> Self:
        """One file with all weights under their original names; `configs` is a pipeline folder without weights."""
        left_out: dict[str, Any] = dict.fromkeys((*absent_parts(configs), *_accepted(cls.pipeline_class)))
        pipe = _pipeline(cls.pipeline_class).from_single_file(
            str(file), config=str(configs), torch_dtype=dtype, local_files_only=True, **left_out
        )
        return cls.at_rest(name, pipe, licence)

    @classmethod
    def at_rest(cls, name: str, pipe: Any, licence: str) -> Self:
        """A base around the pipeline. Raises BaseError for a diffusion process that we cannot train."""
        base = cls(name, frozen(pipe), licence)
        base.objective  # noqa: B018  raises
        return base

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        scheduler = self.pipe.scheduler
        config = scheduler.config
        if type(scheduler).__name__.startswith("FlowMatch"):
            return FlowMatching(getattr(config, "shift", None) or 1.0, config.num_train_timesteps)
        prediction = getattr(config, "prediction_type", None)
        if prediction not in ("epsilon", "v_prediction", "sample") or not hasattr(scheduler, "alphas_cumprod"):
            raise BaseError(
                f"'{self.name}' has a {type(scheduler).__name__} that predicts '{prediction}', which the studio "
                "cannot train",
                hint="it trains models that predict epsilon, v, the sample, or a flow",
            )
        return Diffusion(scheduler.alphas_cumprod, prediction)

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
        """Sides must be multiples of this: of 8, and of a pixel of the UNet's coarsest level."""
        return math.lcm(8, self.latent_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1))

    @property
    def largest_side(self) -> int:
        """The longest side that can be drawn, in pixels."""
        return 8192

    # -- latents -----------------------------------------------------------------------------------------------

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Latents of pixels in [-1, 1], (B, 3, H, W), scaled as the denoiser wants them. Deterministic."""
        with _in_safe_dtype(self.pipe.vae) as vae:
            latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] from latents as `encode_pictures` gives them."""
        shift = getattr(self.pipe.vae.config, "shift_factor", None) or 0.0
        with _in_safe_dtype(self.pipe.vae) as vae:
            return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample

    # -- text --------------------------------------------------------------------------------------------------

    def token_ids(self, prompts: Sequence[str], tokenizer_name: str = "tokenizer") -> Tensor:
        """Token ids (B, L) on the base's device; learned words of several vectors become several tokens."""
        tokenizer = getattr(self.pipe, tokenizer_name)
        if hasattr(self.pipe, "maybe_convert_prompt"):
            prompts = [self.pipe.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        return pad_tokens(tokenizer, prompts).to(self.device)

    # -- sampling ----------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> list[Any]:
        """PIL pictures, each from `torch.Generator("cpu").manual_seed(seed)`."""
        # One at a time, so that a picture does not depend on its neighbours in the batch.
        pairs = zip(request.prompts, request.seeds, strict=True)
        return [self.generate_batch(replace(request, prompts=[p], seeds=[s]))[0] for p, s in pairs]

    @torch.no_grad()
    def generate_batch(self, request: Request) -> list[Any]:
        """The same pictures up to rounding, all at once: faster, and as much memory as they take together."""
        options = self._options(request)
        self.pipe.set_progress_bar_config(disable=True)
        negative = [request.negative] * len(request.prompts) if request.negative else None
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        return self.pipe(list(request.prompts), negative_prompt=negative, generator=generators, **options).images

    def _options(self, request: Request) -> dict[str, Any]:
        """What the pipeline is called with beside prompts and seed. Raises RequestError for an impossible size."""
        width, height = request.width or self.resolution, request.height or self.resolution
        for side in (width, height):
            if side % self.size_multiple or not self.size_multiple <= side <= self.largest_side:
                raise RequestError(
                    f"'{self.name}' cannot draw {width}x{height}: sides must be multiples of {self.size_multiple}, "
                    f"{self.largest_side} at most",
                    hint=f"its own size is {self.resolution}x{self.resolution}",
                )
        options: dict[str, Any] = {"width": width, "height": height, "output_type": "pil"}
        if request.steps is not None:
            options["num_inference_steps"] = request.steps
        guidance = self.guidance if request.guidance is None else request.guidance
        if guidance is not None:
            options["guidance_scale"] = guidance
        if request.on_step is not None or request.on_preview is not None:
            options["callback_on_step_end"] = self._reporting(request)
        return options

    def _reporting(self, request: Request) -> Any:
        def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step, steps = index + 1, pipe.num_timesteps
            if request.on_step is not None:
                request.on_step(step, steps)
            if request.on_preview is not None and step < steps and step % max(1, steps // request.previews) == 0:
                request.on_preview(to_picture(self.decode_latents(tensors["latents"][:1])[0]))
            return tensors

        return callback


def frozen(pipe: Any) -> Any:
    """The pipeline, nothing of which trains, drops out or draws progress bars any more."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pipeline(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _accepted(pipeline_class: str) -> list[str]:
    """The parts among LEFT_OUT that this pipeline knows at all."""
    import inspect

    return [part for part in LEFT_OUT if part in inspect.signature(_pipeline(pipeline_class).__init__).parameters]


@contextmanager
def _in_safe_dtype(vae: Any) -> Iterator[Any]:
    """Inside, a VAE that overflows in fp16, such as SDXL's, computes in fp32."""
    overflows = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if overflows:
            vae.to(torch.float16)


def pad_tokens(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids (B, L), padded and cut to `length`, by default the tokenizer's own, as diffusers does it."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def in_dtype_of(network: Any, *tensors: Tensor) -> list[Tensor]:
    """The tensors where the network is, in its dtype."""
    return [tensor.to(network.device, network.dtype) for tensor in tensors]
