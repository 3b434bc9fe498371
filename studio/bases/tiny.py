"""Parts of the pico models that tests build: seeds, tokenizers, text encoders, autoencoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

#: The noise schedule of Stable Diffusion 1.x, 2.x and XL.
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seeds torch's global stream inside, and leaves it outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """A `CLIPTokenizer` to which each of the words is one token; any other text falls apart into letters.

    The same words give the same tokenizer: its ids are what a text encoder's weights are learned for.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pairs(words)
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), *marks])}
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
    tokenizer.model_max_length = length
    return tokenizer


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a byte-pair encoding (Sennrich et al. 2016) that make each word whole.

    Our own, because the library's trainer breaks ties by the order of a hash table, which differs between processes.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(pieces, best) for pieces in spelled]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def tiny_tokenizer() -> Any:
    return word_tokenizer("a an the photo picture of cat dog red blue".split(), 16)


def tiny_clip(tokenizer: Any, width: int = 32, projection: int | None = None) -> Any:
    """A CLIP text encoder; given the width of a projection, of the class that has one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tiny_vae(latent_channels: int = 4, **options: Any) -> Any:
    """An f2 autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        latent_channels=latent_channels,
        **options,
    )


def tiny_t5(width: int = 80) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer, which knows single letters and a few words."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁photo", "▁of", "▁cat", "▁dog", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4, is_decoder=False
    )
    return T5EncoderModel(config), tokenizer
