"""Parts of the pico models that tests build: seeds and tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seeds torch's global stream inside, and leaves it outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """A `CLIPTokenizer` to which each of the words is one token; any other text falls apart into letters.

    A byte-pair encoding is trained on the words alone until each is whole, so it stays a stock tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=30_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    letters.train_from_iterator(sorted(words), trainer)
    import json

    learned = json.loads(letters.to_str())["model"]["merges"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    known = set(tokens)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
    vocabulary = {token: index for index, token in enumerate([*tokens, *marks])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.model_max_length = length
    return tokenizer


def tiny_tokenizer() -> Any:
    return word_tokenizer("a an the photo picture of cat dog red blue".split(), 16)
