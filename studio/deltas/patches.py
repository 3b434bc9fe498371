"""From patches to weight changes and back: how the algebra reads an adapter, and how its results are worn.

A fixed patch holds a finished change: low-rank, dense, sparse, or of the bias. Nothing of it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.deltas.coding import INT8_NAMES, TERNARY_NAMES, Code, decode
from studio.deltas.delta import WeightDelta
from studio.deltas.dense import Dense
from studio.deltas.lazy_sum import Sum, total
from studio.deltas.low_rank import LowRank
from studio.deltas.sparse import Sparse
from studio.errors import AdapterError
from studio.functional import convolve, look_up
from studio.lowrank import LowRankPatch
from studio.patch import Delta, InPlace, LayerCall, LayerShape, Patch


@torch.no_grad()
def change_of(patch: Patch, weight: Tensor | None = None) -> WeightDelta | None:
    """What a patch adds to the weight; None where it only changes the bias.

    `weight` is the layer's own, for patches whose delta depends on it. Raises AdapterError without it, and for patches
    that are no change of weights.
    """
    if not isinstance(patch, Delta):
        raise AdapterError(f"a {type(patch).__name__} is no change of weights, so it cannot be merged")
    if isinstance(patch, FixedBias):
        return None
    if isinstance(patch, InPlace):
        writes = patch.writes().get("weight")
        return None if writes is None else Sparse(writes[0].long(), writes[1], patch.shape.weight)
    factors = patch.low_rank() if weight is None else patch.low_rank_of(weight)
    if factors is not None:
        return LowRank.of(*factors)
    if weight is None:
        if patch.depends_on_weight:
            raise AdapterError("its change depends on the base's weights", "name the base with --base")
        shape: LayerShape = patch.shape  # type: ignore[assignment]
        weight = torch.zeros(()).expand(shape.weight)
    return Dense(patch.delta(weight.float()).detach())


class FixedLowRank(LowRankPatch):
    """A finished low-rank change; `down` and `up` as LoRA files have them."""

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        # Nothing of it is a Parameter, by which the attachment would know its precision.
        own = not x.is_floating_point() or torch.is_autocast_enabled(x.device.type)
        return super().output_term(x if own else x.to(self.down.dtype), y, call)


class FixedCoded(Delta):
    """A finished low-rank change in few bits (coding.py). It is decoded once, when first worn."""

    def __init__(self, shape: LayerShape, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.worn: FixedLowRank | None = None
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def rank(self) -> int:
        return len(self.get_buffer("down_scales"))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return decode(dict(self.named_buffers()), self.shape.weight).kernel_factors()

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        if self.worn is None or self.worn.down.device != x.device:
            down, up = self.low_rank()
            self.__dict__["worn"] = FixedLowRank(self.shape, down, up)  # no submodule: it is stored as codes alone
        assert self.worn is not None
        return self.worn.output_term(x, y, call)

    def delta(self, weight: Tensor) -> Tensor:
        return decode(dict(self.named_buffers()), self.shape.weight).dense().to(weight.device)


class FixedDense(Delta):
    """A finished change of every number of a weight, on a layer of any kind."""

    values: Tensor

    def __init__(self, shape: LayerShape, values: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("values", values)

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        return layer_with(self.shape, call, x, self.values)

    def delta(self, weight: Tensor) -> Tensor:
        return self.values.to(weight.device)


class FixedSparse(InPlace):
    """A finished change of few numbers of a weight. `index` holds flat positions, int32 where they fit."""

    index: Tensor
    values: Tensor

    def __init__(self, shape: LayerShape, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("index", index)
        self.register_buffer("values", values)

    def writes(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": (self.index.long(), self.values)}


class FixedBias(Delta):
    """A finished change of a layer's bias, (O,)."""

    bias: Tensor

    def __init__(self, shape: LayerShape, bias: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("bias", bias)

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        last = self.shape.kind == "linear" or isinstance(call.layer, nn.LayerNorm)
        bias = self.bias.to(y.dtype)
        return (bias if last else bias.reshape(-1, *[1] * (y.ndim - 2))).expand_as(y)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.float32)

    def bias_delta(self) -> Tensor:
        return self.bias


def layer_with(shape: LayerShape, call: LayerCall, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer of this shape gives with another weight and no bias. Every kind is linear in its weight."""
    layer: Any = call.layer
    if shape.kind == "embedding":
        return look_up(x, weight, call)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    if shape.kind == "linear":
        return F.linear(x, weight)
    if shape.kind == "norm":
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, None, layer.eps)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, layer.normalized_shape, weight, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    return convolve(shape, x, weight)


# -- the tensors of a merged adapter's file ------------------------------------------------------------------------


def stored_terms(
    change: WeightDelta | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    code: Code | None = None,
    factored: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """A change as it is written: term -> tensor name -> tensor, in the form that has the fewest numbers.

    With a code, low-rank changes are written in few bits; others stay as they are. `factored` keeps factors also where
    they have more numbers than the dense change.
    """
    terms: dict[str, dict[str, Tensor]] = {}
    for part in _storable(change, factored):
        if isinstance(part, LowRank) and code is not None:
            terms["low_rank"] = code.encode(part)
        elif isinstance(part, LowRank):
            down, up = part.kernel_factors()
            terms["low_rank"] = {"down": down.to(dtype), "up": up.to(dtype)}
        elif isinstance(part, Sparse):
            narrow = torch.int32 if part.numel < 2**31 else torch.int64
            terms["sparse"] = {"index": part.index.to(narrow), "values": part.values.to(dtype)}
        else:
            terms["dense"] = {"values": part.dense().to(dtype)}
    if bias is not None:
        terms["bias"] = {"bias": bias.to(dtype)}
    return terms


def _storable(change: WeightDelta | None, factored: bool) -> list[WeightDelta]:
    """Low-rank, sparse or dense terms with this sum; dense alone where that has no more numbers, unless `factored`."""
    if change is None:
        return []
    terms = []
    for term in change.terms if isinstance(change, Sum) else (change,):
        low = None if isinstance(term, Sparse | Dense) else term.low_rank()
        terms.append(term if low is None else low)
    together = total(terms)
    parts = list(together.terms) if isinstance(together, Sum) else [together]
    forms = all(isinstance(part, LowRank | Sparse) for part in parts)
    numbers = sum(value.numel() for part in parts for value in part.tensors())
    return parts if forms and (factored or numbers < change.numel) else [Dense(together.dense())]


def fixed_patch(name: str, shape: LayerShape, tensors: Mapping[str, Tensor]) -> Patch:
    """The patch with room for the tensors of one term of a merged adapter. Raises AdapterError for unknown ones."""
    empty = {key: torch.empty_like(value) for key, value in tensors.items()}
    if tuple(sorted(empty)) in (INT8_NAMES, TERNARY_NAMES):
        return FixedCoded(shape, empty)
    match sorted(empty):
        case ["down", "up"]:
            return FixedLowRank(shape, empty["down"], empty["up"])
        case ["index", "values"]:
            return FixedSparse(shape, empty["index"], empty["values"])
        case ["values"]:
            return FixedDense(shape, empty["values"])
        case ["bias"]:
            return FixedBias(shape, empty["bias"])
    raise AdapterError(f"'{name}' holds tensors that no merge writes: {', '.join(sorted(empty))}")
