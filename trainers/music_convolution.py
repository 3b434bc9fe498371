"""A bottleneck of dilated residual convolutions and squeeze-excitation (the C adapter of Mehta et al. 2025).

    h <- h + gelu(conv_i(h)),  i = 1 ... N, kernel k, dilation 2^(i-1)
    h <- h sigmoid(W_excite gelu(W_squeeze mean(h)))                      (Hu et al. 2018)

Music is written from left to right, so both are causal: convolutions look back only, and the mean runs over the steps
so far instead of over the whole clip, which would tell the past of the future. While tokens are written one by one the
last (k - 1) 2^(i-1) inputs of each convolution and the sum behind the mean are kept with the generation's cache.
On a text's states, which are there as a whole, convolutions look both ways and the mean is over all words. In a base
that draws spectrograms they look both ways in time and in pitch, and the mean is over the whole plane.
B batch, T steps, F bands of a plane, R width of the bottleneck.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from studio.method import register
from studio.music.inserted import Inserted, MusicMethod, linear_weight, text_mask
from studio.music.streaming import State
from studio.patch import LayerCall, LayerShape


class ConvolutionBottleneck(Inserted):
    def __init__(
        self, shape: LayerShape, bottleneck: int, dropout: float, causal: bool, blocks: int, kernel: int, squeeze: int
    ) -> None:
        self.blocks, self.kernel, self.squeezed = blocks, kernel, squeezed(bottleneck, squeeze)
        super().__init__(shape, bottleneck, dropout, causal)

    def build(self, bottleneck: int) -> None:
        for i in range(self.blocks):
            kernel = (self.kernel,) * (1 + self.planar)
            self.register_parameter(f"conv_{i}", linear_weight(bottleneck, bottleneck, *kernel))
            self.register_parameter(f"conv_{i}_bias", nn.Parameter(torch.zeros(bottleneck)))
        self.squeeze = linear_weight(self.squeezed, bottleneck)
        self.squeeze_bias = nn.Parameter(torch.zeros(self.squeezed))
        self.excite = linear_weight(bottleneck, self.squeezed)
        self.excite_bias = nn.Parameter(torch.zeros(bottleneck))

    def inner(self, hidden: Tensor, call: LayerCall) -> Tensor:
        state = self.memory.of(call) if self.causal else {}
        mask = None if self.causal or self.planar else text_mask(call, hidden.shape[1])
        for i in range(self.blocks):
            looked = self._look_around(i, hidden) if self.planar else self._convolve(i, hidden, state, mask)
            hidden = hidden + F.gelu(looked)
        if self.planar:
            mean = hidden.mean((1, 2), keepdim=True)
        else:
            mean = self._running_mean(hidden, state) if self.causal else _mean(hidden, mask)
        gate = F.linear(F.gelu(F.linear(mean, self.squeeze, self.squeeze_bias)), self.excite, self.excite_bias)
        return hidden * torch.sigmoid(gate)

    def _convolve(self, i: int, hidden: Tensor, state: State, mask: Tensor | None) -> Tensor:
        reach = (self.kernel - 1) * 2**i
        x = hidden.transpose(1, 2)  # (B, R, T)
        if self.causal:
            past = state.get(f"conv_{i}")
            x = torch.cat([past.to(x) if isinstance(past, Tensor) else x.new_zeros(*x.shape[:2], reach), x], -1)
            state[f"conv_{i}"] = x[..., x.shape[-1] - reach :].detach()
        else:
            x = x if mask is None else x * mask[:, None].to(x)  # padding sounds like nothing
            x = F.pad(x, (reach // 2, reach - reach // 2))
        weight, bias = self.get_parameter(f"conv_{i}"), self.get_parameter(f"conv_{i}_bias")
        return F.conv1d(x, weight, bias, dilation=2**i).transpose(1, 2)

    def _look_around(self, i: int, hidden: Tensor) -> Tensor:
        """(B, T, F, R): in time and in pitch."""
        reach = (self.kernel - 1) * 2**i
        x = F.pad(hidden.movedim(-1, 1), (reach // 2, reach - reach // 2) * 2)
        weight, bias = self.get_parameter(f"conv_{i}"), self.get_parameter(f"conv_{i}_bias")
        return F.conv2d(x, weight, bias, dilation=2**i).movedim(1, -1)

    def _running_mean(self, hidden: Tensor, state: State) -> Tensor:
        """At each step the mean over the steps so far, (B, T, R); summed in fp32."""
        total, count = state.get("sum"), state.get("count", 0)
        sums = hidden.float().cumsum(1) + (total if isinstance(total, Tensor) else 0.0)
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) + count
        state["sum"], state["count"] = sums[:, -1:].detach(), int(counts[-1])
        return (sums / counts[:, None]).to(hidden.dtype)


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, R): over all steps, or those that the mask has."""
    if mask is None:
        return hidden.mean(1, keepdim=True)
    weights = mask[..., None].to(hidden)
    return (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)


def squeezed(bottleneck: int, ratio: int) -> int:
    return max(1, bottleneck // ratio)


@register
class MusicConvolution(MusicMethod):
    """Music: dilated convolutions in a bottleneck after each layer; hears a fraction of a second."""

    kind: Literal["music-convolution"] = "music-convolution"
    paper = "Mehta et al. 2025, Exploring Adapter Design Tradeoffs for Low Resource Music Generation, arXiv 2506.21298"
    blocks: int = Field(3, ge=1, le=8, description="Residual convolutions, each of twice the dilation.")
    kernel: int = Field(3, ge=2, le=15, description="Steps that a convolution looks at.")
    squeeze_ratio: int = Field(4, ge=1, le=64, description="Squeeze-excitation narrows the bottleneck by this.")

    @model_validator(mode="after")
    def _text_is_looked_at_evenly(self) -> MusicConvolution:
        if self.placement == "text_states" and self.kernel % 2 == 0:
            raise ValueError("on text_states the kernel must be odd, to look both ways alike")
        return self

    def insert(self, shape: LayerShape, bottleneck: int, causal: bool) -> Inserted:
        return ConvolutionBottleneck(
            shape, bottleneck, self.dropout, causal, self.blocks, self.kernel, self.squeeze_ratio
        )

    def size(self, width: int, bottleneck: int, planar: bool = False) -> int:
        narrow = squeezed(bottleneck, self.squeeze_ratio)
        convolutions = self.blocks * (bottleneck**2 * self.kernel ** (1 + planar) + bottleneck)
        return (
            2 * width * bottleneck + width + bottleneck + convolutions + 2 * bottleneck * narrow + narrow + bottleneck
        )
