"""The blueprint of the bundled base `sticker`: a Stable Diffusion pipeline small enough for a laptop's CPU.

Sizes were chosen by measurement (docs/bases/sticker.md): an f8 autoencoder with 8 latent channels, a UNet without
attention on its finest level, a word-level CLIP text encoder. The noise schedule ends in pure noise (Lin et al. 2024),
without which the colour of plain grounds leaks through the last step on a grid as small as 16 x 16.
"""

from __future__ import annotations

from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.tiny import fixed_seed, word_tokenizer
from studio.data.stickers import vocabulary

RESOLUTION = 128
TEXT_LENGTH = 32
TEXT_WIDTH = 128


def build_sticker(seed: int = 0) -> StableDiffusion:
    """The `sticker` pipeline with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(vocabulary(), TEXT_LENGTH)
    with fixed_seed(seed):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 8,
            in_channels=8,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        # Groups of at least 4 channels: one channel a group would be instance norm, which forgets absolute colour.
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 96, 96),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=RESOLUTION,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusion.at_rest("sticker", pipe, "Apache-2.0")
