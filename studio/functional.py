"""A layer's own arithmetic with another weight in its place: how terms go through convolutions and embeddings."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from studio.patch import LayerCall, LayerShape

CONVOLUTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def convolve(shape: LayerShape, x: Tensor, weight: Tensor) -> Tensor:
    """What a convolution of this shape makes of x with another weight and no bias.

    Stride, padding of any mode, dilation and groups are the layer's, and so is the kernel of the weight; its channels,
    and those of x, may be others.
    """
    padding: Any = shape.padding
    if shape.padding_mode != "zeros":
        x, padding = F.pad(x, sides(shape), mode=shape.padding_mode), 0
    return CONVOLUTIONS[shape.kind](x, weight, None, shape.stride, padding, shape.dilation, shape.groups)


def pointwise(x: Tensor, matrix: Tensor, axes: int) -> Tensor:
    """A matrix (O, I) applied at every place of x (..., I, places over `axes` axes).

    The 1 x 1 convolution, as a matrix product: measured 1.2 to 4 times as fast on a CPU where one side is a rank.
    """
    flat = x.flatten(-axes)
    return (matrix.expand(*flat.shape[:-2], -1, -1) @ flat).unflatten(-1, x.shape[-axes:])


def look_up(indices: Tensor, table: Tensor, call: LayerCall) -> Tensor:
    """The rows of another table than the embedding's own; as there, the row for padding gets no gradient."""
    return F.embedding(indices, table, padding_idx=getattr(call.layer, "padding_idx", None))


def sides(shape: LayerShape) -> list[int]:
    """Padding as `F.pad` takes it: before and after, last axis first; "same" puts the odd one after, as torch does."""
    if shape.padding == "same":
        totals = [step * (size - 1) for step, size in zip(shape.dilation, shape.kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    if isinstance(shape.padding, str):  # "valid"
        return [0, 0] * len(shape.kernel)
    return [side for size in reversed(shape.padding) for side in (size, size)]
