"""Gram: gradient fusion (Gu et al. 2023, Mix-of-Show) in closed form, with a term that protects the base.

    W* = argmin  sum_i |(W0 + s_i D_i - W) X_i|^2 + keep_base |(W0 - W) X_b|^2 + eps |W0 - W|^2
    W* - W0 = sum_i s_i D_i C_i M^-1,     M = sum_i C_i + keep_base C_b + eps 1,     C = mean of x x^T

With D_i = U_i V_i the result is U_i (V_i C_i M^-1) side by side: the same up-projections, new down-projections, rank
the sum of the ranks. Mix-of-Show finds W* with LBFGS over all recorded inputs and has no term for the base.

The C are sketches V diag(e) V^T + r (1 - V V^T), so M is r_sum 1 plus low rank: solved by Woodbury's identity, or by
Cholesky where the sketches together are as wide as the input. For a convolution whose sketch is over channels only, M
acts on each place of the kernel.
I in, R rank, q width of a sketch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from studio.deltas import Dense, LowRank, WeightDelta, total
from studio.inputs import Sketch
from studio.merging.strategy import Meeting, strategy

Solve = Callable[[Tensor], Tensor]  # x (I, n) -> M^-1 x


@strategy("gram", needs_sketches=True)
def gram_fusion(
    meeting: Meeting,
    keep_base: Annotated[
        float, Field(ge=0, description="How much the base's own inputs weigh against a concept's.")
    ] = 0.3,
    eps: Annotated[float, Field(ge=0, description="Pull towards no change, as a fraction of M's mean energy.")] = 1e-3,
) -> WeightDelta:
    """Least squares over what the adapters' inputs are: each keeps its effect on its own, the base on its own."""
    if all(sketch is None for sketch in meeting.sketches):
        return total(meeting.scaled)  # norms, embeddings and biases have no such inputs
    known = [sketch for sketch in meeting.sketches if sketch is not None]
    solve = inverse_of(known, meeting.base_sketch, keep_base, eps)
    parts = []
    for delta, sketch in zip(meeting.scaled, meeting.sketches, strict=True):
        assert sketch is not None, "the plan refuses adapters of which only some have sketches"
        low = delta.low_rank()
        rows = delta.matrix() if low is None else low.down
        fused = weighed(rows, sketch, solve)
        parts.append(Dense(fused.reshape(delta.shape)) if low is None else LowRank(fused, low.up, delta.shape))
    return total(parts)


def weighed(rows: Tensor, sketch: Sketch, solve: Solve) -> Tensor:
    """rows C M^-1 for rows (R, N). C and M are symmetric, so it is (M^-1 C rows^T)^T, for each place of a kernel."""
    width = sketch.basis.shape[0]
    places = rows.shape[1] // width
    columns = rows.double().reshape(-1, width, places).permute(1, 0, 2).reshape(width, -1)
    solved = solve(sketch.times(columns)).reshape(width, -1, places).permute(1, 0, 2)
    return solved.reshape(rows.shape).to(rows.dtype)


_solved: OrderedDict[str, Solve] = OrderedDict()
KEPT = 4  # q, k and v of a block have one input; the sites of one come in a row


def inverse_of(sketches: Sequence[Sketch], base: Sketch | None, keep_base: float, eps: float) -> Solve:
    """x -> M^-1 x. Layers that share their inputs share the factorisation."""
    terms = [(1.0, sketch) for sketch in sketches] + ([(keep_base, base)] if base is not None and keep_base else [])
    key = _key(terms, eps)
    if key not in _solved:
        _solved[key] = _factorised(terms, eps)
        while len(_solved) > KEPT:
            _solved.popitem(last=False)
    return _solved[key]


def _key(terms: Sequence[tuple[float, Sketch]], eps: float) -> str:
    digest = hashlib.sha256(repr(eps).encode())
    for weight, sketch in terms:
        digest.update(repr(weight).encode())
        for value in (sketch.basis, sketch.energies, sketch.residual):
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _factorised(terms: Sequence[tuple[float, Sketch]], eps: float) -> Solve:
    """M = F F^T + rho 1, with F the bases scaled by the root of what they have above the residual."""
    width = terms[0][1].basis.shape[0]
    scaled, rho, trace = [], 0.0, 0.0
    for weight, sketch in terms:
        residual, energies = float(sketch.residual), sketch.energies.double()
        rho += weight * residual
        trace += weight * (float(energies.sum()) + residual * (width - len(energies)))
        scaled.append(sketch.basis.double() * (weight * (energies - residual)).clamp(min=0).sqrt())
    rho += eps * trace / width
    factor = torch.cat(scaled, 1)
    tiny = 1e-12 * trace / width  # no eps and no residual: the least-norm answer, as near as fp64 allows
    if factor.shape[1] >= width or rho <= tiny:
        return _by_eigenvalues(factor @ factor.T + rho * torch.eye(width, dtype=torch.float64))
    inner = torch.linalg.cholesky(rho * torch.eye(factor.shape[1], dtype=torch.float64) + factor.T @ factor)
    # Woodbury: M^-1 x = (x - F (rho 1 + F^T F)^-1 F^T x) / rho
    return lambda x: (x - factor @ torch.cholesky_solve(factor.T @ x, inner)) / rho


def _by_eigenvalues(matrix: Tensor) -> Solve:
    """By Cholesky, or where M is singular by its pseudo-inverse."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    size = float(matrix.diagonal().max())
    if not int(failed) and float(lower.diagonal().min()) ** 2 > 1e-10 * size:
        return lambda x: torch.cholesky_solve(x, lower)
    energies, vectors = torch.linalg.eigh(matrix)
    kept = energies > 1e-10 * energies[-1]
    vectors, energies = vectors[:, kept], energies[kept]
    return lambda x: vectors @ ((vectors.T @ x) / energies[:, None])
