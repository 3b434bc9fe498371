"""TLoRA: a layer's input transformed by a tensor-ring matrix, plus a residual (Tao et al. 2025).

    W = W_0 T + s D,    y = W_0 (x + (T - 1) x) + s D x,    s = alpha / sqrt(R)

T (I, I) acts on the input, and starts as the identity: a ring of D = 3 cores (I_d, I_d, Q, Q) or 1 + U V^T. D is a LoRA
(the paper's TLoRA*) or a ring of cores (O_d, R, R) and (I_d, R, R) (TLoRA). The paper has linear layers; on a
convolution T acts on the input channels, which commutes with any padding, and the kernel is one more side of D.
O out, I in, R rank of the residual, Q rank of the transform, K kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from studio.errors import PresetError
from studio.functional import CONVOLUTIONS, convolve
from studio.keyed import torch_generator
from studio.kronecker import kronecker_linear
from studio.method import Origin, PatchMethod, register
from studio.patch import Delta, LayerCall, LayerShape, Patch
from studio.tensor_ring import cut_ring, ring_shift, sides_of, transposed

LARGEST_SIDE = 64  # a side costs its square; the paper's largest is 16


class TLoraPatch(Delta):
    """Its tensors say what it is: for the transform E1, E2, ... or U and V, for the residual down and up or B1, C1, ...

    `spread` says where T's identity sits in its cores (see studio/tensor_ring.py).
    """

    down: Tensor
    up: Tensor
    U: Tensor
    V: Tensor

    def __init__(self, shape: LayerShape, tensors: Mapping[str, Tensor], scale: float, spread: bool = False) -> None:
        super().__init__()
        self.shape, self.scale, self.spread = shape, scale, spread
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))
        self.depends_on_weight = "U" in tensors or "E1" in tensors

    def cores(self, letter: str) -> list[Tensor]:
        """The cores E1, E2, ... of one letter, in order."""
        count = sum(name[0] == letter for name in self._parameters)
        return [getattr(self, f"{letter}{d}") for d in range(1, count + 1)]

    @property
    def rank(self) -> int:
        """That of the residual as a matrix; 0 without one."""
        factors = self.residual()
        return len(factors[0]) if factors else 0

    # -- the transform ---------------------------------------------------------------------------------------------

    def input_term(self, x: Tensor, call: LayerCall) -> Tensor | None:
        if not self.depends_on_weight:
            return None
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        places = math.prod(x.shape[-len(self.shape.kernel) :]) if self.shape.kernel else 1
        channels = x.to(dtype).reshape(-1, self.shape.in_features, places)  # groups count as samples
        return self._shift(channels).reshape(x.shape)

    def _shift(self, x: Tensor, transpose: bool = False) -> Tensor:
        """(T - 1) x, or (T^T - 1) x, for x (B, I, S)."""
        if "U" not in self._parameters:
            cores = self.cores("E")
            return ring_shift(x, transposed(cores) if transpose else cores, self.spread)
        u, v = (factor.to(x.dtype) for factor in ((self.V, self.U) if transpose else (self.U, self.V)))
        return (x[:, :, 0] @ v @ u.T)[:, :, None] if x.shape[2] == 1 else u @ (v.T @ x)

    def whole(self, x: Tensor, call: LayerCall) -> Tensor | None:
        """With a ring of rank 1, a Kronecker product, on a frozen linear layer on a CPU; where 1 + E keeps E."""
        layer, cores = call.layer, self.cores("E")
        if type(layer) is not nn.Linear or not cores or cores[0].shape[2] > 1 or x.device.type != "cpu":
            return None
        precise = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        if not precise or not x.dtype == layer.weight.dtype == cores[0].dtype:
            return None
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return None
        factors = [core[:, :, 0, 0] + torch.eye(len(core), dtype=x.dtype) for core in cores]
        return kronecker_linear(x, layer.weight, layer.bias, factors, self.residual())

    # -- the residual ----------------------------------------------------------------------------------------------

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor | None:
        factors = self.residual()
        if factors is None:
            return None
        down, up = factors
        if self.shape.kind == "linear":
            return F.linear(F.linear(x, down), up)
        inner = convolve(self.shape, x, down.repeat(self.shape.groups, *[1] * (down.ndim - 1)))
        return CONVOLUTIONS[self.shape.kind](inner, up, groups=self.shape.groups)

    def residual(self) -> tuple[Tensor, Tensor] | None:
        """(down (R, I, k...), up (O, R, 1...)) of s D, with R^2 for R if it is a ring; None where there is none."""
        ones = [1] * len(self.shape.kernel)
        if "down" in self._parameters:
            return self.down, self.up * self.scale
        outs, ins = self.cores("B"), self.cores("C")
        if not outs:
            return None
        up, down = cut_ring(outs, ins)
        return down.view(-1, *self.shape.weight[1:]), (up * self.scale).view(*up.shape, *ones)

    # -- in weight space -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        """W_0 (T - 1) + s D, the transform applied to the weight's rows."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factors = self.residual()
        total: Tensor | None = None
        if self.depends_on_weight:
            rows = weight.reshape(len(weight), self.shape.in_features, -1)
            total = self._shift(rows, transpose=True).reshape(len(weight), -1)
        if factors is not None:
            down, up = (factor.to(weight.device, weight.dtype).flatten(1) for factor in factors)
            total = up @ down if total is None else total.addmm_(up, down)
        assert total is not None  # without a transform and a residual there is no such patch
        return total.view(weight.shape)

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The residual, which is all there is without a transform."""
        return None if self.depends_on_weight else self.residual()

    @torch.no_grad()
    def low_rank_of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """With T = 1 + U V^T also the transform: up = W_0 U, down = V^T; of rank Q K for a kernel of K places."""
        if not self.depends_on_weight:
            return self.low_rank()
        if "U" not in self._parameters:
            return None
        rank, places = self.U.shape[1], math.prod(self.shape.kernel)
        spread = torch.eye(places, dtype=self.V.dtype, device=self.V.device)
        down = (self.V.T[:, None, :, None] * spread[None, :, None, :]).reshape(-1, *self.shape.weight[1:])
        rows = weight.to(self.U).flatten(2) if self.shape.kernel else weight.to(self.U)[:, :, None]
        up = torch.einsum("oik,iq->oqk", rows, self.U).reshape(-1, rank * places, *[1] * len(self.shape.kernel))
        own = self.residual()
        return (down, up) if own is None else (torch.cat([down, own[0]]), torch.cat([up, own[1]], 1))


@register
class TLora(PatchMethod):
    """A full-rank transform of each layer's input from very few numbers, plus a small residual."""

    kind: Literal["tlora"] = "tlora"
    paper = "Tao et al. 2025, Transformed Low-Rank Adaptation via Tensor Decomposition, arXiv 2501.08727"
    transform: Literal["ring", "low-rank", "none"] = Field(
        "ring",
        description="Transform of the input: a tensor ring (paper; exports as merged weights or dense deltas), "
        "1 + U V^T (exports as LoRA), or none.",
    )
    transform_rank: int = Field(
        1,
        ge=1,
        le=1024,
        description="Rank of the transform, limited by the sides of the ring or the layer's width. A ring of rank 1 is "
        "a Kronecker product.",
    )
    residual: Literal["lora", "ring", "none"] = Field(
        "lora", description="What is added to the weight: a LoRA (the paper's TLoRA*) or a tensor ring (TLoRA)."
    )
    rank: int = Field(
        4,
        ge=1,
        le=4096,
        description="Rank of the residual, limited by the layer; a ring's rank as a matrix is its square.",
    )
    alpha: float = Field(1.0, gt=0, description="The residual is scaled by alpha / sqrt(rank).")
    init: Literal["repaired", "reference", "mup"] = Field(
        "repaired",
        description="Start: repaired (transform ranks above 1 can be used), reference (as the paper's code, where they "
        "cannot), mup (repaired, with the paper's variances).",
    )
    identity_penalty: float = Field(
        0.0,
        ge=0,
        description="Weight of the paper's penalty on the distance of a ring transform's cores from the identity.",
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.transform == "none" and self.residual == "none":
            raise ValueError("without a transform and a residual there is nothing to train")
        return self

    @property
    def has_low_rank_form(self) -> bool:
        return self.transform != "ring"

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> TLoraPatch:
        generator = torch_generator("tlora", origin.seed, name)
        tensors: dict[str, Tensor] = {}
        if self.transform == "low-rank":
            rank = min(self.transform_rank, shape.in_features)
            v = torch.randn(shape.in_features, rank, generator=generator) / (3 * shape.in_features) ** 0.5
            tensors |= {"U": torch.zeros(shape.in_features, rank), "V": v}
        elif self.transform == "ring":
            sides = transform_sides(name, shape)
            rank = min(self.transform_rank, *sides) if len(sides) > 1 else 1
            tensors |= {f"E{d}": core for d, core in enumerate(self._transform(sides, rank, generator), 1)}
        rank = self._residual_rank(shape)
        if self.residual == "lora":
            tensors |= self._lora(shape, rank, generator)
        elif self.residual == "ring":
            tensors |= self._ring(shape, rank, generator)
        return TLoraPatch(shape, tensors, self.alpha / rank**0.5, spread=self.init == "reference")

    def _transform(self, sides: tuple[int, ...], rank: int, generator: torch.Generator) -> list[Tensor]:
        """The E_d at the start; T is the identity. `reference`: all zero, so that every slice has the same gradient.

        Otherwise the slice (1, 1) is the identity and the others are random, but for what would change T: all of E_1,
        the first row of the cores between, and the corner of the last.
        """
        cores = [torch.zeros(side, side, rank, rank) for side in sides]
        if self.init == "reference" or rank == 1:
            return cores
        for d, (side, core) in enumerate(zip(sides, cores, strict=True)):
            if d:
                core.normal_(std=self._deviation(side, rank), generator=generator)
                core[:, :, 0, 0 if d == len(sides) - 1 else slice(None)] = 0
        return cores

    def _deviation(self, side: int, rank: int) -> float:
        """Of random slices of the transform: keeping the size of what they are applied to, or the paper's rule."""
        return rank**0.5 / (side * rank) if self.init == "mup" else (side * rank) ** -0.5

    def _residual_rank(self, shape: LayerShape) -> int:
        most = min(shape.out_features, math.prod(shape.weight[1:]))
        return min(self.rank, math.isqrt(most) if self.residual == "ring" else most)

    def _lora(self, shape: LayerShape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down normal, up zero. 1 / sqrt(3 I) is the code's kaiming_normal(a = sqrt 5)."""
        width = math.prod(shape.weight[1:])
        deviation = rank**0.5 / width if self.init == "mup" else (3 * width) ** -0.5
        down = torch.randn(rank, *shape.weight[1:], generator=generator) * deviation
        return {"down": down, "up": torch.zeros(shape.out_features, rank, *[1] * len(shape.kernel))}

    def _ring(self, shape: LayerShape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """B1 zero, the other cores normal, in the order of their indices. `repaired` keeps s D's size at any rank."""
        outs, ins = list(sides_of(shape.out_features)), list(sides_of(shape.in_features))
        if math.prod(shape.kernel) > 1:
            ins.append(math.prod(shape.kernel))
        width = math.prod(ins)
        tensors = {}
        for letter, sides in (("B", outs), ("C", ins)):
            for d, side in enumerate(sides, 1):
                deviation = {
                    "repaired": rank**-0.5 * (width**-0.5 if (letter, d) == ("C", 1) else 1.0),
                    "reference": side**0.5 / rank**2 if letter == "B" else side**-0.5,
                    "mup": rank**0.5 / (side * rank),
                }[self.init]
                core = torch.randn(side, rank, rank, generator=generator) * deviation
                tensors[f"{letter}{d}"] = torch.zeros_like(core) if (letter, d) == ("B", 1) else core
        return tensors

    def penalise(self, patches: Mapping[str, Patch], step: int, seed: int) -> None:
        """The paper's identity regulariser, over cores and slices: |A_d[r, r'] - P[r, r'] 1|_F = |E_d[r, r']|_F."""
        if not self.identity_penalty:
            return
        for patch in patches.values():
            for core in patch.cores("E") if isinstance(patch, TLoraPatch) else ():
                norm = core.detach().norm(dim=(0, 1), keepdim=True)
                pull = self.identity_penalty * core.detach() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
                core.grad = pull if core.grad is None else core.grad + pull


def transform_sides(name: str, shape: LayerShape) -> tuple[int, ...]:
    """The sides of a ring transform at a site. Raises PresetError for a width without small enough factors."""
    sides = sides_of(shape.in_features)
    if sides[-1] > LARGEST_SIDE:
        product = " x ".join(map(str, sides))
        raise PresetError(
            f"tlora: '{name}' is {shape.in_features} wide, which has no three sides of at most {LARGEST_SIDE} "
            f"(nearest: {product})",
            "leave it out of method.target_modules, or set method.transform to low-rank or none",
        )
    return sides
