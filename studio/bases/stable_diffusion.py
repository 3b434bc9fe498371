"""Stable Diffusion 1.x and 2.x: a UNet that looks at CLIP text (Rombach et al. 2022). Also the bundled `sticker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from studio.base import Condition
from studio.bases.latent_diffusion import ATTENTION, LatentDiffusion, in_dtype_of

UNET_GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": tuple(f"unet.{pattern}" for pattern in ATTENTION),
    "cross-attention": tuple(f"unet.{pattern.replace('attn?', 'attn2')}" for pattern in ATTENTION),
    "linear": ("unet.*:linear",),
    "conv": ("unet.*:conv*",),
    "text-encoder": ("text_encoder*.self_attn.*_proj",),
    "all": ("unet.*",),
}


class StableDiffusion(LatentDiffusion):
    family = "stable_diffusion"
    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    groups: ClassVar = UNET_GROUPS

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        return {"text": self.pipe.text_encoder(self.token_ids(prompts))[0]}

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        noisy, text = in_dtype_of(self.denoiser, noisy, condition["text"])
        return self.pipe.unet(noisy, time.to(noisy.device), encoder_hidden_states=text).sample

    @classmethod
    def tiny(cls, seed: int = 0) -> StableDiffusion:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

        from studio.bases.tiny import NOISE, fixed_seed, tiny_clip, tiny_tokenizer, tiny_vae

        with fixed_seed(seed):
            tokenizer = tiny_tokenizer()
            text_encoder = tiny_clip(tokenizer)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=4,
                norm_num_groups=4,
            )
            pipe = StableDiffusionPipeline(
                vae=tiny_vae(),
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                unet=unet,
                scheduler=DDIMScheduler(**NOISE, clip_sample=False),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        return cls.at_rest("tiny-sd", pipe, "Apache-2.0")
