"""Stable Diffusion 1.x and 2.x: a UNet that looks at CLIP text (Rombach et al. 2022). Also the bundled `sticker`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio.base import Condition
from studio.bases.latent_diffusion import ATTENTION, LatentDiffusion, pad_tokens


class StableDiffusion(LatentDiffusion):
    family = "stable_diffusion"
    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    groups: ClassVar = {
        "attention": tuple(f"unet.{pattern}" for pattern in ATTENTION),
        "cross-attention": tuple(f"unet.{pattern.replace('attn?', 'attn2')}" for pattern in ATTENTION),
        "linear": ("unet.*.attn?.to_*", "unet.*.ff.net.*", "unet.*.proj_in", "unet.*.proj_out", "unet.*time_emb*"),
        "conv": (
            "unet.*conv1",
            "unet.*conv2",
            "unet.*conv_shortcut",
            "unet.*sampler*.conv",
            "unet.conv_in",
            "unet.conv_out",
        ),
        "text-encoder": ("text_encoder.*self_attn.*_proj",),
        "all": ("unet.*",),
    }

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        ids = pad_tokens(self.pipe.tokenizer, prompts).to(self.device)
        return {"text": self.pipe.text_encoder(ids)[0]}

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text = condition["text"]
        return self.pipe.unet(noisy, time.to(noisy.device), encoder_hidden_states=text).sample

    @classmethod
    def tiny(cls, seed: int = 0) -> StableDiffusion:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        from studio.bases.tiny import fixed_seed, tiny_tokenizer

        with fixed_seed(seed):
            tokenizer = tiny_tokenizer()
            config = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
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
            vae = AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                sample_size=16,
            )
            pipe = StableDiffusionPipeline(
                vae=vae,
                text_encoder=CLIPTextModel(config),
                tokenizer=tokenizer,
                unet=unet,
                scheduler=DDIMScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        return cls("tiny-sd", _eval(pipe), "Apache-2.0")


def _eval(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe
