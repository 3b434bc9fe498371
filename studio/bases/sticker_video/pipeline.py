"""Sampling of animated stickers: text, given frames, or both, into a clip with transparency.

`pipe("a fox bouncing", frames={0: picture}, num_frames=8, fps=8, loop=True)`: `frames` says which frames are given, so
one call serves text-to-clip (none), picture-to-clip (one), interpolation (first and last) and prediction forwards or
backwards (a run of them). Given frames come back exactly. Saved and loaded with safetensors like any pipeline.

F frames, Z latent channels (colour, then alpha where the network has it), h and w latent height and width.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from studio.bases.sticker_video.alpha import fitted, join, split, to_pictures, to_tensor
from studio.bases.sticker_video.conditioning import Anchor, ClipCondition, clip_noise, predicted
from studio.bases.sticker_video.detail import restored
from studio.bases.sticker_video.network import StickerUNet  # noqa: F401  diffusers loads only what is imported
from studio.errors import RequestError


@dataclass
class StickerVideoOutput(BaseOutput):
    """`frames`: for each prompt a list of RGBA pictures; or latents (B, Z, F, h, w)."""

    frames: Any


class StickerVideoPipeline(DiffusionPipeline, TextualInversionLoaderMixin):
    """`ground` in [0, 1] is the grey that colours stand on; `condition_fill` and `condition_spread` (0 for no anchor)
    are told in conditioning.py, as is `noise_share`, what frames have in common of their noise.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        ground: float = 1.0,
        condition_fill: str = "blend",
        condition_spread: float = 0.0,
        noise_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(ground=ground, condition_fill=condition_fill, condition_spread=condition_spread)
        self.register_to_config(noise_share=noise_share)

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *arguments: Any, **options: Any) -> Any:
        """As every pipeline; where this code came along with the weights (standalone.py), it goes along with them."""
        super().save_pretrained(save_directory, *arguments, **options)
        if not type(self).__module__.startswith("diffusers_modules"):
            return
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        for cls, place in ((type(self), folder), (type(self.unet), folder / "unet")):
            source = Path(inspect.getfile(cls))
            shutil.copyfile(source, place / source.name)
            index["_class_name" if cls is type(self) else "unet"] = [source.stem, cls.__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Z."""
        return latent_channels_of(self.unet)

    @property
    def has_alpha(self) -> bool:
        return self.latent_channels == 2 * self.vae.config.latent_channels

    @property
    def default_side(self) -> int:
        config = self.unet.config
        return int(config.get("sample_size") or config["image_config"]["sample_size"]) * self.vae_scale_factor

    @property
    def anchor(self) -> Anchor | None:
        """How predictions start from given frames; None if the network was trained to do it alone."""
        if not self.config.condition_spread:
            return None
        scheduler = self.scheduler
        return Anchor(scheduler.alphas_cumprod, scheduler.config.prediction_type, self.config.condition_spread)

    # -- latents -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_rgba(self, rgba: Tensor) -> Tensor:
        """Latents (N, Z, h, w) of RGBA pictures (N, 4, H, W) in [0, 1]. Deterministic."""
        parts = split(rgba, self.config.ground)
        if not self.has_alpha:
            return self._encode(parts[0])
        return torch.cat([self._encode(part) for part in parts], 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_rgba(self, latents: Tensor, given: Mapping[int, Image.Image] | None = None) -> Tensor:
        """RGBA (N, 4, H, W) of latents (N, Z, h, w); opaque where the network knows no alpha.

        `given` says which of these frames of one clip are known: what decoding loses of them is put back (detail.py).
        """
        width = self.vae.config.latent_channels
        colour = self._decode(latents[:, :width])
        grey = self._decode(latents[:, width:]) if self.has_alpha else torch.ones_like(colour)
        parts = torch.cat([colour, grey], 1).float()
        if given:
            truth, known = torch.zeros_like(parts), torch.zeros(len(parts), dtype=torch.bool, device=parts.device)
            colour, grey = split(to_tensor(list(given.values())).to(parts), self.config.ground)
            truth[list(given)] = torch.cat([colour, grey if self.has_alpha else torch.ones_like(colour)], 1)
            known[list(given)] = True
            parts = restored(parts, truth, known)
        return join(parts[:, :3], parts[:, 3:], self.config.ground)

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D), padded to the tokenizer's own length, as in training."""
        ids = self.tokenizer(
            [self.maybe_convert_prompt(prompt, self.tokenizer) for prompt in prompts],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.text_encoder.device))[0]

    # -- call ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        frames: Mapping[int, Image.Image] | None = None,
        num_frames: int = 8,
        fps: float = 8.0,
        loop: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        image_guidance_scale: float = 1.5,
        negative_prompt: str = "",
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> StickerVideoOutput | tuple[Any]:
        """Draws a clip for each prompt. `fps` 0 means unknown; scales of 1 turn a guidance off.

        `frames` are fitted into height x width. Raises RequestError for an impossible count, size or index.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = dict(frames or {})
        height, width = height or self.default_side, width or self.default_side
        self._check(given, num_frames, fps, height, width, loop)
        device, batch = self._execution_device, len(prompts)
        pictures = {index: fitted(picture, (width, height)) for index, picture in given.items()}
        condition = self._condition(pictures, num_frames, fps, loop, (height, width), batch, device)
        noise = self._noise(batch, num_frames, (height, width), generator, device, latents)
        text = self.encode_text(prompts)
        unguided = self.encode_text([negative_prompt] * batch)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        known = condition.is_given[:, None, :, None, None]
        latents = noise * self.scheduler.init_noise_sigma
        options = _accepted_by(self.scheduler.step, eta=eta, generator=generator)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, moment in enumerate(self.scheduler.timesteps):
                # Given frames go along the path that ends in them, for the branch that is not told of them.
                path = self.scheduler.add_noise(condition.given, noise, moment.reshape(1))
                latents = torch.where(known, path, latents)
                x = self.scheduler.scale_model_input(latents, moment)
                output = self._guided(x, moment, text, unguided, condition, guidance_scale, image_guidance_scale)
                latents = self.scheduler.step(output.to(latents.dtype), moment, latents, **options).prev_sample
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, moment, {"latents": latents})
                    latents = changed.get("latents", latents)
                bar.update()
        latents = torch.where(known, condition.given, latents)
        self.maybe_free_model_hooks()
        clips: Any = latents if output_type == "latent" else self._pictures(latents, pictures)
        return StickerVideoOutput(frames=clips) if return_dict else (clips,)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def _guided(
        self,
        x: Tensor,
        moment: Tensor,
        text: Tensor,
        unguided: Tensor,
        condition: ClipCondition,
        text_scale: float,
        image_scale: float,
    ) -> Tensor:
        """e(0, 0) + s_i (e(image, 0) - e(0, 0)) + s_t (e(image, text) - e(image, 0)) (Brooks et al. 2023, eq. 3).

        Branches that a scale of 1 or the lack of given frames makes superfluous are not computed.
        """
        told = bool(condition.is_given.any())
        rows: list[tuple[Tensor, ClipCondition]] = [(text, condition)]
        if text_scale != 1 or (told and image_scale != 1):
            rows.append((unguided, condition))
        if told and image_scale != 1:
            rows.append((unguided, condition.without_pictures()))
        time = moment.reshape(1).expand(len(x))
        how, dtype = (self.config.condition_fill, self.anchor), self.unet.dtype
        outs = [predicted(self.unet, x.to(dtype), time, t.to(dtype), c, *how) for t, c in rows]
        if len(outs) == 1:
            return outs[0]
        guided = outs[1] + text_scale * (outs[0] - outs[1])
        if len(outs) == 3:
            guided = guided + (image_scale - 1) * (outs[1] - outs[2])
        return guided

    # -- parts ---------------------------------------------------------------------------------------------------

    def _check(self, given: Mapping[int, Any], count: int, fps: float, height: int, width: int, loop: bool) -> None:
        most = int(self.unet.config.get("max_frames") or 64)
        if not 1 <= count <= most:
            raise RequestError(f"a clip of {count} frames cannot be drawn", f"this network draws 1 to {most}")
        outside = next((index for index in given if not 0 <= index < count), None)
        if outside is not None:
            raise RequestError(
                f"frame {outside} is given, and a clip of {count} frames has 0 to {count - 1}",
                "count from 0, or ask for more frames",
            )
        if given and len(given) == count:
            raise RequestError(f"all {count} frames are given, so nothing is left to draw", "leave one out")
        if not 0 <= fps <= 120:
            raise RequestError(f"{fps} frames a second make no clip", "choose 1 to 60; 0 leaves it open")
        multiple = self.vae_scale_factor
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise RequestError(
                f"{width}x{height} cannot be drawn: sides must be multiples of {multiple}",
                f"the network's own size is {self.default_side}x{self.default_side}",
            )

    def _condition(
        self,
        pictures: Mapping[int, Image.Image],
        count: int,
        fps: float,
        loop: bool,
        size: tuple[int, int],
        batch: int,
        device: torch.device,
    ) -> ClipCondition:
        latent = [side // self.vae_scale_factor for side in size]
        given = torch.zeros(1, self.latent_channels, count, *latent, device=device, dtype=self.unet.dtype)
        known = torch.zeros(1, count, dtype=torch.bool, device=device)
        if pictures:
            encoded = self.encode_rgba(to_tensor(list(pictures.values()))).to(given)
            given[0][:, list(pictures)] = encoded.transpose(0, 1)
            known[0, list(pictures)] = True
        one = ClipCondition(
            given=given,
            is_given=known,
            valid=torch.ones_like(known),
            fps=torch.tensor([fps], device=device),
            loop=torch.tensor([loop], device=device),
        )
        return one.repeated(batch)

    def _noise(
        self,
        batch: int,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        latents: Tensor | None,
    ) -> Tensor:
        """Noise (B, Z, F, h, w), frame by frame, so that a longer clip begins with a shorter one's noise."""
        if latents is not None:
            return latents.to(device, self.unet.dtype)
        latent = [side // self.vae_scale_factor for side in size]
        each = generator if isinstance(generator, list) else [generator] * batch
        shape, share = (self.latent_channels, *latent), self.config.noise_share
        noise = [clip_noise(count, shape, share, g) for g in each]
        return torch.stack(noise).transpose(1, 2).to(device, self.unet.dtype)

    def _pictures(self, latents: Tensor, given: Mapping[int, Image.Image]) -> list[list[Image.Image]]:
        clips = [to_pictures(self.decode_rgba(clip.transpose(0, 1), given)) for clip in latents]
        return [[given.get(index, frame) for index, frame in enumerate(clip)] for clip in clips]


def latent_channels_of(unet: Any) -> int:
    """Z of a clip network: it predicts as many channels as a latent has."""
    config = unet.config
    return int(config["image_config"]["out_channels"] if "image_config" in config else config["out_channels"])


def _accepted_by(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known and value is not None}
