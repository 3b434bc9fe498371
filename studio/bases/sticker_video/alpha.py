"""Transparency for an autoencoder of colours: a picture becomes two, its colours on a ground and its alpha as grey.

So an RGB autoencoder serves as it is, and what it draws can be put on anything. Legend: (..., 4, H, W) is RGBA and
(..., 3, H, W) a picture for the autoencoder. RGBA lies in [0, 1], pictures in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FAINT = 0.1  # below this alpha a colour can hardly be told from the ground, and is hardly seen


def split(rgba: Tensor, ground: float) -> tuple[Tensor, Tensor]:
    """(colours on the ground, alpha as grey)."""
    colour, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    grey = (alpha * 2 - 1).expand_as(colour)
    return (colour * alpha + ground * (1 - alpha)) * 2 - 1, grey


def join(picture: Tensor, grey: Tensor, ground: float) -> Tensor:
    """RGBA from a picture on the ground and its alpha: the inverse of `split` wherever something is seen."""
    alpha = ((grey.mean(-3, keepdim=True) + 1) / 2).clamp(0, 1)
    composite = ((picture + 1) / 2).clamp(0, 1)
    colour = ground + (composite - ground) / alpha.clamp(min=FAINT)
    return torch.cat([colour.clamp(0, 1), alpha], -3)


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size as RGBA (F, 4, H, W)."""
    stacked = np.stack([np.asarray(picture.convert("RGBA")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def to_pictures(rgba: Tensor) -> list[Image.Image]:
    """RGBA (F, 4, H, W) as PIL pictures."""
    array = (rgba.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(frame), "RGBA") for frame in array]


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole picture as RGBA of `size`, as large as it fits, transparent around it. Its own pixels if it fits."""
    picture = picture.convert("RGBA")
    if picture.size == size:
        return picture
    scale = min(size[0] / picture.width, size[1] / picture.height)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Premultiplied while it is resized: else what lies unseen under transparency bleeds into the edges.
    small = picture.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    canvas.paste(small, ((size[0] - shape[0]) // 2, (size[1] - shape[1]) // 2))
    return canvas
