"""An adapter seen as weight changes: per site, the sum of what its terms add to the weight.

O out, I in, R rank; the ranks of the terms on a site add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapter import Adapter
from studio.base import Base
from studio.deltas.patches import FixedDense
from studio.errors import AdapterError, ExportRefused, nearest
from studio.patch import Delta, InPlace, LayerShape

FEW_OUTPUTS = 16


@dataclass(frozen=True)
class SiteDelta:
    """The change of one weight. `shape` is None where the layer is neither linear nor a convolution."""

    name: str
    shape: LayerShape | None
    module: nn.Module
    terms: tuple[Delta, ...]

    @property
    def component(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def path(self) -> str:
        return self.name.split(".", 1)[1]

    @property
    def weight(self) -> Tensor:
        """The base's own weight, which an export never changes."""
        weight: Tensor = self.module.get_parameter("weight").detach()
        return weight

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The delta in fp64 on the CPU, of the weight's shape. Raises AdapterError if it is not finite."""
        weight = self.weight
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for term in self.terms:
            device = next((value.device for value in term.state_dict().values()), weight.device)
            total += term.delta(weight.to(device, torch.float32)).detach().double().cpu()
        if not total.isfinite().all():
            raise AdapterError(f"the delta at '{self.name}' is not finite")
        return total

    @torch.no_grad()
    def dense_bias(self) -> Tensor | None:
        """What is added to the bias, in fp64 on the CPU, or None where it stays. Raises AdapterError as `dense`."""
        changes = [change.detach().double().cpu() for term in self.terms if (change := term.bias_delta()) is not None]
        total = torch.stack(changes).sum(0) if changes else None
        if total is not None and not total.isfinite().all():
            raise AdapterError(f"the change of the bias at '{self.name}' is not finite")
        return total

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(down, up) of all terms side by side, with delta = up @ down; None if a term has no such form."""
        pairs = [term.low_rank_of(self.weight) or self._by_outputs(term) for term in self.terms]
        if any(pair is None for pair in pairs):
            return None
        downs, ups = zip(*[pair for pair in pairs if pair is not None], strict=True)
        return torch.cat([d.cpu().float() for d in downs], 0), torch.cat([u.cpu().float() for u in ups], 1)

    def _by_outputs(self, term: Delta) -> tuple[Tensor, Tensor] | None:
        """A dense change of few outputs, exactly: one rank for each. Merges keep such dense, as it is smaller."""
        if not isinstance(term, FixedDense) or self.shape is None or self.shape.out_features > FEW_OUTPUTS:
            return None
        down = term.values.detach().float()
        up = torch.eye(len(down)).reshape(len(down), len(down), *[1] * (down.ndim - 2))
        return down, up


def site_deltas(adapter: Adapter, base: Base) -> dict[str, SiteDelta]:
    """The weight changes of an adapter by site.

    Raises ExportRefused for patches that do not live in weight space, AdapterError for a site the base has not.
    """
    found = {}
    shapes = {name: site.shape for name, site in base.sites().items()}
    layers = {
        f"{component}.{path}": module
        for component, root in base.components.items()
        for path, module in root.named_modules()
    }
    for name, terms in adapter.patches.items():
        if name not in layers:
            raise AdapterError(f"site '{name}' is not in '{base.name}'", nearest(name, layers))
        deltas = tuple(patch for patch in terms.values() if isinstance(patch, Delta))
        if len(deltas) < len(terms):
            raise ExportRefused(
                f"'{adapter.card.method['kind']}' adds modules that are no change of weights (first at '{name}')",
                "such an adapter works only in the studio",
            )
        if all(isinstance(patch, InPlace) and not patch.writes() for patch in deltas):
            continue  # a sparse patch without entries here
        found[name] = SiteDelta(name, shapes.get(name), layers[name], deltas)
    return found
