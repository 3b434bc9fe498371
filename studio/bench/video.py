"""The clip network beside diffusers' `UNet3DConditionModel` of the same widths, and what a clip's length costs.

Both have the widths of the image base `sticker`, one layer a block, the same channels in and out, and train everything.
Time is ratios of contenders that take turns; memory is counted on fake tensors: what has to be held at the peak of a
forward and backward pass. Both are per batch of `CLIPS` clips.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from studio.bases.sticker_video.building import stock_unet
from studio.bases.sticker_video.network import StickerUNet
from studio.bench.memory import LiveBytes
from studio.bench.rows import Bar, Ratio, Row
from studio.bench.speed import ratio, take_turns

CLIPS = 8
FRAMES = 8
SIDE = 8  # latents of 64 pixels
CHANNELS = 16  # of a latent, with transparency
PEER = "unet3d"
LENGTHS = (2, 4, 6)
#: widths and blocks of the image base, which both networks take
CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
}

BARS = [
    Bar("8 frames", "sticker_unet", PEER, 1.00, "step of diffusers' UNet3DConditionModel"),
    Bar("peak memory", "sticker_unet", PEER, 1.00, "peak of diffusers' UNet3DConditionModel"),
    *[
        Bar(f"{n} frames", "bucketed", "padded", n / FRAMES * 1.25, f"a batch of {n} frames, over padding to 8")
        for n in LENGTHS
    ],
]


def ours(config: Mapping[str, Any] = CONFIG) -> nn.Module:
    """As the preset `base-sticker-motion` builds it."""
    return StickerUNet(config, interaction_heads=4, interaction_head_dim=16, temporal_head_dim=32, temporal_told=True)


def theirs(config: Mapping[str, Any] = CONFIG) -> nn.Module:
    unet: nn.Module = stock_unet(config, config["in_channels"], config["out_channels"])
    return unet


def step(network: nn.Module, valid: int, frames: int, clips: int = CLIPS) -> Callable[[], None]:
    """A forward and backward pass on random clips of `frames` frames, of which `valid` are real."""
    image: Any = getattr(network, "image", None)
    config: Mapping[str, Any] = CONFIG if image is None else image.config
    noisy = torch.randn(clips, CHANNELS * 2 + 1, frames, SIDE, SIDE)
    time, text = torch.full((clips,), 500), torch.randn(clips, 32, config["cross_attention_dim"])
    options = {}
    if getattr(network, "masks_frames", False):
        mask = None if valid == frames else (torch.arange(frames) < valid).expand(clips, -1)
        options = {"valid": mask, "fps": torch.full((clips,), 8.0)}

    def run() -> None:
        network(noisy, time, encoder_hidden_states=text, **options).sample.square().mean().backward()
        network.zero_grad(set_to_none=True)

    return run


def measure(rounds: int, progress: Callable[[str, int, int], None] = lambda *_: None) -> list[Row]:
    """Time by length and beside the stock network, and peak memory."""
    torch.manual_seed(0)
    own, stock = ours(), theirs()
    rows = _timed("8 frames", {PEER: step(stock, 8, 8), "sticker_unet": step(own, 8, 8)}, PEER, rounds, progress)
    for n in LENGTHS:
        contenders = {"padded": step(own, n, FRAMES), "bucketed": step(own, n, n)}
        rows += _timed(f"{n} frames", contenders, "padded", rounds, progress)
    peaks = {name: peak_bytes(make) for name, make in ((PEER, theirs), ("sticker_unet", ours))}
    numbers = {PEER: _count(stock), "sticker_unet": _count(own)}
    for name, peak in peaks.items():
        share = peak / peaks[PEER]
        ratios = {PEER: Ratio(share, share, share)} if name != PEER else {}
        rows.append(Row("peak memory", name, numbers[name], {"peak_gib": peak / 2**30}, ratios))
    return rows


def _timed(
    case: str,
    contenders: dict[str, Callable[[], None]],
    peer: str,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> list[Row]:
    seconds = take_turns(contenders, rounds, on_round=lambda number: progress(case, number - 1, rounds + 2))
    rows = []
    for name in contenders:
        middle = statistics.median(seconds[name])
        ratios = {peer: ratio(seconds, name, peer)} if name != peer else {}
        rows.append(Row(case, name, 0, {"step_ms": 1e3 * middle, "clips_per_second": CLIPS / middle}, ratios))
    return rows


def peak_bytes(make: Callable[[], nn.Module], clips: int = CLIPS) -> int:
    """Bytes of tensors that live at the peak of a pass, weights and gradients among them."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        run = partial(step, make(), FRAMES, FRAMES, clips)()
        live.peak = live.now
        run()
        return live.peak


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
