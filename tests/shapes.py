"""Layers of every kind that a method may meet, with an input for each."""

import torch
from torch import nn


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Layer and input by a telling name: kinds, strides, paddings, dilations."""
    torch.manual_seed(0)
    made = {
        "linear": (nn.Linear(12, 20), torch.randn(3, 5, 12)),
        "linear without bias": (nn.Linear(12, 6, bias=False), torch.randn(3, 12)),
        "conv1d": (nn.Conv1d(6, 10, 3, padding=1), torch.randn(2, 6, 9)),
        "conv2d": (nn.Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 8, 8)),
        "conv2d 1x1": (nn.Conv2d(6, 10, 1), torch.randn(2, 6, 8, 8)),
        "conv2d stride 2": (nn.Conv2d(6, 10, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)),
        "conv2d dilated": (nn.Conv2d(6, 10, 3, padding=2, dilation=2), torch.randn(2, 6, 8, 8)),
        "conv2d reflected": (nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"), torch.randn(2, 6, 8, 8)),
        "conv2d same": (nn.Conv2d(6, 10, 3, padding="same"), torch.randn(2, 6, 8, 8)),
        "conv3d": (nn.Conv3d(4, 6, 3, padding=1), torch.randn(2, 4, 4, 5, 5)),
    }
    return {name: (layer.requires_grad_(False), x) for name, (layer, x) in made.items()}
