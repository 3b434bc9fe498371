"""The figures of one layer, and their sums over many.

Cosines and activations are exact for any set of layers taken together; overlaps are means over the layers, weighted by
how much the two change them. K adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Matrix = Tensor  # (K, K) fp64


def _zeros(count: int) -> Matrix:
    return torch.zeros(count, count, dtype=torch.float64)


@dataclass
class Tally:
    """Sums over layers. `sketched` says which adapters had sketches at every layer so far."""

    count: int
    layers: int = 0
    inner: Matrix = field(init=False)
    input_crossing: Matrix = field(init=False)
    output_crossing: Matrix = field(init=False)
    products: Matrix = field(init=False)  # of norms, at layers that both change
    angle: Matrix = field(init=False)  # smallest
    acts: Matrix = field(init=False)  # acts[i, j]: energy of change j on the inputs of concept i
    generic: Tensor = field(init=False)  # (K,): energy of a change on the base's own inputs
    base: float = 0.0  # energy of the base's own outputs there

    def __post_init__(self) -> None:
        for name in ("inner", "input_crossing", "output_crossing", "products", "acts"):
            setattr(self, name, _zeros(self.count))
        self.angle = torch.full((self.count, self.count), torch.pi / 2, dtype=torch.float64)
        self.generic = torch.zeros(self.count, dtype=torch.float64)

    @property
    def norms(self) -> Tensor:
        """(K,) Frobenius norms."""
        return self.inner.diagonal().clamp(min=0).sqrt()

    @property
    def cosine(self) -> Matrix:
        return _over(self.inner, self.norms[:, None] * self.norms[None, :])

    @property
    def input_overlap(self) -> Matrix:
        return _over(self.input_crossing, self.products)

    @property
    def output_overlap(self) -> Matrix:
        return _over(self.output_crossing, self.products)

    @property
    def crosstalk(self) -> Matrix | None:
        """[i, j]: how much j changes what the layers give on pictures of i, over what i itself changes; or None."""
        own = self.acts.diagonal()
        return _over(self.acts, own[:, None]).sqrt() if float(own.min()) > 0 else None

    @property
    def generic_share(self) -> Tensor | None:
        """(K,) How much a concept changes generic pictures, over how much it changes its own; None without sketches."""
        own = self.acts.diagonal()
        return (self.generic / own).sqrt() if float(own.min()) > 0 and float(self.generic.max()) > 0 else None

    @property
    def base_drift(self) -> Tensor | None:
        """(K,) The change of the layers' outputs on generic pictures, over those outputs; None without the base."""
        return (self.generic / self.base).sqrt() if self.base > 0 else None

    def worst(self, matrix: Matrix) -> tuple[float, tuple[int, int]]:
        """The largest magnitude between two different adapters, and which two."""
        off = (matrix - torch.diag(matrix.diagonal())).abs()
        place = int(off.argmax())
        return float(off.flatten()[place]), (place // self.count, place % self.count)

    def __add__(self, other: Tally) -> Tally:
        found = Tally(self.count, self.layers + other.layers)
        for name in ("inner", "input_crossing", "output_crossing", "products", "acts", "generic", "base"):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        found.angle = torch.minimum(self.angle, other.angle)
        return found


def _over(matrix: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, matrix / scale.clamp(min=1e-300), torch.zeros_like(matrix))
