"""A linear layer with a Kronecker product before it and a low-rank matrix beside it, as one function:

    y = W T x + up down x + bias,   T = A_1 (x) ... (x) A_D

W (O, I) frozen, A_d (I_d, I_d), down (R, I), up (O, R). As terms (patch.py) these are tensors of the size of input or
output, each written, read and added, forwards and backwards; on a CPU that, and not their arithmetic, is most of the
cost. Here T is applied to the rows of W or to those of x, whichever are fewer, in blocks that stay in the cache. Only x
is kept.

The factors' gradients need no further product with T. With z = T^T W^T g, what comes back to x by way of T, and
<z, x>_d (I_d, I_d) the sum of z x^T over all rows and all axes but d,

    A_d^T (gradient of A_d) = <z, x>_d

It takes factors that can be inverted, as those near the identity can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 17  # numbers of a block: half a MiB in fp32
LARGEST = 96  # neighbouring factors are multiplied out to at most this side: products of 8 and 10 alone are slow
RESIDUE = 1e-4  # of A^-1 A beside the identity, at most: in fp32 a condition of about a thousand


def kronecker_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    residual: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """W T x + up down x + bias for x (..., I) and `residual` (down, up), all of one dtype, fp32 or finer, on a CPU.

    None if a factor is so near to a singular matrix that gradients would be inexact.
    """
    factors = _multiplied_out(factors)
    inverses = [torch.linalg.inv_ex(factor.detach()).inverse for factor in factors]
    if not all(map(_inverts, inverses, factors)):
        return None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = _KroneckerLinear.apply(rows, weight, bias, *(residual or (None, None)), inverses, *factors)
    return y.view(*x.shape[:-1], len(weight))


def _multiplied_out(factors: Sequence[Tensor]) -> list[Tensor]:
    merged = list(factors[-1:])
    for factor in reversed(factors[:-1]):
        if len(factor) * len(merged[0]) <= LARGEST:
            merged[0] = torch.kron(factor, merged[0])
        else:
            merged.insert(0, factor)
    return merged


def _inverts(inverse: Tensor, factor: Tensor) -> bool:
    return torch.allclose(inverse @ factor, torch.eye(len(factor), dtype=factor.dtype), rtol=0, atol=RESIDUE)


class _KroneckerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, down: Any, up: Any, inverses: Any, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up, *factors)
        ctx.inverses = inverses
        if len(weight) < len(x):
            return F.linear(x, _whole(weight, down, up, factors), bias)
        y = F.linear(_turned(x, factors), weight, bias)
        return y if down is None else y.addmm_(x @ down.T, up.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, weight, down, up, *factors = ctx.saved_tensors
        if len(weight) < len(x):
            z = gradient @ _whole(weight, down, up, factors)
        else:
            z = _turned(gradient @ weight, [factor.T for factor in factors])
            z = z if down is None else z.addmm_(gradient @ up, down)
        sums = [torch.zeros_like(factor) for factor in factors]
        of_down: Any
        of_up: Any
        of_down, of_up = (None if factor is None else torch.zeros_like(factor) for factor in (down, up))
        for g, h, lines in zip(*(_blocks(tensor, x.shape[1]) for tensor in (gradient, z, x)), strict=True):
            _add_moments(sums, h, lines)
            if down is not None:
                of_up.addmm_(g.T, lines @ down.T)
                of_down.addmm_((g @ up).T, lines)
        if down is not None:
            _add_moments(sums, -down, of_down)  # what came by way of the residual
        of_factors = [inverse.T @ moment for inverse, moment in zip(ctx.inverses, sums, strict=True)]
        return z, None, None, of_down, of_up, None, *of_factors


def _whole(weight: Tensor, down: Any, up: Any, factors: Sequence[Tensor]) -> Tensor:
    """W T + up down."""
    turned = _turned(weight.contiguous(), [factor.T for factor in factors])
    return turned if down is None else turned.addmm_(up, down)


def _turned(rows: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The product of the factors on every row of (N, I)."""
    whole = torch.empty_like(rows)
    for block, out in zip(*(_blocks(tensor, rows.shape[1]) for tensor in (rows, whole)), strict=True):
        behind = 1
        for place, factor in reversed(list(enumerate(factors))):
            lines = _axis(block, len(factor), behind)
            target = _axis(out, len(factor), behind) if place == 0 else torch.empty_like(lines)
            if behind == 1:
                torch.mm(lines, factor.T, out=target)
            else:
                torch.bmm(factor.expand(len(lines), -1, -1), lines, out=target)
            block, behind = target, behind * len(factor)
    return whole


def _add_moments(sums: Sequence[Tensor], z: Tensor, x: Tensor) -> None:
    """Adds <z, x>_d of z, x (n, I) to the sum for each d."""
    behind = 1
    for total in reversed(sums):
        one, other = (_axis(tensor, len(total), behind) for tensor in (z, x))
        if behind == 1:
            total.addmm_(one.T, other)
        else:
            total += torch.bmm(one, other.transpose(1, 2)).sum(0)
        behind *= len(total)


def _axis(x: Tensor, side: int, behind: int) -> Tensor:
    """A view of (n, I) with one axis set apart from those before and behind it: (N, side, behind), or (N, side)."""
    return x.view(-1, side, behind) if behind > 1 else x.view(-1, side)


def _blocks(rows: Tensor, width: int) -> Iterator[Tensor]:
    """As many rows as with `width` numbers each stay in the cache."""
    return iter(rows.split(max(1, BLOCK // width)))
