"""Stable Diffusion 3 and 3.5: a transformer over pictures and text alike, trained by flow matching (Esser et al. 2024).

T5 is a third text encoder that people often leave out for its size; then zeros stand in for it, as they always do for a
checkpoint of one file, which brings no tokenizer. No method patches T5, and it is no part of the identity: an adapter
made with it works without it and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.base import Condition
from studio.bases.latent_diffusion import LatentDiffusion, in_dtype_of, pad_tokens

T5_LENGTH = 256  # the pipeline's own default
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # of the picture
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # of the text
)


class StableDiffusion3(LatentDiffusion):
    family = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    groups: ClassVar = {
        "attention": tuple(f"transformer.transformer_blocks.*.attn*.{name}" for name in PROJECTIONS),
        "linear": ("transformer.*:linear",),
        "conv": ("transformer.*:conv*",),
        "text-encoder": ("text_encoder*.self_attn.*_proj",),
        "all": ("transformer.*",),
    }

    @property
    def size_multiple(self) -> int:
        return self.latent_factor * int(self.pipe.transformer.config.patch_size)

    @property
    def largest_side(self) -> int:
        """The transformer's positions end there."""
        return self.size_multiple * int(self.pipe.transformer.config.pos_embed_max_size)

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """`text` (B, L + 256, D): both CLIPs side by side, then T5 after them; `pooled` (B, P): both CLIPs'."""
        ids = self.token_ids(prompts), self.token_ids(prompts, "tokenizer_2")
        first = self.pipe.text_encoder(ids[0], output_hidden_states=True)
        second = self.pipe.text_encoder_2(ids[1], output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        t5 = self._encode_by_t5(prompts).to(clip.dtype)
        return {
            "text": torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1),
            "pooled": torch.cat([first.text_embeds, second.text_embeds], -1),
        }

    def _encode_by_t5(self, prompts: Sequence[str]) -> Tensor:
        if self.pipe.text_encoder_3 is None:
            width = self.pipe.transformer.config.joint_attention_dim
            return torch.zeros(len(prompts), T5_LENGTH, width, device=self.device)
        ids = pad_tokens(self.pipe.tokenizer_3, prompts, T5_LENGTH)
        return self.pipe.text_encoder_3(ids.to(self.device))[0]

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        noisy, text, pooled = in_dtype_of(self.denoiser, noisy, condition["text"], condition["pooled"])
        return self.pipe.transformer(
            noisy, timestep=time.to(noisy.device), encoder_hidden_states=text, pooled_projections=pooled
        ).sample

    @classmethod
    def tiny(cls, seed: int = 0) -> StableDiffusion3:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

        from studio.bases.tiny import fixed_seed, tiny_clip, tiny_t5, tiny_tokenizer, tiny_vae

        with fixed_seed(seed):
            encoders = [tiny_clip(tiny_tokenizer(), width, projection=width) for width in (32, 40)]
            t5, t5_tokenizer = tiny_t5(width=80)
            transformer = SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=8,
                out_channels=8,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=80,
                caption_projection_dim=32,
                pooled_projection_dim=32 + 40,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),  # as in 3.5 medium
                qk_norm="rms_norm",
            )
            pipe = StableDiffusion3Pipeline(
                transformer=transformer,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=tiny_vae(
                    8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
                ),
                text_encoder=encoders[0],
                tokenizer=tiny_tokenizer(),
                text_encoder_2=encoders[1],
                tokenizer_2=tiny_tokenizer(),
                text_encoder_3=t5,
                tokenizer_3=t5_tokenizer,
            )
        return cls.at_rest("tiny-sd3", pipe, "Apache-2.0")
