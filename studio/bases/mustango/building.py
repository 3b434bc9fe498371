"""Mustango in three sizes: as published, small enough to be shipped, and pico for tests. The classes are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from studio.bases.mustango.family import Mustango
from studio.bases.tiny import NOISE, fixed_seed, tiny_t5

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

#: The noise schedule of Stable Diffusion 2.1, which Mustango names; its makers have taken that repository away.
SCHEDULE: dict[str, Any] = {**NOISE, "clip_sample": False, "prediction_type": "v_prediction"}

# -- as published ------------------------------------------------------------------------------------------------------

MUNET: dict[str, Any] = {
    "sample_size": (256, 16),
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 8,
    "norm_num_groups": 32,
    "scaling_factor": 0.9227914214134216,
}
HIFIGAN: dict[str, Any] = {
    "model_in_dim": 64,
    "sampling_rate": 16000,
    "upsample_initial_channel": 1024,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "normalize_before": False,
}
FLAN_T5_LARGE: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
DEBERTA_V3_LARGE: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}

# -- small -------------------------------------------------------------------------------------------------------------

SMALL_MEL: dict[str, Any] = {
    "sample_rate_hz": 8000,
    "fft": 768,
    "hop": 128,
    "bands": 80,
    "highest_hz": 4000.0,
    "scale": "htk",  # else partials of a bass are less than two bands apart
}
#: No attention on the finest level, of 1280 places: a training step of 4 clips takes 0.3 to 0.5 s of a core so,
#: else five times that.
SMALL_MUNET: dict[str, Any] = {
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "sample_size": (64, 20),
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (32, 40, 40),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 4,
}
WORDS_LOUDER = 8.0
SMALL_T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

# -- pico --------------------------------------------------------------------------------------------------------------

PICO_MEL: dict[str, Any] = {"sample_rate_hz": 1600, "fft": 64, "hop": 16, "bands": 8, "highest_hz": 800.0}
PICO_MUNET: dict[str, Any] = {
    "sample_size": (32, 4),
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
PICO_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}
PICO_HIFIGAN: dict[str, Any] = {
    "model_in_dim": 8,
    "sampling_rate": 1600,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "normalize_before": False,
}


# -- networks ----------------------------------------------------------------------------------------------------------


def munet(settings: Mapping[str, Any]) -> Any:
    """A MuNet with attention on every level but the coarsest, as the published one has it, if nothing else is said."""
    from studio.bases.mustango.network import MuNet

    levels = len(settings["block_out_channels"])
    downs = (CROSS,) * (levels - 1) + (PLAIN,)
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(downs))
    return MuNet(**{"down_block_types": downs, "up_block_types": ups, **settings})


def mel_vae(settings: Mapping[str, Any]) -> Any:
    """An autoencoder of spectrograms, pictures of one channel."""
    from diffusers import AutoencoderKL

    levels = len(settings["block_out_channels"])
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **settings,
    )


def hifigan(settings: Mapping[str, Any]) -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(**settings))


def t5_encoder(settings: Mapping[str, Any]) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**{**settings, "is_decoder": False, "use_cache": False}))


def assembled(
    name: str,
    networks: Mapping[str, Any],
    mel: Mapping[str, Any],
    clip_frames: int,
    licence: str,
    beat_counts: int = 7,
    scheduler: Any = None,
    **options: Any,
) -> Mustango:
    """A base of these networks, by their names in the pipeline; the encoders of beats and chords are made to fit.

    `options` are those of the pipeline.
    """
    from diffusers import DDPMScheduler

    from studio.bases.mustango.encoders import BeatEncoder, ChordEncoder
    from studio.bases.mustango.pipeline import MustangoPipeline

    width = networks["unet"].config.cross_attention_dim
    pipe = MustangoPipeline(
        **{"beat_encoder": BeatEncoder(width, counts=beat_counts), "chord_encoder": ChordEncoder(width), **networks},
        scheduler=scheduler or DDPMScheduler(num_train_timesteps=1000, **SCHEDULE),
        mel=dict(mel),
        clip_frames=clip_frames,
        **options,
    )
    return Mustango.at_rest(name, pipe, licence)


# -- sizes -------------------------------------------------------------------------------------------------------------


def pico(seed: int = 0) -> Mustango:
    """A random Mustango for tests, of clips of 1.28 seconds at 1.6 kHz."""
    with fixed_seed(seed):
        text_encoder, tokenizer = tiny_t5(width=16)
        networks = {
            "unet": munet(PICO_MUNET),
            "vae": mel_vae(PICO_VAE),
            "vocoder": hifigan(PICO_HIFIGAN),
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        return assembled("tiny-mustango", networks, PICO_MEL, 128, "Apache-2.0")


def melody_diffusion(words: Sequence[str], seed: int = 0) -> Mustango:
    """The blueprint of the bundled base `melody-diffusion`: random, of clips of 4.1 seconds at 8 kHz.

    `words` are those of its captions. It has no vocoder, which would be weights. Its noise ends in pure noise and
    is sampled in few steps, as for the base `sticker`.
    """
    from diffusers import DDIMScheduler

    with fixed_seed(seed):
        tokenizer = word_t5_tokenizer(words)
        networks = {
            "unet": munet(SMALL_MUNET),
            "vae": mel_vae(SMALL_VAE),
            "text_encoder": t5_encoder({**SMALL_T5, "vocab_size": len(tokenizer)}),
            "tokenizer": tokenizer,
        }
        last = networks["vae"].decoder.conv_out  # log magnitudes are about -6, which steps of 1e-3 are long to reach
        torch.nn.init.constant_(last.bias, -6.0)
        # One word among a dozen is faint and attention even, where the text encoder is not one that was taught to read.
        torch.nn.init.constant_(networks["text_encoder"].encoder.final_layer_norm.weight, WORDS_LOUDER)
        scheduler = DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        told: dict[str, Any] = {"beat_counts": 18, "scheduler": scheduler, "steps": 25, "lower_case": True}
        return assembled("melody-diffusion", networks, SMALL_MEL, 256, "Apache-2.0", **told)


def word_t5_tokenizer(words: Sequence[str], longest: int = 64) -> Any:
    """A `T5Tokenizer` to which each of the words is one token; any other text falls apart into letters."""
    from transformers import T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,.'"
    known = [f"▁{word}" for word in sorted(set(words))]
    pieces = ["<pad>", "</s>", "<unk>", *known, "▁", *letters]
    scores = [0.0] * 3 + [-1.0] * len(known) + [-10.0] * (1 + len(letters))
    tokenizer: Any = T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0)
    tokenizer.model_max_length = longest
    return tokenizer


def published(with_predictors: bool = True) -> dict[str, Any]:
    """The networks of the published Mustango without weights (meta device), by their names in the pipeline."""
    from transformers import DebertaV2Config, T5Config, T5ForConditionalGeneration

    from studio.bases.mustango.encoders import BeatEncoder, ChordEncoder
    from studio.bases.mustango.predictors import BeatPredictor

    with torch.device("meta"):
        networks = {
            "unet": munet(MUNET),
            "beat_encoder": BeatEncoder(),
            "chord_encoder": ChordEncoder(),
            "text_encoder": t5_encoder(FLAN_T5_LARGE),
            "vae": mel_vae(VAE),
            "vocoder": hifigan(HIFIGAN),
        }
        if with_predictors:
            networks["beat_predictor"] = BeatPredictor(DebertaV2Config(**DEBERTA_V3_LARGE))
            networks["chord_predictor"] = untied(T5ForConditionalGeneration(T5Config(**FLAN_T5_LARGE)))
    return networks


def untied(network: Any) -> Any:
    """A T5 with an output layer of its own, as FLAN-T5 has it. transformers 5 ties it until weights are there."""
    network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.shared.weight), requires_grad=False)
    return network
