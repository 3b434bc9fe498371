"""Orthogonal Adaptation: concepts trained apart whose updates can be summed (Po et al. 2023).

    delta W = A B^T,   A (O, R) trained from zero,   B (I, R) frozen with orthonormal columns

Two concepts do not meet where B_i^T B_j = 0. The paper draws each B as R random columns of one shared orthogonal
matrix per input width ("randomised orthogonal basis", section 4.2); here that matrix is D S: the orthonormal DCT-II
with its rows signed at random, whose columns need no decomposition and are the same on every machine. Which columns a
concept takes depends on the concept (data and trigger word), never on the run's seed, so that two people's concepts
differ. Random columns collide now and then; `slots` are columns that a ledger gives to one concept alone, and
`slots-null` the same among directions that the base hardly uses (ours). The update is not scaled by alpha / R: B's
columns have norm 1, and alpha multiplies it as it is.
O out, I in (times the kernel for a convolution), R rank, N width of the low-energy space.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from studio import slots
from studio.adapter import BaseIdentity, Card
from studio.attachment import Site
from studio.errors import AdapterError, PresetError
from studio.inputs import RECIPE, gram_width, low_energy_space
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
    basis: Literal["subset", "gaussian", "slots", "slots-null"] = Field(
        "subset",
        description="Where B comes from: random columns of a shared orthogonal matrix (paper), independent Gaussian "
        "draws, columns that a ledger gives to this concept alone, or such columns within the directions that the "
        "base's own inputs use least.",
    )
    slot: int | None = Field(None, ge=0, description="With slots: which one. Default: the next that is free.")
    null_share: float = Field(
        0.875, gt=0, le=1, description="slots-null: the share of all directions, those of least energy, to work in."
    )

    @field_validator("slot")
    @classmethod
    def _only_with_slots(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not str(info.data.get("basis", "slots")).startswith("slots"):
            raise ValueError(f"a slot has a meaning only with basis slots or slots-null, not {info.data['basis']}")
        return value

    # -- patches -----------------------------------------------------------------------------------------------

    @property
    def needs_inputs(self) -> bool:
        return self.basis == "slots-null"

    def scale_at(self, name: str, rank: int) -> float:
        return super().scale_at(name, rank) if self.alpha is not None or self.alpha_pattern else 1.0

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> LowRankPatch:
        if shape.groups != 1:
            raise PresetError(f"orthogonal is not defined on '{name}': a convolution with {shape.groups} groups")
        rank = self.rank_at(name, shape)
        down = self._rows(name, shape, rank, origin).reshape(rank, shape.in_features, *shape.kernel)
        up = nn.Parameter(torch.zeros(shape.out_features, rank, *[1] * len(shape.kernel)))
        return LowRankPatch(shape, down, up, self.scale_at(name, rank))

    def _rows(self, name: str, shape: LayerShape, rank: int, origin: Origin) -> Tensor:
        """B^T, (R, I), fp32."""
        width = shape.in_features * prod(shape.kernel)
        if self.basis == "subset":
            return orthonormal_rows(width, rank, origin.concept, name)
        if self.basis == "gaussian":
            generator = torch_generator("orthogonal", origin.concept, name)
            return torch.randn(rank, width, generator=generator) / width**0.5
        if self.slot is None:
            raise PresetError(f"orthogonal with basis {self.basis} has no slot yet", "set method.slot")
        places = range(self.slot * self.slot_rank, self.slot * self.slot_rank + rank)
        if places.stop > self.columns_at(shape):
            raise PresetError(f"slot {self.slot} of rank {self.slot_rank} does not fit '{name}'", "use a lower one")
        if self.basis == "slots":
            return _stored(slot_columns(width, places))
        if name not in origin.inputs:
            raise PresetError(f"slots-null needs the inputs of the base at '{name}'")
        return _stored(null_columns(origin.inputs[name], shape, self.null_share, places))

    def stored(self, name: str, shape: LayerShape, origin: Origin, tensors: Mapping[str, Tensor]) -> LowRankPatch:
        """As the file has it: B is stored, so neither the ledger nor the base's inputs are needed."""
        if not {"down", "up"} <= set(tensors):
            raise AdapterError(f"the adapter has no 'down' and 'up' at '{name}'")
        down, up = torch.empty_like(tensors["down"]), torch.empty_like(tensors["up"])
        rank, ones = down.shape[0], [1] * len(shape.kernel)
        if (*down.shape[1:], *up.shape) != (shape.in_features, *shape.kernel, shape.out_features, rank, *ones):
            raise AdapterError(f"the adapter's tensors at '{name}' are not of the shape that its card says")
        return LowRankPatch(shape, down, nn.Parameter(up), self.scale_at(name, rank))

    # -- slots -------------------------------------------------------------------------------------------------

    @property
    def slot_rank(self) -> int:
        """The columns that a slot has: the greatest rank at any site."""
        return max(self.rank, *self.rank_pattern.values(), 1)

    def columns_at(self, shape: LayerShape) -> int:
        """How many columns a layer has to give out."""
        width = shape.in_features * prod(shape.kernel)
        if self.basis != "slots-null":
            return width
        inner = gram_width(shape)
        return int(inner * self.null_share) * (width // inner)

    def bank(self, identity: BaseIdentity) -> slots.Bank:
        """Slots are the same on bases built alike, so fine-tunes share a bank; low-energy spaces are one base's own."""
        if self.basis == "slots":
            return slots.Bank(identity.name, identity.architecture, SHARED_BASIS)
        layout = f"{SHARED_BASIS}, {self.null_share:g} of {RECIPE}"
        return slots.Bank(identity.name, identity.architecture, layout, identity.values)

    def resolved(self, sites: Mapping[str, Site], identity: BaseIdentity, origin: Origin) -> Self:
        """With the slot settled: the wanted one if it is free, else this concept's own, else the next free one."""
        if not self.basis.startswith("slots"):
            return self
        width, narrowest = self._narrowest({name: site.shape for name, site in sites.items()})
        bank = self.bank(identity)
        slot = slots.choose(bank, origin.concept, self.slot_rank, width, narrowest, self.slot)
        return self.model_copy(update={"slot": slot})

    def begin(self, card: Card) -> None:
        """Writes the slot into the ledger. Raises PresetError if another training has taken it since the plan."""
        if self.slot is not None:
            width, _ = self._narrowest(card.sites)
            slots.claim(self.bank(card.base), card.concept, self.slot, self.slot_rank, width, card.trigger)

    def _narrowest(self, shapes: Mapping[str, LayerShape]) -> tuple[int, str]:
        """The fewest columns that any layer has, and its name."""
        return min((self.columns_at(shape), name) for name, shape in shapes.items())


# -- the shared matrices -------------------------------------------------------------------------------------------


def orthonormal_rows(width: int, rank: int, concept: str, name: str) -> Tensor:
    """B^T, (R, I): `rank` columns of the shared orthogonal matrix of this width, chosen by concept and site.

    Orthonormal to 1e-14 as constructed in fp64, to 1e-6 as returned in fp32.
    """
    columns = hashed_order(width, SHARED_BASIS, "columns", concept, name)[:rank]
    return _stored(_shared_columns(width, columns))


def slot_columns(width: int, places: range) -> np.ndarray:
    """(I, R): the columns at these places of the order in which slots are given out, the same for every layer."""
    return _shared_columns(width, _slot_order(width)[places.start : places.stop])


def null_columns(matrix: Tensor, shape: LayerShape, share: float, places: range) -> np.ndarray:
    """(I, R): slots in the `share` of directions with least energy under C, `matrix` (studio/inputs.py).

    Orthonormal and disjoint as `slot_columns`. For a convolution whose C is over channels only, these are the
    low-energy channels times all of the kernel's places.
    """
    inner, width = matrix.shape[0], shape.in_features * prod(shape.kernel)
    space = _null_space(_Matrix(matrix), int(inner * share))
    kernel = width // inner
    if kernel == 1:
        return space[:, places.start : places.stop]
    order = hashed_order(space.shape[1] * kernel, SHARED_BASIS, "pairs", space.shape[1], kernel)
    pairs = [divmod(one, kernel) for one in order[places.start : places.stop]]
    beside = _shared_columns(kernel, range(kernel))
    return np.stack([np.kron(space[:, one], beside[:, other]) for one, other in pairs], 1)


class _Matrix:
    """A matrix that equals another with the same content, so that layers with one input are decomposed once."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.content = matrix.detach().cpu().contiguous().numpy().tobytes()

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Matrix) and self.content == other.content


@lru_cache(maxsize=4)  # q, k and v follow one another
def _null_space(matrix: _Matrix, dimensions: int) -> np.ndarray:
    """(I, N): the orthonormal basis of the low-energy space that lies nearest to the first N shared columns.

    Eigenvectors of close eigenvalues turn into one another under rounding; the space that they span does not, and this
    basis depends on the space alone: N U V^T of the SVD of N^T G = U S V^T (Procrustes), G the shared columns.
    """
    space, _ = low_energy_space(matrix.matrix, dimensions)
    near = slot_columns(space.shape[0], range(dimensions))
    left, _, right = np.linalg.svd(space.numpy().T @ near)
    return space.numpy() @ (left @ right)


@lru_cache(maxsize=32)
def _slot_order(width: int) -> tuple[int, ...]:
    return tuple(hashed_order(width, SHARED_BASIS, "slots", width))


def _stored(columns: np.ndarray) -> Tensor:
    """B^T in fp32 from B in fp64."""
    return torch.from_numpy(columns).T.contiguous().float()


def _shared_columns(width: int, columns: Any) -> np.ndarray:
    """Columns of diag(signs) C, C the orthonormal DCT-II: C[n, k] = sqrt(2 / I) cos(pi (n + 1/2) k / I)."""
    n, k = np.arange(width, dtype=np.int64)[:, None], np.asarray(columns, np.int64)[None, :]
    # The angle is pi j / 2I with an integer j: reduced to one turn first, cos is exact to the last bit or two.
    c = np.cos(np.pi * ((2 * n + 1) * k % (4 * width)) / (2 * width)) * np.sqrt(2.0 / width)
    c[:, np.asarray(columns) == 0] = np.sqrt(1.0 / width)
    return hashed_signs(width, SHARED_BASIS, "signs", width)[:, None] * c
