"""Going through the layers of several adapters, one layer at a time. No weight is built where the changes are thin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from studio.base import Base
from studio.deltas import LowRank, Overlaps, WeightDelta, thin_svd
from studio.importing.source import Source
from studio.inputs import Sketch
from studio.interference.activation import energies, weight_energy
from studio.interference.findings import findings_before
from studio.interference.measure import Tally
from studio.interference.report import Layer, Report
from studio.merging.calibration import Calibration

Progress = Callable[[int, int], None]


@torch.no_grad()
def survey(
    sources: Sequence[Source],
    base: Base | None = None,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """The report over two or more adapters. `base` is needed for changes that depend on its weights, and for drift.

    What the layers' inputs are comes from the calibration, else from the files. Raises AdapterError for files that
    cannot be read.
    """
    inputs = Inputs(sources, calibration)
    layers: list[Layer] = []
    sites = sorted({site for source in sources for site in source.shapes})
    for number, site in enumerate(sites):
        who = [k for k, source in enumerate(sources) if site in source.shapes and _same_shape(sources, site)]
        layers += [layer] if (layer := _layer(sources, site, who, base, inputs)) is not None else []
        if progress is not None:
            progress(number + 1, len(sites))
    return Report.of(sources, layers, findings_before(sources))


class Inputs:
    """What is known of the layers' inputs; `known` only where it is for all adapters."""

    def __init__(self, sources: Sequence[Source], calibration: Calibration | None) -> None:
        self.sources, self.calibration = sources, calibration
        self.known = calibration is not None or all(self._has_sketches(source) for source in sources)

    @staticmethod
    def _has_sketches(source: Source) -> bool:
        return any(source.sketch(site) is not None for site in source.shapes)

    def concepts(self, site: str) -> dict[int, Sketch]:
        """By the adapter's number."""
        calibration = self.calibration
        found = [calibration.concept(s, site) if calibration else s.sketch(site) for s in self.sources]
        return {k: sketch for k, sketch in enumerate(found) if sketch is not None}

    def generic(self, site: str) -> Sketch | None:
        if self.calibration is not None:
            return self.calibration.generic(site)
        return next((s for source in self.sources if (s := source.sketch(site, "base_sketch")) is not None), None)


def _same_shape(sources: Sequence[Source], site: str) -> bool:
    return len({source.shapes[site].weight for source in sources if site in source.shapes}) == 1


def _layer(sources: Sequence[Source], site: str, who: list[int], base: Base | None, inputs: Inputs) -> Layer | None:
    weights = _weights(base) if base is not None else None
    read = {k: sources[k].read(site, weights)[0] for k in who}
    thin = {k: _thin(change) for k, change in read.items() if change is not None}
    if not thin:
        return None
    found, index = Tally(len(sources), 1), torch.tensor(list(thin))
    block = (index[:, None], index[None, :])
    overlaps = Overlaps(list(thin.values()))
    found.inner[block] = overlaps.inner
    if len(thin) > 1:
        found.input_crossing[block] = overlaps.input_crossing
        found.output_crossing[block] = overlaps.output_crossing
        found.products[block] = overlaps.norms[:, None] * overlaps.norms[None, :]
        found.angle[block] = overlaps.smallest_angle
    if inputs.known:
        _look_at_inputs(found, inputs, site, thin, base)
    return Layer(site, list(thin), found)


def _look_at_inputs(found: Tally, inputs: Inputs, site: str, thin: dict[int, LowRank], base: Base | None) -> None:
    own, generic = inputs.concepts(site), inputs.generic(site)
    if own:
        acts = energies(list(thin.values()), list(own.values()))
        found.acts[torch.tensor(list(own))[:, None], torch.tensor(list(thin))[None, :]] = acts
    if generic is not None:
        found.generic[torch.tensor(list(thin))] = energies(list(thin.values()), [generic])[0]
        found.base = _base_energy(base, site, generic)


def _base_energy(base: Base | None, site: str, generic: Sketch) -> float:
    return weight_energy(_weights(base)(site), generic) if base is not None else 0.0


def _weights(base: Base) -> Callable[[str], Tensor]:
    def weight_of(site: str) -> Tensor:
        component, path = site.split(".", 1)
        weight: Tensor = base.components[component].get_parameter(f"{path}.weight")
        return weight.detach().cpu()

    return weight_of


def _thin(change: WeightDelta) -> LowRank:
    """As factors in fp32: its own, or by its SVD where it has none."""
    low = change.low_rank()
    if low is None:
        svd = thin_svd(change)
        low = LowRank(svd.right, svd.left * svd.singular, change.shape)
    return low.to(torch.float32)
