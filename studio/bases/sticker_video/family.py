"""The family of animated stickers: an image base whose UNet has learnt to see several frames at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from studio.adapter import Adapter
from studio.base import Condition, Request, depends_on_values
from studio.bases.folder import refuse_random_parts, shared_in
from studio.bases.latent_diffusion import ATTENTION, LatentDiffusion
from studio.data.clips import Clip
from studio.errors import AdapterError, BaseError, RequestError
from studio.patch import Patch

INSIDE = "unet.image."  # the image network within the clip network
SPATIAL = f"{INSIDE}*"


class StickerVideo(LatentDiffusion):
    """`encode_pictures` is that of stills in colour; clips with alpha go through `encode_clips`."""

    shares_with = ""  # the bundled image base whose weights are not written again where they are still the same

    family = "sticker_video"
    medium = "video"
    pipeline_class = "StickerVideoPipeline"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": tuple(f"unet.{pattern}" for pattern in ATTENTION),
        "cross-attention": tuple(f"{SPATIAL}{pattern[1:].replace('attn?', 'attn2')}" for pattern in ATTENTION),
        "spatial": (SPATIAL,),
        "temporal": ("unet.*_time.*",),
        "linear": ("unet.*:linear",),
        "conv": ("unet.*:conv*",),
        "text-encoder": ("text_encoder*.self_attn.*_proj",),
        "all": ("unet.*",),
    }

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, dtype: torch.dtype, licence: str = "", variant: str | None = None
    ) -> Self:
        from studio.bases.sticker_video.pipeline import StickerVideoPipeline
        from studio.bases.sticker_video.sharing import load_shared_parts

        lender = shared_in(folder)["base"]
        shared = load_shared_parts(folder, _bundled(lender, folder), dtype) if lender else {}
        pipe = StickerVideoPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant, **shared
        )
        read = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module) and k not in shared}
        refuse_random_parts(folder, read)
        base = cls.at_rest(name, pipe, licence)
        base.shares_with = lender
        return base

    @classmethod
    def tiny(cls, seed: int = 0) -> StickerVideo:
        from studio.bases.stable_diffusion import StableDiffusion
        from studio.bases.sticker_video.building import video_around

        return video_around(StableDiffusion.tiny(seed), "tiny-sticker-video", seed, interaction_head_dim=4)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def resolution(self) -> int:
        return int(self.pipe.default_side)

    @property
    def size_multiple(self) -> int:
        return self.latent_factor

    @property
    def max_frames(self) -> int:
        """The most frames that a clip can have."""
        return int(self.denoiser.config.get("max_frames") or 64)

    # -- adapters of pictures ------------------------------------------------------------------------------------

    def worn(self, adapter: Adapter) -> tuple[dict[str, list[Patch]], list[str]]:
        """Also adapters of the image base inside: each frame then is changed as a picture is.

        The first and the last layer have more channels here, so changes of those are left off, with a warning.
        """
        from studio.bases.sticker_video.network import ENDS

        identity = adapter.card.base
        if identity.family == self.family:
            return super().worn(adapter)
        sites = self.sites()
        places = {name: _inside(name) for name in adapter.by_site()}
        lost = sorted(name for name, place in places.items() if place.removeprefix(INSIDE) in ENDS)
        kept = {place: adapter.by_site()[name] for name, place in places.items() if name not in lost}
        shapes = {place: adapter.card.sites[name] for name, place in places.items() if name not in lost}
        if not kept or any(place not in sites or sites[place].shape != shape for place, shape in shapes.items()):
            raise AdapterError(
                f"the adapter was made for '{identity.name}' ({identity.family}), and the pictures inside "
                f"'{self.name}' are drawn by another network",
                f"use --base {identity.name}",
            )
        if depends_on_values(kept):
            raise AdapterError(
                f"the adapter depends on the very weights of '{identity.name}', so '{self.name}' cannot wear it",
                f"use --base {identity.name}",
            )
        warning = f"left off: {', '.join(lost)}, which have more channels in '{self.name}'"
        return kept, [warning] if lost else []

    # -- clips ---------------------------------------------------------------------------------------------------

    def encode_clips(self, rgba: Tensor) -> Tensor:
        """Latents (F, Z, h, w) of the frames of a clip, RGBA (F, 4, H, W) in [0, 1]. Deterministic."""
        return self.pipe.encode_rgba(rgba.to(self.device))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1], on the ground, of latents (N, Z, h, w)."""
        return super().decode_latents(latents[:, : self.pipe.vae.config.latent_channels])

    # -- training ------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        return {"text": self.pipe.encode_text(prompts)}

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """For noisy latents (B, Z, F, h, w); beside `text`, the condition may hold the tensors of a ClipCondition."""
        from studio.bases.sticker_video.conditioning import predicted

        dtype = self.denoiser.dtype
        return predicted(
            self.denoiser,
            noisy.to(self.device, dtype),
            time.to(self.device),
            condition["text"].to(self.device, dtype),
            clip_condition(condition, noisy, self.device),
            self.pipe.config.condition_fill,
            self.pipe.anchor,
        )

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_batch(self, request: Request) -> list[Any]:
        """Clips, one per prompt."""
        options: dict[str, Any] = {}
        wanted = {
            "num_inference_steps": request.steps,
            "guidance_scale": self.guidance if request.guidance is None else request.guidance,
            "image_guidance_scale": request.image_guidance,
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
            "fps": request.fps,
        }
        options |= {name: value for name, value in wanted.items() if value is not None}
        if request.on_step is not None or request.on_preview is not None:
            options["callback_on_step_end"] = self._reporting(replace(request, on_preview=None))
        clips = self.pipe(
            list(request.prompts),
            frames=request.given,
            loop=request.loop,
            negative_prompt=request.negative,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            **options,
        ).frames
        fps = request.fps or 8.0
        return [Clip.at_rate(frames, fps, request.loop) for frames in clips]


def _inside(site: str) -> str:
    """Where a site of an image base is in a clip base."""
    return INSIDE + site.removeprefix("unet.") if site.startswith("unet.") else site


def _bundled(lender: str, folder: Path) -> Path:
    from studio.bases.registry import bundled

    found = bundled().get(lender)
    if found is None:
        raise BaseError(
            f"'{folder}' shares weights with the base '{lender}', which is not bundled here",
            f"bundled are {', '.join(bundled())}; get an export of the whole base",
        )
    return found


def clip_condition(condition: Condition, noisy: Tensor, device: torch.device) -> Any:
    """The ClipCondition in a batch's condition; where nothing is said, no frame is given and every frame is valid."""
    from studio.bases.sticker_video.conditioning import ClipCondition

    if noisy.ndim != 5:
        raise RequestError(f"a clip network takes latents of five axes, not {noisy.ndim}")
    batch, _, count = noisy.shape[:3]
    usual = {
        "given": torch.zeros_like(noisy),
        "is_given": torch.zeros(batch, count, dtype=torch.bool),
        "valid": torch.ones(batch, count, dtype=torch.bool),
        "fps": torch.zeros(batch),
        "loop": torch.zeros(batch, dtype=torch.bool),
    }
    return ClipCondition(**{name: condition.get(name, value).to(device) for name, value in usual.items()})
