"""The interference report: layers, groups of layers, everything together, findings and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import degrees
from typing import Any

from torch import Tensor

from studio.importing.source import Source
from studio.interference.findings import norms_of, size_outliers
from studio.interference.measure import Tally
from studio.interference.verdict import verdict


@dataclass(frozen=True)
class Layer:
    """One layer: which adapters change it, and the figures."""

    site: str
    who: list[int]
    figures: Tally


@dataclass
class Report:
    """`adapters` holds name, kind, trigger, base and layers of each; matrices go by their order."""

    adapters: list[dict[str, Any]]
    layers: list[Layer]
    groups: dict[str, Tally]
    total: Tally
    findings: list[str]
    verdict: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, sources: Sequence[Source], layers: list[Layer], findings: list[str]) -> Report:
        groups: dict[str, Tally] = {}
        total = Tally(len(sources))
        for layer in layers:
            name = group_of(layer.site)
            groups[name] = groups.get(name, Tally(len(sources))) + layer.figures
            total = total + layer.figures
        names = [source.name for source in sources]
        if layers:
            findings = findings + size_outliers(
                names, [layer.site for layer in layers], norms_of([layer.figures.inner for layer in layers])
            )
        adapters = [_about(source, float(norm)) for source, norm in zip(sources, total.norms, strict=True)]
        return cls(adapters, layers, groups, total, findings, verdict(names, total))

    @property
    def names(self) -> list[str]:
        return [adapter["name"] for adapter in self.adapters]

    def worst_layers(self, count: int) -> list[dict[str, Any]]:
        """Rows of the layers of most crosstalk, or, where that is not known, of most input overlap."""
        rows = [self.row(layer.site, layer.figures) for layer in self.layers]
        return sorted(rows, key=lambda row: (-(row["crosstalk"] or 0), -row["input_overlap"], row["where"]))[:count]

    def row(self, name: str, figures: Tally) -> dict[str, Any]:
        """The worst pair of a layer or group by each measure, as numbers for a table."""
        found: dict[str, Any] = {"where": name, "layers": figures.layers}
        measures = {
            "weight_cosine": figures.cosine,
            "input_overlap": figures.input_overlap,
            "output_overlap": figures.output_overlap,
            "crosstalk": figures.crosstalk,
        }
        for measure, matrix in measures.items():
            found[measure] = None if matrix is None else round(figures.worst(matrix)[0], 6)
        found["smallest_angle_degrees"] = round(degrees(_smallest(figures.angle)), 3)
        if len(self.adapters) > 2:
            i, j = figures.worst(figures.input_overlap)[1]
            found["pair"] = [self.names[i], self.names[j]] if i != j else None
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all pairs for everything together and for each group, the worst pair for each layer."""
        return {
            "verdict": self.verdict,
            "findings": self.findings,
            "adapters": self.adapters,
            "total": matrices(self.total),
            "groups": [self.row(name, one) | matrices(one) for name, one in self.groups.items()],
            "layers": [self.row(layer.site, layer.figures) for layer in self.layers],
        }


def _about(source: Source, norm: float) -> dict[str, Any]:
    return {
        "name": source.name,
        "kind": source.kind,
        "trigger": source.trigger,
        "base": source.identity.name if source.identity is not None else None,
        "layers": len(source.shapes),
        "norm": round(norm, 6),
    }


def _smallest(angles: Tensor) -> float:
    off = angles.clone()
    off.fill_diagonal_(float("inf"))
    return float(off.min()) if off.numel() > 1 else 0.0


def matrices(figures: Tally) -> dict[str, Any]:
    """Every measure of all pairs, as lists."""
    found: dict[str, Tensor | None] = {
        "weight_cosine": figures.cosine,
        "input_overlap": figures.input_overlap,
        "output_overlap": figures.output_overlap,
        "crosstalk": figures.crosstalk,
        "generic_share": figures.generic_share,
        "base_drift": figures.base_drift,
    }
    return {name: None if value is None else _rounded(value) for name, value in found.items()}


def _rounded(value: Tensor) -> Any:
    return [_rounded(row) for row in value] if value.ndim > 1 else [round(float(number), 6) for number in value]


def group_of(site: str) -> str:
    """The part of the model that a layer is in: `unet.down_blocks.1`, `unet.mid_block`, `text_encoder`."""
    parts = site.split(".")
    if parts[0].startswith("text_encoder"):
        return parts[0]
    return ".".join(parts[:3] if len(parts) > 2 and parts[2].isdigit() else parts[:2])
