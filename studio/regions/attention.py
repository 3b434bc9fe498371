"""Attention that knows of regions, and the hooks that tell the canvas where the network is.

Cross-attention: every place asks the text of each part, and takes the answers by its masks,

    o(p) = sum_i m_i(p) softmax(q(p) K_i^T) V_i

K_i and V_i with the change of part i only (layers.py). Self-attention: a bias keeps regions apart in the first steps.
B batch, N parts, H heads, T tokens of the picture, L of one text, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.base import Base
from studio.errors import RequestError
from studio.regions.canvas import Canvas
from studio.words import cross_attention, own_part


class RegionAttention:
    """diffusers' own attention (`AttnProcessor2_0`) for layers without norms inside, with masks."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        query = _heads(attn.to_q(hidden_states), attn.heads)
        if encoder_hidden_states is None:
            key, value = (_heads(project(hidden_states), attn.heads) for project in (attn.to_k, attn.to_v))
            answer = F.scaled_dot_product_attention(query, key, value, attn_mask=self.canvas.bias(query))
        else:
            answer = self._by_part(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        joined = answer.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](joined))

    def _by_part(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, H, T, D) from queries of that shape, and keys and values (B, N L, H D) of all texts."""
        parts, heads = len(self.canvas.masks), query.shape[1]
        key, value = (_heads(text.reshape(len(query) * parts, -1, text.shape[-1]), heads) for text in (keys, values))
        answers = F.scaled_dot_product_attention(query.repeat_interleave(parts, 0), key, value)
        masks = self.canvas.of_tokens(query)[:, None, :, None]
        return (answers.unflatten(0, (-1, parts)) * masks).sum(1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_layers(base: Base) -> list[Any]:
    """The attention layers of a UNet that we know. Raises RequestError for any other network."""
    from diffusers.models.attention_processor import Attention

    layers = [module for module in base.denoiser.modules() if isinstance(module, Attention)]
    if type(base.denoiser).__name__ != "UNet2DConditionModel" or not all(map(_plain, layers)):
        raise RequestError(
            f"'{base.name}' ({base.family}) cannot draw regions: they are for networks in which pictures look at texts "
            "in layers of their own",
            "take a base of Stable Diffusion 1, 2 or XL; see 'studio bases'",
        )
    return layers


def _plain(layer: Any) -> bool:
    """Whether a layer is what RegionAttention computes."""
    odd = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "residual_connection")
    return layer.rescale_output_factor == 1 and not any(getattr(layer, name, None) for name in odd)


def text_readers(layers: list[Any]) -> set[Any]:
    """The projections whose tokens are those of the texts."""
    return {layer for attn in layers if attn.is_cross_attention for layer in (attn.to_k, attn.to_v)}


@contextmanager
def attending(base: Base, canvas: Canvas) -> Iterator[None]:
    """Inside, the denoiser's attention follows the canvas, and the canvas the denoiser."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        steps = base.pipe.scheduler.timesteps
        canvas.progress = float((steps > torch.as_tensor(time).max().to(steps.device)).float().mean())

    def enter(_: Any, args: tuple[Any, ...]) -> None:
        canvas.size = (args[0].shape[2], args[0].shape[3])

    with ExitStack() as stack:
        stack.callback(base.denoiser.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for module in base.denoiser.modules():
            if isinstance(module, Transformer2DModel):
                stack.callback(module.register_forward_pre_hook(enter).remove)
        for index, layer in enumerate(cross_attention(base)):  # a word of its own for each layer (words.py)
            stack.callback(layer.register_forward_pre_hook(own_part(index), with_kwargs=True).remove)
        for layer in attention_layers(base):
            stack.callback(layer.set_processor, layer.processor)
            layer.set_processor(RegionAttention(canvas))
        yield
