"""What one layer's tensors in a LoRA file mean: a WeightDelta, by the formula of its kind.

O out, I in, k kernel, R rank, s scale.
LoRA         s U D                           LoCon's `lora_mid`   s M x_1 U x_2 D^T
LoHa         s (A1 B1) o (A2 B2)             LoKr                 s (W1 or A1 B1) (x) (W2 or A2 B2)
`diff`       as it is                        DoRA                 m (W + D) / |W + D| - W
OFT          rotations of the outputs: R W - W
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from studio.deltas import Dense, Hadamard, Kronecker, LowRank, Tucker, WeightDelta
from studio.errors import AdapterError

Tensors = Mapping[str, Tensor]  # of one layer, by what stands behind its name in the file
Scale = Callable[[int | None], float]  # rank -> s; None where the tensors have no rank


def low_rank_of(own: Tensors, scale: Scale) -> WeightDelta:
    """LoRA and LoCon."""
    down, up = own["down"], own["up"]
    _agree(down.shape[0], up.shape[1] if "mid" not in own else down.shape[0])
    if "mid" not in own:
        return LowRank.of(down, up, scale(down.shape[0]))
    mid = own["mid"]
    _agree(mid.shape[0], up.shape[1])
    _agree(mid.shape[1], down.shape[0])
    return Tucker(mid, (up.flatten(1), down.flatten(1).T.contiguous())).scaled(scale(down.shape[0]))


def hadamard_of(own: Tensors, scale: Scale, shape: tuple[int, ...]) -> WeightDelta:
    """LoHa, with Tucker cores `t1`, `t2` or without."""
    factors = []
    for n in "12":
        a, b, core = own[f"hada_w{n}_a"], own[f"hada_w{n}_b"], own.get(f"hada_t{n}")
        if core is not None:
            factors.append(Tucker(core, (a.T.contiguous(), b.T.contiguous())).low_rank())
        else:
            _agree(a.shape[1], b.shape[0])
            factors.append(LowRank(b, a, _unfolded(a.shape[0], b.shape[1], shape)))
    rank = own["hada_w1_b"].shape[0]
    return Hadamard(factors[0].scaled(scale(rank)), factors[1])


def kronecker_of(own: Tensors, scale: Scale, shape: tuple[int, ...]) -> WeightDelta:
    """LoKr. Where both factors are full there is no rank."""
    left = _factor(own, "1", ())
    right = _factor(own, "2", shape[2:])
    ranks = [own[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in own]
    return Kronecker(left.scaled(scale(ranks[0] if ranks else None)), right)


def _factor(own: Tensors, n: str, kernel: tuple[int, ...]) -> WeightDelta:
    if f"lokr_w{n}" in own:
        return Dense(own[f"lokr_w{n}"])
    a, b, core = own[f"lokr_w{n}_a"], own[f"lokr_w{n}_b"], own.get(f"lokr_t{n}")
    if core is not None:
        return Tucker(core, (a.T.contiguous(), b.T.contiguous()))
    _agree(a.shape[1], b.shape[0])
    return LowRank(b, a, (a.shape[0], b.shape[1] // prod(kernel), *kernel))


def _unfolded(height: int, width: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape if a matrix (O, I k ...) is its unfolding, else that of a plain matrix."""
    return shape if (height, width) == (shape[0], prod(shape[1:])) else (height, width)


def _agree(one: int, other: int) -> None:
    if one != other:
        raise AdapterError(f"its halves have different ranks, {one} and {other}")


# -- changes that depend on the base's weight -----------------------------------------------------------------------


def renormalised(delta: WeightDelta, magnitude: Tensor, weight: Tensor) -> Dense:
    """DoRA (Liu et al. 2024): each row, or each column where the file is so made, gets its own length."""
    whole = weight.to(delta.dtype) + delta.dense()
    if magnitude.numel() == whole.shape[0] and not (magnitude.ndim > 1 and magnitude.shape[0] == 1 < whole.shape[0]):
        length = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (whole.ndim - 1))
        wanted = magnitude.reshape(length.shape)
    elif magnitude.numel() == whole.shape[1]:
        length = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (whole.ndim - 2))
        wanted = magnitude.reshape(length.shape)
    elif magnitude.numel() == whole.shape[0]:
        return renormalised(delta, magnitude.flatten(), weight)
    else:
        raise AdapterError(
            f"its DoRA magnitude has {magnitude.numel()} numbers, and the weight is {tuple(whole.shape)}"
        )
    return Dense(wanted * whole / length.clamp(min=torch.finfo(whole.dtype).tiny) - weight)


def rotated(own: Tensors, weight: Tensor, constraint: float) -> Dense:
    """OFT (Qiu et al. 2023) as LyCORIS stores it: R^T on blocks of outputs, R = (1 + Q)(1 - Q)^-1, Q = B - B^T."""
    blocks = own["oft_blocks"]
    if blocks.ndim != 3:
        raise AdapterError("it is a BOFT, which the studio does not read")
    if blocks.shape[0] * blocks.shape[1] != weight.shape[0]:
        raise AdapterError(f"its OFT blocks {tuple(blocks.shape)} do not fit a weight of {weight.shape[0]} outputs")
    turn = _cayley(blocks, constraint * weight.shape[0])
    whole = weight.to(turn.dtype)
    parts = whole.unflatten(0, (blocks.shape[0], blocks.shape[1]))
    whole = torch.einsum("knm,kn...->km...", turn, parts).flatten(0, 1)
    if "rescale" in own:
        whole = own["rescale"].reshape(-1, *[1] * (whole.ndim - 1)) * whole
    return Dense(whole - weight)


def _cayley(blocks: Tensor, constraint: float) -> Tensor:
    q = blocks - blocks.transpose(-1, -2)
    if constraint > 0:
        size = q.norm() + 1e-8
        q = q * min(1.0, constraint / float(size))
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)
