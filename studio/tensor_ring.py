"""Tensor rings (Zhao et al. 2016): matrices and vectors as the trace of a product of small cores, never built densely.

A ring matrix of width I = I_1 ... I_D, indices row-major (the last the fastest):

    T[i, j] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D]),      A_d[i, j] = E_d[i, j] + [i = j] P,      E_d (I_d, I_d, R, R)

P (R, R) is constant, a projection of trace 1, so that E = 0 is T = 1: the corner (P[1, 1] = 1, else 0), or spread (all
entries 1 / R). What is computed is (T - 1) x, from differences alone, so that nothing cancels: E = 0 gives zeros in any
dtype. B batch, S places, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@lru_cache(maxsize=4096)
def sides_of(width: int) -> tuple[int, ...]:
    """Three sides, rising, whose product is `width`: those of least squares, or even ones at up to a quarter more.

    Gives the paper's 320 = 4 x 8 x 10, 640 = 8 x 8 x 10, 768 = 8 x 8 x 12, 1280 = 8 x 10 x 16, 2048 = 8 x 16 x 16.
    Sides of 1 are left out; a prime has only itself.
    """
    found = [
        (a, b, width // a // b) for a in _divisors(width) for b in _divisors(width // a) if a <= b <= width // a // b
    ]
    best = min(found, key=_squares)
    even = min((sides for sides in found if not any(side % 2 for side in sides)), key=_squares, default=best)
    chosen = even if 4 * _squares(even) <= 5 * _squares(best) else best
    return tuple(side for side in chosen if side > 1) or (1,)


def _squares(sides: Sequence[int]) -> int:
    return sum(side**2 for side in sides)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


# -- ring matrices -------------------------------------------------------------------------------------------------


def ring_shift(x: Tensor, cores: Sequence[Tensor], spread: bool = False) -> Tensor:
    """(T - 1) x for x (B, I, S), in x's dtype. `cores` are the E_d; `spread` chooses P.

    The axes behind the first are contracted to one of width K = I_2 ... I_D: then, for each value a of the index that
    the trace sums, D[b] = M[b] x on that axis and

        (T - 1) x = F x + sum_a,b A[b] D[b],   A[b] = A_1[a, b],   F = sum_a,b E_1[a, b] P[b, a]

    M (R, K, K) is the product of the other cores less its value at E = 0. Small products that a matrix unit likes: for
    I = 640 and R = 1 of 80 x 80 and 8 x 8. Only x is kept for the backward pass.
    """
    with torch.autocast(x.device.type, enabled=False):  # a chain of small products: kept exact
        first, *rest = [core.to(torch.promote_types(core.dtype, x.dtype)) for core in cores]
        if not rest:
            return _times(first.diagonal(dim1=2, dim2=3).sum(-1).to(x.dtype), x)
        projection = identity_place(first.shape[2], spread).to(first)
        matrices = ((first * projection.T).sum((2, 3)), _with_identity(first, projection), _rest(rest, projection))
        shifted: Tensor = _Shift.apply(x.contiguous(), *(matrix.to(x.dtype) for matrix in matrices))
        return shifted


def identity_place(rank: int, spread: bool = False) -> Tensor:
    """P (R, R), in fp64."""
    if spread:
        return torch.full((rank, rank), 1 / rank, dtype=torch.float64)
    corner = torch.zeros(rank, rank, dtype=torch.float64)
    corner[0, 0] = 1
    return corner


def transposed(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores of T^T."""
    return [core.transpose(0, 1) for core in cores]


def _with_identity(core: Tensor, projection: Tensor) -> Tensor:
    """A = E + 1 P as (R, I, I R): by a; rows i, columns (j, b)."""
    eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    return (core + eye[:, :, None, None] * projection).permute(2, 0, 1, 3).flatten(2)


def _rest(cores: Sequence[Tensor], projection: Tensor) -> Tensor:
    """M as (R, R K, K): by a; rows (b, k), columns k.

    From differences as well: M_D = E_D, M_d[b, a] = sum_c A_d[b, c] (x) M_{d+1}[c, a] + sum_c E_d[b, c] P[c, a] (x) 1.
    """
    m = cores[-1]
    for core in reversed(cores[:-1]):
        own, inner = (torch.eye(len(k), dtype=k.dtype, device=k.device)[:, :, None, None] for k in (core, m))
        m = _kron(core + own * projection, m) + _kron(core, inner * projection)
    return m.permute(3, 2, 0, 1).flatten(1, 2)


def _kron(one: Tensor, other: Tensor) -> Tensor:
    """sum_c one[b, c] (x) other[c, a]: (I, I, R, R) and (J, J, R, R) to (I J, I J, R, R)."""
    i, j, rank = len(one), len(other), one.shape[2]
    pairs = one.reshape(-1, rank) @ other.permute(2, 0, 1, 3).reshape(rank, -1)
    return pairs.view(i, i, rank, j, j, rank).permute(0, 3, 1, 4, 2, 5).reshape(i * j, i * j, rank, rank)


class _Shift(torch.autograd.Function):
    """x (B, P K, S), f (P, P), a (R, P, P R), m (R, R K, K). Recomputes the D[b] instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, a: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, f, a, m)
        total = _times(f, x.view(len(x), len(f), -1))
        for outer, inner in zip(a, m, strict=True):
            total = _times(outer, _inner(x, inner, outer), total)
        return total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, f, a, m = ctx.saved_tensors
        flow = gradient.reshape(len(x), len(f), -1)
        lines = x.view(-1, m.shape[2], x.shape[2])
        back, of_a, of_m = _times(f.T, flow), [], []
        for outer, inner in zip(a, m, strict=True):
            of_a.append(_outer(flow, _inner(x, inner, outer)))
            through = _times(outer.T, flow).view(len(lines), len(inner), -1)
            of_m.append(_outer(through, lines))
            back = _times(inner.T, through, back.view(lines.shape))
        return back.view(x.shape), _outer(flow, x.view(flow.shape)), torch.stack(of_a), torch.stack(of_m)


def _inner(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """D as the first axis reads it: (B, P R, K S)."""
    return _times(inner, x.view(-1, inner.shape[1], x.shape[2])).view(len(x), outer.shape[1], -1)


def _times(matrix: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """matrix (P, K) times each x (L, K, S); added to `onto` (L, P, S), in place, where given."""
    if x.shape[2] == 1:  # one product instead of L
        rows = x[:, :, 0]
        return (rows @ matrix.T if onto is None else onto[:, :, 0].addmm_(rows, matrix.T))[:, :, None]
    every = matrix.expand(len(x), -1, -1)
    return torch.bmm(every, x) if onto is None else onto.baddbmm_(every, x)


def _outer(one: Tensor, other: Tensor) -> Tensor:
    """sum over L and S of one (L, P, S) other (L, K, S): (P, K)."""
    if one.shape[2] == 1:
        return one[:, :, 0].T @ other[:, :, 0]
    return torch.bmm(one, other.transpose(1, 2)).sum(0)


# -- ring tensors --------------------------------------------------------------------------------------------------


def cut_ring(outs: Sequence[Tensor], ins: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(up (O, R^2), down (R^2, I)) with up @ down = D, for the ring tensor

        D[o, i] = tr(B_1[o_1] ... B_M[o_M] C_1[i_1] ... C_N[i_N]),   B_d (O_d, R, R), C_d (I_d, R, R)

    cut where B_1 begins and where C_1 begins.
    """
    with torch.autocast(outs[0].device.type, enabled=False):
        up, down = _product(outs), _product(ins)
    return up.flatten(1), down.permute(2, 1, 0).flatten(0, 1)


def _product(cores: Sequence[Tensor]) -> Tensor:
    """All products of one matrix from each core, (I_1 ... I_D, R, R)."""
    total = cores[0]
    for core in cores[1:]:
        n, size, _ = total.shape
        pairs = total.reshape(n * size, size) @ core.permute(1, 0, 2).reshape(size, -1)
        total = pairs.view(n, size, len(core), size).transpose(1, 2).reshape(-1, size, size)
    return total
