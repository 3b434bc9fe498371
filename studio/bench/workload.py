"""What a step of training computes beside the optimizer: a network or a single layer, its batch, a backward pass.

The networks are the real classes in their true shapes, with random weights. A batch is random too: neither memory nor
time depends on values. B batch, H the side of the latents, L tokens of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from studio.attachment import Site, find_sites
from studio.base import Base
from studio.bases.latent_diffusion import LatentDiffusion
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # 859,520,964 weights
SDXL: dict[str, Any] = {  # 2,567,463,684 weights
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class Workload:
    """`module` is the whole network; `sites(targets, kinds)` are layers of it; `run` is a forward and backward pass."""

    module: nn.Module
    batch: list[Tensor]
    sites: Callable[[Sequence[str], Sequence[str]], dict[str, Site]]
    run: Callable[[], None]


# -- networks ------------------------------------------------------------------------------------------------------


def bare_base(
    family: type[LatentDiffusion], config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> LatentDiffusion:
    """A base that is only a UNet of this configuration, with random weights, on the current device."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**config)
    unet.eval()
    for part in unet.modules():  # `Module.to` does not work on fake tensors
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return family(family.__name__, SimpleNamespace(unet=unet, components={"unet": unet}))


def sd15() -> LatentDiffusion:
    return bare_base(StableDiffusion, SD15)


def sdxl(dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    return bare_base(StableDiffusionXL, SDXL, dtype)


def training(base: LatentDiffusion, batch: int, checkpointing: bool = False, autocast: bool = False) -> Workload:
    """The denoising loss on a batch, as `studio train` computes it once pictures and captions are encoded."""
    unet = base.denoiser
    config, device = unet.config, unet.device
    if checkpointing:
        unet.enable_gradient_checkpointing()
    noisy, target = (torch.randn(batch, config.in_channels, *[config.sample_size] * 2, device=device) for _ in "12")
    times = torch.full((batch,), 500, device=device)
    condition = {"text": torch.randn(batch, 77, config.cross_attention_dim, device=device)}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        condition |= {
            "pooled": torch.randn(batch, width, device=device),
            "time_ids": torch.ones(batch, 6, device=device),
        }

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            predicted = base.predict(noisy, times, condition)
        (predicted.float() - target).square().mean().backward()

    batch_tensors = [noisy, target, times, *condition.values()]
    return Workload(unet, batch_tensors, lambda targets, kinds: _select(base, targets, kinds), run)


def _select(base: Base, targets: Sequence[str], kinds: Sequence[str]) -> dict[str, Site]:
    return {name: site for name, site in base.select(targets, kinds).items() if site.component == "unet"}


# -- layers --------------------------------------------------------------------------------------------------------


def single_layer(layer: nn.Module, x: Tensor) -> Workload:
    """One layer as it stands in the middle of a network: its input wants a gradient too."""
    module = nn.ModuleDict({"layer": layer.requires_grad_(False)})  # PEFT replaces the layer in what holds it
    gradient = torch.randn_like(layer(x).detach())

    def run() -> None:
        module["layer"](x.detach().requires_grad_(True)).backward(gradient)

    def sites(targets: Sequence[str], kinds: Sequence[str]) -> dict[str, Site]:
        return {name: site for name, site in find_sites({"unet": module}).items() if site.shape.kind in kinds}

    return Workload(module, [x, gradient], sites, run)


def linear(width: int, tokens: int) -> Workload:
    """An attention projection of a UNet: at width 640 it sees 32 x 32 tokens of a 512 px picture, 4096 of 1024 px."""
    return single_layer(nn.Linear(width, width), torch.randn(1, tokens, width))


def convolution(width: int, side: int) -> Workload:
    """A 3 x 3 convolution of a residual block."""
    return single_layer(nn.Conv2d(width, width, 3, padding=1), torch.randn(1, width, side, side))
