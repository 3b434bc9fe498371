"""FLoRA: the change of an N-dimensional weight as one small core and a factor per mode (Si et al. 2025, Tucker form).

    delta W = s G x_1 U_in x_2 U_out x_3 U_1 ...      G (r_in, r_out, r_1, ...) zero at the start

Linear: delta W[o, i] = s sum_pq G[p, q] U_in[i, p] U_out[o, q]. A k x k convolution has a factor for each axis of its
kernel too, so its structure in space is kept and the update is far smaller than conv-LoRA's. The factors start as in
the paper's code: normal with variance 1 / (2 r_n). s is a constant, not alpha / rank.

The forward pass never builds delta W: a convolution runs as 1 x 1 (U_in), k x k (the core with its kernel factors),
1 x 1 (U_out), with few channels in between. Grouped convolutions take I / groups for the in-mode and run densely: their
weights are small, and the factored form would not be faster.
I in (of one group), O out, k kernel size, r_n the rank of mode n; an embedding has N entries for I and width D for O.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import prod
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from studio.errors import PresetError
from studio.functional import convolve, look_up, pointwise
from studio.keyed import torch_generator
from studio.method import Origin, RankedMethod, matches, register
from studio.patch import Delta, LayerCall, LayerShape

KERNEL_RANK = 2  # the paper's, for every axis of a kernel
ModeRank = Annotated[int, Field(ge=1, le=4096)]
V = TypeVar("V")


@register
class Flora(RankedMethod):
    """FLoRA: a Tucker core with a factor for every mode of the weight, kernel axes included."""

    kind: Literal["flora"] = "flora"
    paper = (
        "Si et al. 2025, Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning "
        "(FLoRA), ICLR 2025, arXiv 2405.14739"
    )
    kinds = (*RankedMethod.kinds, "embedding")
    rank: int = Field(
        8, ge=1, le=4096, description="Rank of the in- and the out-mode, limited by their sides; kernel axes get 2."
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="If given, the update is also scaled by alpha / rank, as in the paper's language models.",
    )
    scale: float = Field(1.0, gt=0, description="The constant that the update is multiplied by (paper's example: 4).")
    linear_rank: tuple[ModeRank, ModeRank] | None = Field(
        None, description="(in, out) ranks of linear layers and embeddings. Default: rank for both."
    )
    conv_rank: tuple[ModeRank, ...] | None = Field(
        None,
        min_length=3,
        max_length=5,
        description="(in, out, kernel...) ranks of convolutions; one kernel rank stands for all its axes. "
        "Default: (rank, rank, 2).",
    )
    mode_rank_pattern: dict[str, tuple[ModeRank, ...]] = Field(
        {}, description="(in, out) or (in, out, kernel...) ranks for the sites whose name matches a pattern."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update.")

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> FloraPatch:
        ranks = self.ranks_at(name, shape)
        generator = torch_generator("flora", origin.seed, name)
        factors = [_fresh(side, rank, generator) for side, rank in zip(sides_of(shape), ranks, strict=True)]
        scale = self.scale_at(name, update_rank(ranks))
        return FloraPatch(shape, torch.zeros(ranks), factors, scale, self.dropout)

    def ranks_at(self, name: str, shape: LayerShape) -> tuple[int, ...]:
        """(r_in, r_out, *kernel) at a site, none above its side: the most specific setting that applies.

        Raises PresetError where ranks are given for another number of modes.
        """
        own = self.linear_rank if len(shape.weight) == 2 else self.conv_rank
        rank = _first(self.rank_pattern, name)
        by_rank = (rank or self.rank, rank or self.rank, *[KERNEL_RANK] * len(shape.kernel))
        wanted = _first(self.mode_rank_pattern, name) or (own if rank is None else None) or by_rank
        if len(wanted) == 3:
            wanted = (*wanted[:2], *wanted[2:] * max(1, len(shape.kernel)))
        sides = sides_of(shape)
        if len(wanted) != len(sides):
            modes = "in, out" + "".join(f", kernel axis {axis + 1}" for axis in range(len(shape.kernel)))
            raise PresetError(
                f"flora needs {len(sides)} ranks for '{name}' ({shape.kind}), and {list(wanted)} has {len(wanted)}",
                hint=f"give one each for {modes}" + ("; or (in, out, kernel)" if shape.kernel else ""),
            )
        return tuple(map(min, wanted, sides))

    def scale_at(self, name: str, rank: int) -> float:
        by_alpha = self.alpha is not None or bool(self.alpha_pattern) or self.rslora
        return self.scale * (super().scale_at(name, rank) if by_alpha else 1.0)


def _fresh(side: int, rank: int, generator: torch.Generator) -> Tensor:
    """A factor at its start. On a side of 1 it could only rescale the core, so it is 1 and not a random number."""
    return torch.ones(1, 1) if side == 1 else torch.randn(side, rank, generator=generator) * (2 * rank) ** -0.5


def _first(pattern_values: Mapping[str, V], name: str) -> V | None:
    return next((value for pattern, value in pattern_values.items() if matches(name, pattern)), None)


def sides_of(shape: LayerShape) -> tuple[int, ...]:
    """The sides of the modes in the paper's order, (in, out, *kernel); an embedding is a linear map of one-hot rows."""
    if shape.kind == "embedding":
        return shape.weight
    return (shape.in_features, shape.out_features, *shape.kernel)


def update_rank(ranks: tuple[int, ...]) -> int:
    """The rank that an update of these mode ranks can have as a matrix (O, I k...)."""
    r_in, r_out, *kernel = ranks
    return min(r_out, r_in * prod(kernel))


class FloraPatch(Delta):
    """`core` (r_in, r_out, *r_k), `u_in` (I, r_in), `u_out` (O, r_out) and `u_1`, `u_2`, ... (k, r_k), all trained.

    Axes of the kernel that are one pixel long have no factor.
    """

    def __init__(
        self, shape: LayerShape, core: Tensor, factors: list[Tensor], scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        self.core = nn.Parameter(core)
        self.u_in, self.u_out = nn.Parameter(factors[0]), nn.Parameter(factors[1])
        kernel = {f"u_{axis}": factor for axis, factor in enumerate(factors[2:], 1) if len(factor) > 1}
        for name, factor in kernel.items():
            self.register_parameter(name, nn.Parameter(factor))
        self.kernel_names = tuple(kernel)
        self.dropout = nn.Dropout(dropout) if dropout and shape.kind != "embedding" else None

    @property
    def rank(self) -> int:
        return update_rank(tuple(self.core.shape))

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        # The products among factors are tiny beside x: they keep full precision whatever autocast says of the others.
        with torch.autocast(x.device.type, enabled=False):
            stages = self._stages()
        if self.shape.kind == "linear":
            return F.linear(F.linear(x, stages[0]), stages[1])
        if self.shape.kind == "embedding":
            return F.linear(look_up(x, self.u_in, call), stages[1])
        for weight in stages:
            x = pointwise(x, weight, len(self.shape.kernel)) if weight.ndim == 2 else convolve(self.shape, x, weight)
        return x

    def _stages(self) -> list[Tensor]:
        """What x passes one after the other: two matrices, or two around the convolution with the core."""
        core = self._kernel_core()
        if self.shape.groups != 1:
            return [self._dense(core)]
        if self.kernel_names:
            return [self.u_in.T, core.transpose(0, 1), self.u_out]
        # Else the core goes into the side of the higher rank, so that the fewest channels lie in between.
        pixel = core.shape[2:]
        mixer = core.flatten(1).T  # (r_out, r_in)
        if self.shape.kind == "embedding" or mixer.shape[0] >= mixer.shape[1]:
            return [self.u_in.T, (self.u_out @ mixer).reshape(-1, mixer.shape[1], *pixel)]
        return [mixer @ self.u_in.T, self.u_out.reshape(-1, mixer.shape[0], *pixel)]

    def _kernel_core(self) -> Tensor:
        """s G x_3 U_1 x_4 U_2 ..., (r_in, r_out, *k)."""
        if not self.kernel_names:
            return self.core * self.scale
        return (self.core.flatten(2) @ (self._kernel_factors() * self.scale).T).unflatten(2, self.shape.kernel)

    def _kernel_factors(self) -> Tensor:
        """The Kronecker product of the factors of the kernel's axes, (k_1 k_2 ..., r_1 r_2 ...)."""
        factors: list[Tensor] = [self.get_parameter(name) for name in self.kernel_names]
        return reduce(torch.kron, factors)

    def _down(self, core: Tensor) -> Tensor:
        """The core with its kernel, and now the in-mode at its full side: (r_out, I, *k)."""
        return (self.u_in @ core.flatten(1)).unflatten(1, core.shape[1:]).transpose(0, 1)

    def _dense(self, core: Tensor) -> Tensor:
        """delta W in the modes' order (O, I, *k): the small products come first."""
        down = self._down(core)
        return (self.u_out @ down.flatten(1)).unflatten(1, down.shape[1:])

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        delta = self._dense(self._kernel_core())
        delta = delta.T if self.shape.kind == "embedding" else delta
        return delta.to(weight.device, torch.promote_types(delta.dtype, torch.float32))

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Exact, of rank min(r_out, r_in r_1 r_2 ...): `up` is the out-mode, or `down` all the others."""
        if self.shape.groups != 1:
            return None
        down, up = self._down(self._kernel_core()), self.u_out.detach()
        if self.rank < up.shape[1]:
            others = torch.kron(self.u_in, self._kernel_factors()) if self.kernel_names else self.u_in
            down = others.T.reshape(-1, self.u_in.shape[0], *self.shape.kernel)
            up = self.u_out @ (self.core.transpose(0, 1).flatten(1) * self.scale)
        if self.shape.kind == "embedding":
            return up.T.float().contiguous(), down.T.float().contiguous()
        return down.float().contiguous(), up[(..., *[None] * len(self.shape.kernel))].float().clone()
