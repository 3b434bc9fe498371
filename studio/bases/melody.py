"""The blueprint of the base `melody`: a MusicGen small enough for a laptop's CPU.

Stock classes of transformers: an EnCodec of 12 kHz mono with 50 frames a second and 4 codebooks of 256, a T5 encoder to
which every word of the melody world is one token, and a decoder of 4 layers; together 2 M parameters, 4 MB in fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        max_position_embeddings=1024,
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
    network.generation_config = GenerationConfig(
        bos_token_id=CODES,
        pad_token_id=CODES,
        decoder_start_token_id=CODES,
        do_sample=True,
        top_k=CODES,
        guidance_scale=3.0,
        max_length=8 * RATE_HZ // 240 + CODEBOOKS,
    )
    return MusicGen.at_rest("melody", network, tokenizer, "Apache-2.0")


def melody_tokenizer(words: Sequence[str]) -> Any:
    """A `T5Tokenizer` to which each of the words is one token, with or without a capital; all else is letters."""
    from transformers import T5Tokenizer

    whole = [f"▁{form}" for word in words for form in dict.fromkeys((word, word.capitalize()))]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(piece, -1.0) for piece in whole] + [("▁", -10.0)]
    pieces += [(letter, -10.0) for letter in [*letters, *map(str, range(10)), ",", ".", "-"] if letter]
    return T5Tokenizer(vocab=list(dict.fromkeys(pieces)), extra_ids=0)
