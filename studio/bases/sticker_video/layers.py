"""What a video network adds to an image network: layers over time that never look at padding.

Legend: B clips, F frames, C channels, H and W height and width, n valid frames of a clip. Hidden states are
(B F, C, H, W), as the image layers want them; everything here normalises each frame by itself, so that what a frame
becomes depends on other valid frames alone. Each layer ends in weights that are zero at the start and so adds nothing.

`SpatialTemporalInteraction` is the STI of VSD2M (arXiv 2412.08259) and RDTF (arXiv 2503.17735, section on DFGN):
a semantic branch with one attention over all tokens of the clip at half resolution, and a detail branch of two
convolutions over time. The published code ties the latter to eight frames by taking them for channels; here it is
the (3, 1, 1) convolution of the paper's table, which fits any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Frames:
    """Which frames of a batch are real, and which clips play in a circle.

    `valid` is (B, F) bool: n times True, then False; None where every frame is. `loop` is (B,) bool or None.
    """

    count: int
    valid: Tensor | None = None
    loop: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor | None, count: int, loop: Tensor | None) -> Frames:
        """Leaves masks out where they would change nothing, so that full batches take the fast attention."""
        masked = valid is not None and not bool(valid.all())
        looped = loop is not None and bool(loop.any())
        return cls(count, valid if masked else None, loop if looped else None)

    def lengths(self, batch: int, device: torch.device) -> Tensor:
        """n of each clip, (B,)."""
        if self.valid is None:
            return torch.full((batch,), self.count, device=device)
        return self.valid.sum(1)

    def moving(self) -> Tensor | None:
        """Which clips have more than one frame, (B,) bool; None if all have."""
        if self.count == 1:
            raise ValueError("a batch of stills has no time; its temporal layers are skipped")
        return None if self.valid is None else self.valid.sum(1) > 1

    def without_padding(self, hidden: Tensor) -> Tensor:
        """Hidden states with zeros in padded frames. Selected, not multiplied: zero times NaN is NaN."""
        if self.valid is None:
            return hidden
        return hidden.masked_fill(~self.valid.reshape(-1, 1, 1, 1), 0)

    def moving_only(self, residual: Tensor) -> Tensor:
        """A residual with zeros in stills, which have nothing to learn about time."""
        moving = self.moving()
        if moving is None or bool(moving.all()):
            return residual
        kept = moving[:, None].expand(-1, self.count).reshape(-1, 1, 1, 1)
        return residual.masked_fill(~kept, 0)

    def key_bias(self, tokens: int, repeats: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores, (B repeats, 1, F tokens): nothing, or -inf at padding.

        `tokens` of a frame follow each other; `repeats` sequences of a clip follow each other.
        """
        if self.valid is None:
            return None
        bias = torch.zeros(self.valid.shape, dtype=dtype, device=self.valid.device)
        bias = bias.masked_fill(~self.valid, -torch.inf)
        return bias.repeat_interleave(tokens, 1).repeat_interleave(repeats, 0)[:, None]


class LowRankChange(nn.Module):
    """What is added to a layer's output: its input through `down` (R, ...) and `up` (O, R), zero at the start.

    As in LoRA (arXiv 2106.09685). A convolution's `down` has its kernel, stride and padding.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def added(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the layer."""
        if isinstance(layer, nn.Conv2d):
            low = functional.conv2d(inputs[0], self.down, None, layer.stride, layer.padding, layer.dilation)
            return output + functional.conv2d(low, self.up[:, :, None, None])
        return output + functional.linear(functional.linear(inputs[0], self.down), self.up)


class TextSummary(nn.Module):
    """One vector (B, E) of a text (B, L, D), for the whole clip. Zero at the start.

    A mark is the most that any token has of a direction, so one word among many is found whole. A weighted mean over
    tokens found no motions: after 1,400 steps their words had less of its weight than each of the padding tokens.
    """

    def __init__(self, text_width: int, width: int, marks: int = 256) -> None:
        super().__init__()
        self.mark = nn.Linear(text_width, marks)
        self.proj = zeroed(nn.Linear(marks, width))

    def forward(self, text: Tensor) -> Tensor:
        return self.proj(self.mark(text).amax(1))


class MaskedTemporalAttention(nn.Module):
    """A transformer over the frames at each place: two self-attentions and a feed-forward, as in ModelScope's.

    With `told_dim` it is told of the whole clip, which the spatial layers about it know only frame by frame.
    """

    def __init__(
        self, channels: int, heads: int, head_dim: int, groups: int, max_frames: int, told_dim: int = 0
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width)
        self.transformer = BasicTransformerBlock(
            width,
            heads,
            head_dim,
            double_self_attention=True,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=max_frames,
        )
        self.proj_out = zeroed(nn.Linear(width, channels))
        self.told = zeroed(nn.Linear(told_dim, width)) if told_dim else None

    def forward(self, hidden: Tensor, frames: Frames, told: Tensor | None = None) -> Tensor:
        """Hidden states, and what the clip's embedding says, `told` (B, E)."""
        total, channels, height, width = hidden.shape
        batch, places = total // frames.count, height * width
        tokens = self.norm(frames.without_padding(hidden))
        tokens = tokens.view(batch, frames.count, channels, places).permute(0, 3, 1, 2)
        tokens = self.proj_in(tokens.reshape(batch * places, frames.count, channels))
        if self.told is not None and told is not None:
            tokens = tokens + self.told(functional.silu(told)).repeat_interleave(places, 0)[:, None]
        bias = frames.key_bias(1, places, tokens.dtype)
        tokens = self.proj_out(self.transformer(tokens, attention_mask=bias, encoder_attention_mask=bias))
        residual = tokens.view(batch, places, frames.count, channels).permute(0, 2, 3, 1).reshape(hidden.shape)
        return hidden + frames.moving_only(residual)


class SpatialTemporalInteraction(nn.Module):
    """STI: h + GroupNorm(w1 S + w2 D), w1 = 0 and w2 = 1 at the start, and a norm whose scale starts at zero.

    Without `semantic` it is a plain convolution over time.
    """

    def __init__(
        self, channels: int, heads: int, head_dim: int, groups: int, depthwise: bool = False, semantic: bool = True
    ) -> None:
        super().__init__()
        self.detail = nn.ModuleList(
            nn.ModuleDict({"norm": nn.GroupNorm(groups, channels), "conv": ConvOverTime(channels, depthwise)})
            for _ in range(2)
        )
        self.attn1 = Attention(channels, heads=heads, dim_head=head_dim, bias=False) if semantic else None
        self.semantic_norm = nn.GroupNorm(groups, channels) if semantic else None
        self.weights = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.norm_out = nn.GroupNorm(groups, channels)
        nn.init.zeros_(self.norm_out.weight)

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        clean = frames.without_padding(hidden)
        mixed = self.weights[1] * self._detail(clean, frames)
        if self.attn1 is not None:
            mixed = mixed + self.weights[0] * self._semantic(clean, frames)
        return hidden + frames.moving_only(self.norm_out(mixed))

    def _semantic(self, hidden: Tensor, frames: Frames) -> Tensor:
        """One attention over every token of the clip at half the resolution, and back up."""
        assert self.attn1 is not None
        assert self.semantic_norm is not None
        size = hidden.shape[-2:]
        small = functional.avg_pool2d(self.semantic_norm(hidden), 2, ceil_mode=True)
        total, channels, height, width = small.shape
        batch, tokens = total // frames.count, height * width
        folded = small.view(batch, frames.count, channels, tokens).transpose(2, 3)
        folded = folded.reshape(batch, frames.count * tokens, channels)
        looked = self.attn1(folded, attention_mask=frames.key_bias(tokens, 1, folded.dtype))
        looked = looked.view(batch, frames.count, tokens, channels).transpose(2, 3).reshape(small.shape)
        return functional.interpolate(looked, size=size, mode="nearest") + hidden

    def _detail(self, hidden: Tensor, frames: Frames) -> Tensor:
        for layer in self.detail:
            assert isinstance(layer, nn.ModuleDict)
            activated = functional.silu(layer["norm"](hidden))
            hidden = layer["conv"](with_neighbours(activated, frames)).transpose(1, 2).flatten(0, 1)
        return hidden


def with_neighbours(hidden: Tensor, frames: Frames) -> Tensor:
    """Clips (B, C, F + 2, H, W) with a frame before the first and one after the last.

    They are zero, or where a clip loops its last and its first valid frame. Padding is zero throughout.
    """
    batch = hidden.shape[0] // frames.count
    clips = frames.without_padding(hidden).unflatten(0, (batch, frames.count))
    edge = torch.zeros_like(clips[:, :1])
    extended = torch.cat([edge, clips, edge], 1)
    if frames.loop is not None:
        rows = torch.nonzero(frames.loop, as_tuple=True)[0]
        last = frames.lengths(batch, hidden.device)[rows] - 1
        extended = extended.index_put((rows, torch.zeros_like(last)), clips[rows, last])
        extended = extended.index_put((rows, last + 2), clips[rows, torch.zeros_like(last)])
    return extended.transpose(1, 2)


class ConvOverTime(nn.Conv3d):
    """A (3, 1, 1) convolution of clips (B, C, F + 2, H, W).

    Over places in a row it is a convolution of two dimensions, whose kernel on a CPU is 1.3 to 2 times as fast.
    """

    def __init__(self, channels: int, depthwise: bool) -> None:
        super().__init__(channels, channels, (3, 1, 1), groups=channels if depthwise else 1)

    def forward(self, clips: Tensor) -> Tensor:
        rows = functional.conv2d(clips.flatten(3), self.weight[..., 0], self.bias, groups=self.groups)
        return rows.unflatten(-1, clips.shape[-2:])


def attend_plainly(network: nn.Module) -> None:
    """Attention as two matrix products, for bf16 on a CPU: torch's fused kernel takes four times as long there.

    Measured on a Xeon with AMX, one thread, forward and backward, 4 heads of 32: 64 tokens 19 ms against 4.4, 8 tokens
    30 against 17; in fp32 the fused kernel is the faster one.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def zeroed(layer: Any) -> Any:
    """The layer, which now gives zeros."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
