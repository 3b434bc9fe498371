"""Learned words: vectors for new words of a prompt (textual inversion, Gal et al. 2022).

A word of V vectors becomes V tokens, named as diffusers does it: `word`, `word_1`, ... The base's tokenizer and
embedding matrix stay as they are: while attached, a copy of the tokenizer knows the word, and the embedding layer's
`forward` answers for the new ids. V vectors, D width of the text encoder, N old vocabulary size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.base import Base
from studio.errors import AdapterError, PresetError
from studio.keyed import torch_generator


def tokens_of(word: str, vectors: int) -> list[str]:
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def fresh_words(base: Base, word: str, class_word: str, vectors: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Start values by text encoder: the class word's vector, or a typical one, with a little noise."""
    if not hasattr(base.pipe, "maybe_convert_prompt"):
        raise PresetError(
            f"learned_words: family '{base.family}' cannot load textual inversions", "set learned_words=0"
        )
    words: dict[str, dict[str, Tensor]] = {}
    for encoder, tokenizer in encoders_of(base).items():
        matrix = base.components[encoder].get_input_embeddings().weight.detach().float()
        ids = tokenizer(class_word, add_special_tokens=False).input_ids if class_word else []
        start = matrix[ids].mean(0) if ids else matrix.mean(0)
        noise = torch.randn(vectors, matrix.shape[1], generator=torch_generator("word", seed, encoder, word))
        words[encoder] = {word: torch.nn.Parameter(start + 0.1 * matrix.std() * noise)}
    return words


def encoders_of(base: Base) -> dict[str, Any]:
    """Tokenizers by the name of their text encoder."""
    names = [name for name in base.text_encoder_names if name in base.components]
    return {name: getattr(base.pipe, name.replace("text_encoder", "tokenizer")) for name in names}


class WordAttachment:
    """Learned words while they are on a base; `detach` restores tokenizers and embedding layers."""

    def __init__(self, base: Base, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.base = base
        self.tokenizers: dict[str, Any] = {}
        self.layers: list[Any] = []
        for encoder, vectors in words.items():
            self._attach(encoder, vectors)

    def _attach(self, encoder: str, words: Mapping[str, Tensor]) -> None:
        name = encoder.replace("text_encoder", "tokenizer")
        if encoder not in self.base.components:
            raise AdapterError(f"the adapter has words for '{encoder}', which '{self.base.name}' has not")
        tokenizer = copy.deepcopy(getattr(self.base.pipe, name))
        layer = self.base.components[encoder].get_input_embeddings()
        for word, vectors in words.items():
            added = tokenizer.add_tokens(tokens_of(word, len(vectors)))
            if added != len(vectors):
                raise AdapterError(
                    f"the word '{word}' is already known to '{self.base.name}'", "choose another trigger"
                )
        self.tokenizers[name] = getattr(self.base.pipe, name)
        setattr(self.base.pipe, name, tokenizer)
        layer.forward = _forward_with(layer, list(words.values()))
        self.layers.append(layer)

    def detach(self) -> None:
        for name, tokenizer in self.tokenizers.items():
            setattr(self.base.pipe, name, tokenizer)
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        self.tokenizers, self.layers = {}, []


def _forward_with(layer: Any, words: list[Tensor]) -> Any:
    def forward(ids: Tensor) -> Tensor:
        weight = layer.weight
        old = weight.shape[0]
        known = F.embedding(ids.clamp(max=old - 1), weight)
        new = torch.cat([vectors.to(weight.device) for vectors in words]).to(weight.dtype)
        learned = F.embedding((ids - old).clamp(min=0), new)
        return torch.where((ids >= old)[..., None], learned, known)

    return forward
