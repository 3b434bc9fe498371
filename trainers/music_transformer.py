"""A bottleneck with a transformer layer in it (the T adapter of Mehta et al. 2025).

    h <- h + W_o attention(W_qkv norm(h)),   h <- h + W_2 gelu(W_1 norm(h))

Attention is causal, since music is written from left to right; while tokens are written one by one, keys and values
stay with the generation's cache. Positions are those that the hidden states carry already. On a text's states it looks
both ways, past the padding. In a base that draws spectrograms every step and band of the plane hears every other.
B batch, T steps, R width of the bottleneck, A heads times their width, which is R where the heads divide it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from studio.method import register
from studio.music.inserted import Inserted, MusicMethod, linear_weight, text_mask
from studio.patch import LayerCall, LayerShape

WIDENING = 2  # of the feed-forward part


class TransformerBottleneck(Inserted):
    def __init__(self, shape: LayerShape, bottleneck: int, dropout: float, causal: bool, heads: int) -> None:
        self.heads = min(heads, bottleneck)
        super().__init__(shape, bottleneck, dropout, causal)

    def build(self, bottleneck: int) -> None:
        attended = attention_width(bottleneck, self.heads)
        for norm in ("norm_1", "norm_2"):
            self.register_parameter(norm, nn.Parameter(torch.ones(bottleneck)))
            self.register_parameter(f"{norm}_bias", nn.Parameter(torch.zeros(bottleneck)))
        self.qkv = linear_weight(3 * attended, bottleneck)
        self.out = linear_weight(bottleneck, attended)
        self.wide = linear_weight(WIDENING * bottleneck, bottleneck)
        self.wide_bias = nn.Parameter(torch.zeros(WIDENING * bottleneck))
        self.narrow = linear_weight(bottleneck, WIDENING * bottleneck)
        self.narrow_bias = nn.Parameter(torch.zeros(bottleneck))

    def inner(self, hidden: Tensor, call: LayerCall) -> Tensor:
        if self.planar:
            return self._layer(hidden.flatten(1, 2), call).view_as(hidden)
        return self._layer(hidden, call)

    def _layer(self, hidden: Tensor, call: LayerCall) -> Tensor:
        hidden = hidden + F.linear(self._attend(self._norm("norm_1", hidden), call), self.out)
        wide = F.gelu(F.linear(self._norm("norm_2", hidden), self.wide, self.wide_bias))
        return hidden + F.linear(wide, self.narrow, self.narrow_bias)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], self.get_parameter(name), self.get_parameter(f"{name}_bias"))

    def _attend(self, hidden: Tensor, call: LayerCall) -> Tensor:
        batch, steps, _ = hidden.shape
        query, key, value = F.linear(hidden, self.qkv).view(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.causal:
            key, value = self._with_past(key, value, call)
            seen = torch.ones(steps, key.shape[2], dtype=torch.bool, device=hidden.device)
            mask: Tensor | None = seen.tril(key.shape[2] - steps)
        else:
            words = None if self.planar else text_mask(call, steps)
            # A text without words, the null condition, must not divide by nothing; what comes of it is masked later.
            mask = None if words is None else (words | ~words.any(1, keepdim=True))[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    def _with_past(self, key: Tensor, value: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        state = self.memory.of(call)
        if isinstance(past := state.get("key"), Tensor):
            key = torch.cat([past, key], 2)
        if isinstance(past := state.get("value"), Tensor):
            value = torch.cat([past, value], 2)
        state["key"], state["value"] = key.detach(), value.detach()
        return key, value


def attention_width(bottleneck: int, heads: int) -> int:
    return bottleneck // heads * heads


@register
class MusicTransformer(MusicMethod):
    """Music: self-attention in a bottleneck after each layer; hears everything so far."""

    kind: Literal["music-transformer"] = "music-transformer"
    paper = "Mehta et al. 2025, Exploring Adapter Design Tradeoffs for Low Resource Music Generation, arXiv 2506.21298"
    heads: int = Field(4, ge=1, le=64, description="Attention heads.")

    def insert(self, shape: LayerShape, bottleneck: int, causal: bool) -> Inserted:
        return TransformerBottleneck(shape, bottleneck, self.dropout, causal, self.heads)

    def size(self, width: int, bottleneck: int, planar: bool = False) -> int:
        attended = attention_width(bottleneck, min(self.heads, bottleneck))
        attention = 4 * bottleneck * attended
        feed_forward = 2 * WIDENING * bottleneck**2 + WIDENING * bottleneck + bottleneck
        return 2 * width * bottleneck + width + bottleneck + attention + feed_forward + 4 * bottleneck
