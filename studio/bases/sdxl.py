"""Stable Diffusion XL: two text encoders, and a UNet that is told sizes and crop (Podell et al. 2023, 2307.01952)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from studio.base import Condition
from studio.bases.latent_diffusion import LatentDiffusion, in_dtype_of
from studio.bases.stable_diffusion import UNET_GROUPS


class StableDiffusionXL(LatentDiffusion):
    family = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    groups: ClassVar = UNET_GROUPS

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """`text` (B, L, D1 + D2): the last hidden layer but one of both encoders; `pooled` (B, P): the second's.

        `time_ids` (B, 6): original height and width, top and left of the crop, target height and width. Pictures
        reach us already cut to `size`, so they count as uncropped ones.
        """
        first = self.pipe.text_encoder(self.token_ids(prompts), output_hidden_states=True)
        second = self.pipe.text_encoder_2(self.token_ids(prompts, "tokenizer_2"), output_hidden_states=True)
        width, height = size
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return {
            "text": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1),
            "pooled": second.text_embeds,
            "time_ids": ids.repeat(len(prompts), 1),
        }

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        parts = (condition[key] for key in ("text", "pooled", "time_ids"))
        noisy, text, pooled, time_ids = in_dtype_of(self.denoiser, noisy, *parts)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        time = time.to(noisy.device)
        return self.pipe.unet(noisy, time, encoder_hidden_states=text, added_cond_kwargs=added).sample

    @classmethod
    def tiny(cls, seed: int = 0) -> StableDiffusionXL:
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

        from studio.bases.tiny import NOISE, fixed_seed, tiny_clip, tiny_tokenizer, tiny_vae

        with fixed_seed(seed):
            tokenizer = tiny_tokenizer()
            encoders = tiny_clip(tokenizer), tiny_clip(tokenizer, width=40, projection=24)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=32 + 40,
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                norm_num_groups=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
            )
            pipe = StableDiffusionXLPipeline(
                vae=tiny_vae(force_upcast=True, scaling_factor=0.13025),
                text_encoder=encoders[0],
                text_encoder_2=encoders[1],
                tokenizer=tokenizer,
                tokenizer_2=tiny_tokenizer(),
                unet=unet,
                scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
                add_watermarker=False,
            )
        return cls.at_rest("tiny-sdxl", pipe, "Apache-2.0")
