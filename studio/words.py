"""Learned words: vectors for new words of a prompt (textual inversion, Gal et al. 2022; by layer, Voynov et al. 2023).

A word of V vectors becomes V tokens, named as diffusers does it: `word`, `word_1`, ... The base's tokenizer and
embedding matrix stay as they are: while attached, a copy of the tokenizer knows the word, and the embedding layer's
`forward` answers for the new ids.

A layer-wise word has vectors of its own for each cross-attention layer ("P+: Extended Textual Conditioning"; the pair
`<random> <class>` of ED-LoRA, Gu et al. 2023). While one is attached, the text encoder reads a prompt that has it once
per layer and returns the L readings side by side, (B, T, L D) in place of (B, T, D), and each cross-attention layer
cuts its own out. So the condition is still one tensor: batches, guidance and gradient checkpointing need not know.

V vectors, L cross-attention layers, D width of the text encoder, N old vocabulary size, T tokens, K new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.base import Base
from studio.errors import AdapterError, PresetError
from studio.keyed import torch_generator

PAIR = 2  # a layer-wise word's vectors where nothing else is asked for: <random> <class>
RANDOM_START = 0.013  # Mix-of-Show's standard deviation for <random>, that of CLIP's own vectors


def tokens_of(word: str, vectors: int) -> list[str]:
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def token_count(vectors: Tensor) -> int:
    """V, of a plain word (V, D) or a layer-wise one (L, V, D)."""
    return vectors.shape[-2]


# -- start values --------------------------------------------------------------------------------------------------


def fresh_words(base: Base, word: str, class_word: str, vectors: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Start values by text encoder: the class word's vector, or a typical one, with a little noise."""
    if not hasattr(base.pipe, "maybe_convert_prompt"):
        raise PresetError(
            f"learned_words: family '{base.family}' cannot load textual inversions", "set learned_words=0"
        )
    words: dict[str, dict[str, Tensor]] = {}
    for encoder in encoders_of(base):
        matrix, start = _matrix(base, encoder), _class_vector(base, encoder, class_word)
        noise = torch.randn(vectors, matrix.shape[1], generator=torch_generator("word", seed, encoder, word))
        words[encoder] = {word: torch.nn.Parameter(start + 0.1 * matrix.std() * noise)}
    return words


def layerwise_words(base: Base, word: str, class_word: str, vectors: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Start values (L, V, D), the same for all layers: random vectors, the last of them the class word's.

    Raises PresetError for a base whose cross-attention does not look at one text encoder's output as it is.
    """
    layers = len(cross_attention(base))
    if not layers:
        raise PresetError(
            f"learned_words_layerwise: '{base.name}' ({base.family}) has no cross-attention layers that look at one "
            "text encoder alone",
            "set learned_words_layerwise=false, or take a base of Stable Diffusion 1 or 2",
        )
    (encoder,) = encoders_of(base)
    width = _matrix(base, encoder).shape[1]
    start = RANDOM_START * torch.randn(vectors, width, generator=torch_generator("word", seed, encoder, word))
    if class_word:
        start[-1] = _class_vector(base, encoder, class_word)
    return {encoder: {word: torch.nn.Parameter(start.repeat(layers, 1, 1))}}


def _matrix(base: Base, encoder: str) -> Tensor:
    matrix: Tensor = base.components[encoder].get_input_embeddings().weight.detach().float().cpu()
    return matrix


def _class_vector(base: Base, encoder: str, class_word: str) -> Tensor:
    """The mean of the word's vectors, or of all there are."""
    ids = encoders_of(base)[encoder](class_word, add_special_tokens=False).input_ids if class_word else []
    matrix = _matrix(base, encoder)
    return matrix[ids].mean(0) if ids else matrix.mean(0)


def encoders_of(base: Base) -> dict[str, Any]:
    """Tokenizers by the name of their text encoder."""
    names = [name for name in base.text_encoder_names if name in base.components]
    return {name: getattr(base.pipe, name.replace("text_encoder", "tokenizer")) for name in names}


def cross_attention(base: Base) -> list[Any]:
    """The cross-attention layers of a UNet in the order down, middle, up; none for a base that is built otherwise."""
    encoders = [base.components[name] for name in encoders_of(base)]
    if len(encoders) != 1:
        return []
    parts = [getattr(base.denoiser, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    found = [m for part in parts if part is not None for name, m in part.named_modules() if name.endswith("attn2")]
    width = encoders[0].get_input_embeddings().weight.shape[1]
    return found if all(getattr(layer, "cross_attention_dim", None) == width for layer in found) else []


# -- on a base -----------------------------------------------------------------------------------------------------


class WordAttachment:
    """Learned words while they are on a base; `detach` restores tokenizers, text encoders and attention layers.

    Raises AdapterError for words that the base knows already or cannot take; then nothing is attached.
    """

    def __init__(self, base: Base, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.base = base
        self.tokenizers: dict[str, Any] = {}
        self.covered: list[tuple[Any, Any]] = []  # modules, and the `forward` that they had of their own
        self.hooks: list[Any] = []
        tokenizers = {encoder: self._tokenizer_with(encoder, own) for encoder, own in words.items()}
        layers = {encoder: self._layers(own) for encoder, own in words.items()}
        for encoder, vectors in words.items():
            self._attach(encoder, list(vectors.values()), tokenizers[encoder], layers[encoder])

    def _tokenizer_with(self, encoder: str, words: Mapping[str, Tensor]) -> Any:
        """A copy of the encoder's tokenizer that knows the words too."""
        if encoder not in self.base.components:
            raise AdapterError(f"the adapter has words for '{encoder}', which '{self.base.name}' has not")
        tokenizer = copy.deepcopy(encoders_of(self.base)[encoder])
        for word, vectors in words.items():
            if tokenizer.add_tokens(tokens_of(word, token_count(vectors))) != token_count(vectors):
                raise AdapterError(
                    f"the word '{word}' is already known to '{self.base.name}'", "choose another trigger"
                )
        return tokenizer

    def _layers(self, words: Mapping[str, Tensor]) -> list[Any]:
        """The attention layers that layer-wise words are for; none if all words are plain."""
        layerwise = {word: vectors for word, vectors in words.items() if vectors.ndim == 3}
        layers = cross_attention(self.base) if layerwise else []
        for word, vectors in layerwise.items():
            if len(vectors) != len(layers):
                raise AdapterError(
                    f"the word '{word}' has vectors for {len(vectors)} cross-attention layers, and '{self.base.name}' "
                    f"has {len(layers)} that look at one text encoder"
                )
        return layers

    def _attach(self, encoder: str, words: list[Tensor], tokenizer: Any, layers: list[Any]) -> None:
        name = encoder.replace("text_encoder", "tokenizer")
        self.tokenizers[name] = getattr(self.base.pipe, name)
        setattr(self.base.pipe, name, tokenizer)
        network = self.base.components[encoder]
        embedding = network.get_input_embeddings()
        self._cover(embedding, _forward_with(embedding, words, max(1, len(layers))))
        if layers:
            tokens = sum(map(token_count, words))
            self._cover(network, _reading_per_layer(network.forward, embedding.weight.shape[0], tokens, len(layers)))
            hooks = [layer.register_forward_pre_hook(own_part(i), with_kwargs=True) for i, layer in enumerate(layers)]
            self.hooks += hooks

    def _cover(self, module: Any, forward: Any) -> None:
        self.covered.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def detach(self) -> None:
        for name, tokenizer in self.tokenizers.items():
            setattr(self.base.pipe, name, tokenizer)
        for module, forward in reversed(self.covered):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
        for hook in self.hooks:
            hook.remove()
        self.tokenizers, self.covered, self.hooks = {}, [], []


def _forward_with(layer: Any, words: list[Tensor], layers: int) -> Callable[[Tensor], Tensor]:
    """Ids from N on are rows of the new table, (L K, D): the K new tokens for the first layer, for the second, ..."""

    def forward(ids: Tensor) -> Tensor:
        weight = layer.weight
        old = weight.shape[0]
        known = F.embedding(ids.clamp(max=old - 1), weight)
        by_layer = [v if v.ndim == 3 else v.expand(layers, *v.shape) for v in (w.to(weight) for w in words)]
        learned = F.embedding((ids - old).clamp(min=0), torch.cat(by_layer, 1).flatten(0, 1))
        return torch.where((ids >= old)[..., None], learned, known)

    return forward


def _reading_per_layer(read: Callable[..., Any], old: int, tokens: int, layers: int) -> Callable[..., Any]:
    """A text encoder's `forward` whose hidden states (B, T, L D) hold L readings of each prompt.

    A batch without new words is read once, and that reading repeated.
    """

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if not bool((input_ids >= old).any()):
            return _mapped(
                read(input_ids=input_ids, attention_mask=attention_mask, **options),
                lambda states: states.repeat(1, 1, layers),
            )
        shift = tokens * torch.arange(layers, device=input_ids.device)[None, :, None]
        ids = torch.where((input_ids >= old)[:, None], input_ids[:, None] + shift, input_ids[:, None])
        mask = None if attention_mask is None else attention_mask.repeat_interleave(layers, 0)
        return _mapped(read(input_ids=ids.flatten(0, 1), attention_mask=mask, **options), side_by_side, layers)

    def side_by_side(states: Tensor) -> Tensor:
        return states.unflatten(0, (-1, layers)).transpose(1, 2).flatten(2)

    return forward


def _mapped(output: Any, change: Callable[[Tensor], Tensor], readings: int = 1) -> Any:
    """A text encoder's output with its hidden states changed; of what is pooled, the first reading's."""
    for key, value in output.items():
        if isinstance(value, tuple):
            output[key] = tuple(map(change, value))
        else:
            output[key] = change(value) if value.ndim == 3 else value[::readings]
    return output


def own_part(index: int) -> Callable[..., Any]:
    """A hook that gives an attention layer the part of the condition that is its own; (B, T, D) is everybody's."""

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, width = kwargs["encoder_hidden_states"], layer.cross_attention_dim
        if states.shape[-1] != width:
            kwargs = {**kwargs, "encoder_hidden_states": states[..., index * width : (index + 1) * width]}
        return args, kwargs

    return hook
