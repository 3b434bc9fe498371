"""The discrete-frame network: an image UNet of diffusers, and layers over time between its own.

After RDTF's DFGN (arXiv 2503.17735): after each residual block a spatial-temporal interaction, after each
cross-attention a temporal transformer. The spatial part *is* a `UNet2DConditionModel`, under the name `image`, so it
can be taken from an image base and shared with it; layers over time add nothing at the start, so the clip network
begins as its image network, frame by frame. Padded frames may hold anything, NaN too, and change nothing.
Spatial weights that stay those of the image base can still be changed by little, by factors of a low rank.

Legend: B clips, F frames, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from studio.bases.sticker_video.layers import (
    Frames,
    LowRankChange,
    MaskedTemporalAttention,
    SpatialTemporalInteraction,
    TextSummary,
    zeroed,
)

ENDS = ("conv_in", "conv_out")  # the layers of the image network that have more channels here


class StickerUNet(ModelMixin, ConfigMixin):
    """`image_config` is the configuration of the image UNet, with the channels that the clip network needs.

    `interaction` is "sti", "conv" (its detail branch alone) or "none". With `depthwise`, its convolutions see one
    channel each, which is what keeps the paper's network at 0.96 billion parameters. `max_frames` bounds F.
    `spatial_rank` is the rank of what is added to each linear layer and convolution of the image network; 0: nothing.
    With `temporal_told` the temporal transformers are told time, rate, loop and a summary of the text themselves.
    With `residual_head` what is left of an anchored prediction (conditioning.py) has a last layer of its own, zero at
    the start: else it would begin as the image network's drawing of a whole picture.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D")
    masks_frames = True

    @register_to_config
    def __init__(
        self,
        image_config: Mapping[str, Any],
        max_frames: int = 16,
        interaction: str = "sti",
        depthwise: bool = False,
        interaction_heads: int = 8,
        interaction_head_dim: int = 32,
        temporal_head_dim: int = 64,
        temporal_in: bool = False,
        spatial_rank: int = 0,
        temporal_told: bool = False,
        residual_head: bool = False,
    ) -> None:
        super().__init__()
        self.image: Any = UNet2DConditionModel.from_config(dict(image_config))
        self.gradient_checkpointing = False
        widths, groups = self.image.config.block_out_channels, self.image.config.norm_num_groups
        embedded = self.image.time_embedding.linear_2.out_features
        told_dim = embedded if temporal_told else 0

        def over_time(block: Any, channels: int) -> nn.ModuleList:
            """For each residual block of an image block, what follows it over time."""
            attends = len(getattr(block, "attentions", None) or ())
            heads = max(1, channels // temporal_head_dim)
            layers = []
            for index in range(len(block.resnets)):
                parts: dict[str, nn.Module] = {}
                if interaction != "none":
                    parts["interaction"] = SpatialTemporalInteraction(
                        channels, interaction_heads, interaction_head_dim, groups, depthwise, interaction == "sti"
                    )
                if index < attends:
                    parts["temporal"] = MaskedTemporalAttention(
                        channels, heads, channels // heads, groups, max_frames, told_dim
                    )
                layers.append(nn.ModuleDict(parts))
            return nn.ModuleList(layers)

        self.time_in = (
            MaskedTemporalAttention(widths[0], 8, temporal_head_dim, groups, max_frames) if temporal_in else None
        )
        self.down_time = nn.ModuleList(over_time(b, w) for b, w in zip(self.image.down_blocks, widths))
        self.mid_time = over_time(self.image.mid_block, widths[-1])
        self.up_time = nn.ModuleList(over_time(b, w) for b, w in zip(self.image.up_blocks, reversed(widths)))
        self.fps_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.fps_embedding = TimestepEmbedding(widths[0], embedded)
        zeroed(self.fps_embedding.linear_2)
        self.loop_embedding = nn.Embedding(2, embedded)
        nn.init.zeros_(self.loop_embedding.weight)
        self.text_summary = TextSummary(self.image.config.cross_attention_dim, embedded) if temporal_told else None
        self.conv_rest = zeroed(copy.deepcopy(self.image.conv_out)) if residual_head else None
        self.spatial_change = nn.ModuleDict()
        if spatial_rank:
            self._change_spatial(spatial_rank)

    def _change_spatial(self, rank: int) -> None:
        for name, layer in self.image.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name not in ENDS:
                change = LowRankChange(layer, rank)
                self.spatial_change[name.replace(".", "-")] = change
                layer.register_forward_hook(change.added)

    # -- from an image network -----------------------------------------------------------------------------------

    @classmethod
    def around(
        cls, image: Any, in_channels: int, out_channels: int, sample_size: int | None = None, **options: Any
    ) -> StickerUNet:
        """The clip network that starts as this image network: the same values, and zeros in the new channels."""
        config = {key: value for key, value in dict(image.config).items() if not key.startswith("_")}
        config |= {"in_channels": in_channels, "out_channels": out_channels}
        config |= {"sample_size": sample_size or image.config.sample_size}
        network = cls(config, **options)
        network.take_image(image.state_dict())
        return network

    @torch.no_grad()
    def take_image(self, state: Mapping[str, Tensor]) -> None:
        """Copies the weights of an image network; channels that it lacks get zeros."""
        own = self.image.state_dict()
        for name, value in state.items():
            if value.shape == own[name].shape:
                own[name].copy_(value)
            else:
                own[name].zero_()
                own[name][tuple(slice(0, size) for size in value.shape)] = value.to(own[name])

    def temporal_names(self) -> set[str]:
        """Parameters that an image network does not have or has with fewer channels; the rest is spatial."""
        spatial = {f"image.{name}" for name, _ in self.image.named_parameters() if name.split(".")[0] not in ENDS}
        return {name for name, _ in self.named_parameters()} - spatial

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        valid: Tensor | None = None,
        fps: Tensor | None = None,
        loop: Tensor | None = None,
        anchored: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """`sample` (B, C, F, H, W), text (B, L, D); `valid` (B, F) bool, `fps` (B,) with 0 for unknown, `loop` (B,).

        `anchored` (B,) bool: of which clips only what the anchor leaves open is predicted.
        """
        batch, _, count = sample.shape[:3]
        frames = Frames.of(valid, count, loop)
        hidden = frames.without_padding(sample.transpose(1, 2).flatten(0, 1))
        embedding = self._embedding(timestep, batch, hidden, fps, loop)
        told = None if self.text_summary is None else embedding + self.text_summary(encoder_hidden_states)
        embedding = embedding.repeat_interleave(count, 0)
        text = encoder_hidden_states.repeat_interleave(count, 0)

        image = self.image
        hidden = image.conv_in(hidden)
        if self.time_in is not None and count > 1:
            hidden = self._run(self.time_in, hidden, frames)
        skips = [hidden]
        for block, times in zip(image.down_blocks, self.down_time):
            for index, resnet in enumerate(block.resnets):
                hidden = self._unit(
                    resnet, _attention(block, index), times[index], hidden, embedding, text, frames, told
                )
                skips.append(hidden)
            for sampler in block.downsamplers or ():
                hidden = sampler(hidden)
                skips.append(hidden)

        middle = image.mid_block
        for index, resnet in enumerate(middle.resnets):
            attention = _attention(middle, index)
            hidden = self._unit(resnet, attention, self.mid_time[index], hidden, embedding, text, frames, told)

        for block, times in zip(image.up_blocks, self.up_time):
            for index, resnet in enumerate(block.resnets):
                hidden = torch.cat([hidden, skips.pop()], 1)
                hidden = self._unit(
                    resnet, _attention(block, index), times[index], hidden, embedding, text, frames, told
                )
            for sampler in block.upsamplers or ():
                hidden = sampler(hidden, skips[-1].shape[-2:])

        features = image.conv_act(image.conv_norm_out(hidden))
        hidden = image.conv_out(features)
        if self.conv_rest is not None and anchored is not None and bool(anchored.any()):
            rows = anchored.to(hidden.device).repeat_interleave(count).view(-1, 1, 1, 1)
            hidden = torch.where(rows, self.conv_rest(features), hidden)
        hidden = hidden.unflatten(0, (batch, count)).transpose(1, 2)
        return UNet3DConditionOutput(sample=hidden) if return_dict else (hidden,)

    def _embedding(self, timestep: Any, batch: int, hidden: Tensor, fps: Tensor | None, loop: Tensor | None) -> Tensor:
        """Time as the image network embeds it, plus the frame rate (its logarithm) and whether the clip loops."""
        time = torch.as_tensor(timestep, device=hidden.device).reshape(-1).expand(batch)
        embedding = self.image.time_embedding(self.image.time_proj(time).to(hidden.dtype))
        fps = torch.zeros(batch, device=hidden.device) if fps is None else fps.to(hidden.device, torch.float32)
        rate = self.fps_embedding(self.fps_proj(100 * fps.clamp(min=0.1).log2()).to(hidden.dtype))
        embedding = embedding + rate.masked_fill((fps <= 0)[:, None], 0)
        circular = torch.zeros(batch, device=hidden.device) if loop is None else loop.to(hidden.device)
        return embedding + self.loop_embedding(circular.long())

    def _unit(
        self,
        resnet: Any,
        attention: Any,
        times: Any,
        hidden: Tensor,
        embedding: Tensor,
        text: Tensor,
        frames: Frames,
        told: Tensor | None,
    ) -> Tensor:
        """Residual block, interaction, spatial attention, temporal attention; each where it is there."""

        def through(hidden: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
            hidden = resnet(hidden, embedding)
            if frames.count > 1 and "interaction" in times:
                hidden = times["interaction"](hidden, frames)
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
            if frames.count > 1 and "temporal" in times:
                hidden = times["temporal"](hidden, frames, told)
            return hidden

        return self._run(through, hidden, embedding, text)

    def _run(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)


def _attention(block: Any, index: int) -> Any:
    """The attention that follows a residual block. In the middle block the first residual block has none after it."""
    attentions = getattr(block, "attentions", None)
    return attentions[index] if attentions and index < len(attentions) else None
