"""Orthogonal Adaptation: concepts trained apart whose updates can be summed (Po et al. 2023).

    delta W = A B^T,   A (O, R) trained from zero,   B (I, R) frozen with orthonormal columns

Two concepts do not meet where B_i^T B_j = 0. The paper draws each B as R random columns of one shared orthogonal
matrix per input width ("randomised orthogonal basis", section 4.2); here that matrix is D S: the orthonormal DCT-II
with its rows signed at random, whose columns need no decomposition and are the same on every machine. Which columns a
concept takes depends on the concept (data and trigger word), never on the run's seed, so that two people's concepts
differ. The update is not scaled by alpha / R: B's columns have norm 1, and alpha multiplies it as it is.
O out, I in (times the kernel for a convolution), R rank.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from studio.errors import PresetError
from studio.keyed import hashed_order, hashed_signs, torch_generator
from studio.lowrank import LowRankPatch
from studio.method import Origin, RankedMethod, register
from studio.patch import LayerShape

SHARED_BASIS = "studio-orthogonal-1"  # changing it would make new concepts meet the old ones


@register
class Orthogonal(RankedMethod):
    """Orthogonal Adaptation: frozen orthonormal down-projections, one set of directions per concept."""

    kind: Literal["orthogonal"] = "orthogonal"
    paper = "Po et al. 2023, Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv 2312.02432"
    learning_rate = 1e-3
    basis: Literal["subset", "gaussian"] = Field(
        "subset",
        description="Where B comes from: columns of a shared orthogonal matrix (paper), or independent Gaussian draws.",
    )

    def scale_at(self, name: str, rank: int) -> float:
        return super().scale_at(name, rank) if self.alpha is not None or self.alpha_pattern else 1.0

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> LowRankPatch:
        if shape.groups != 1:
            raise PresetError(f"orthogonal is not defined on '{name}': a convolution with {shape.groups} groups")
        rank = self.rank_at(name, shape)
        width = shape.in_features * int(np.prod(shape.kernel, dtype=int))
        if self.basis == "subset":
            rows = orthonormal_rows(width, rank, origin.concept, name)
        else:
            generator = torch_generator("orthogonal", origin.concept, name)
            rows = torch.randn(rank, width, generator=generator) / width**0.5
        down = rows.reshape(rank, shape.in_features, *shape.kernel)
        up = nn.Parameter(torch.zeros(shape.out_features, rank, *[1] * len(shape.kernel)))
        return LowRankPatch(shape, down, up, self.scale_at(name, rank))


def orthonormal_rows(width: int, rank: int, concept: str, name: str) -> Tensor:
    """B^T, (R, I): `rank` columns of the shared orthogonal matrix of this width, chosen by concept and site.

    Orthonormal to 1e-14 as constructed in fp64, to 1e-6 as returned in fp32.
    """
    columns = hashed_order(width, SHARED_BASIS, "columns", concept, name)[:rank]
    return torch.from_numpy(_shared_columns(width, columns)).T.contiguous().float()


def _shared_columns(width: int, columns: list[int]) -> np.ndarray:
    """Columns of diag(signs) C, C the orthonormal DCT-II: C[n, k] = sqrt(2 / I) cos(pi (n + 1/2) k / I)."""
    n, k = np.arange(width, dtype=np.int64)[:, None], np.asarray(columns, np.int64)[None, :]
    # The angle is pi j / 2I with an integer j: reduced to one turn first, cos is exact to the last bit or two.
    c = np.cos(np.pi * ((2 * n + 1) * k % (4 * width)) / (2 * width)) * np.sqrt(2.0 / width)
    c[:, np.asarray(columns) == 0] = np.sqrt(1.0 / width)
    return hashed_signs(width, SHARED_BASIS, "signs", width)[:, None] * c
