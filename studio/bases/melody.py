"""The blueprint of the base `melody`: a MusicGen small enough for a laptop's CPU.

Stock classes of transformers: an EnCodec of 12 kHz mono with 50 frames a second and 4 codebooks of 256, a T5 encoder to
which every word of the melody world is one token, and a decoder of 4 layers; together 1.9 M parameters, 3.9 MB in fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from studio.bases.musicgen import MusicGen
from studio.bases.tiny import fixed_seed
from studio.data.melodies.fields import vocabulary

RATE_HZ = 12_000
STRIDES = (5, 4, 4, 3)  # 240 samples a frame
CODEBOOKS, CODES = 4, 256
WIDTH, TEXT_WIDTH = 128, 64


def build_melody(seed: int = 0) -> MusicGen:
    """The `melody` base with random weights."""
    from transformers import (
        EncodecConfig,
        GenerationConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    tokenizer = melody_tokenizer(vocabulary())
    text = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=4 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    codec = EncodecConfig(
        target_bandwidths=[1.6],  # kbit/s: 4 codebooks x 8 bits x 50 frames
        sampling_rate=RATE_HZ,
        upsampling_ratios=list(STRIDES),
        num_filters=8,
        hidden_size=32,
        codebook_size=CODES,
        num_lstm_layers=1,
        use_causal_conv=False,
        use_conv_shortcut=False,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=CODES,
        max_position_embeddings=408,  # 8 seconds: as far as it is trained
        num_hidden_layers=4,
        ffn_dim=3 * WIDTH,
        num_attention_heads=4,
        hidden_size=WIDTH,
        num_codebooks=CODEBOOKS,
        dropout=0.0,
        pad_token_id=CODES,
        bos_token_id=CODES,
    )
    with fixed_seed(seed):
        network: Any = MusicgenForConditionalGeneration(
            MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
        )
        _begin_strongly(network)
    network.generation_config = GenerationConfig(
        bos_token_id=CODES,
        pad_token_id=CODES,
        decoder_start_token_id=CODES,
        do_sample=True,
        top_k=CODES,
        guidance_scale=3.0,
        temperature=0.8,
        max_length=8 * RATE_HZ // 240 + CODEBOOKS,
    )
    return MusicGen.at_rest("melody", network, tokenizer, "Apache-2.0")


@torch.no_grad()
def _begin_strongly(network: Any) -> None:
    """Random weights that small networks learn from: transformers' 0.02 is for widths of a thousand.

    There the embeddings of codes are a thirtieth of the positions and a projection takes three quarters of its input
    away. After 90 steps of 8 pieces the loss was 5.37 nats so, 4.65 with these, and 3.92 at a learning rate of 3e-3 in
    place of 1e-3 (held-out pieces; blind guessing has 5.55; seed 0, an early codec).
    """
    for name, parameter in network.decoder.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.5)
        elif parameter.ndim == 2 and "lm_heads" not in name:
            quiet = 0.5 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
            parameter.normal_(0, quiet * parameter.shape[1] ** -0.5)
    network.enc_to_dec_proj.weight.normal_(0, TEXT_WIDTH**-0.5)


def melody_tokenizer(words: Sequence[str]) -> Any:
    """A `T5Tokenizer` to which each of the words is one token, with or without a capital; all else is letters."""
    from transformers import T5Tokenizer

    whole = [f"▁{form}" for word in words for form in dict.fromkeys((word, word.capitalize()))]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(piece, -1.0) for piece in whole] + [("▁", -10.0)]
    pieces += [(letter, -10.0) for letter in [*letters, *map(str, range(10)), ",", ".", "-"] if letter]
    return T5Tokenizer(vocab=list(dict.fromkeys(pieces)), extra_ids=0)


def speaks_of_melodies(base: Any) -> bool:
    """Whether the words of the melody world are words to a base, as to the bundled ones."""
    return len(base.pipe.tokenizer("makam hicaz").input_ids) == 3  # two words and the end
