"""Putting an adapter on layers, taking it off, and merging it, beside what copying the layers' weights costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from studio.attachment import Site, attach, find_sites
from studio.bench.rows import Ratio, Row
from studio.bench.speed import Clock, processor_seconds, ratio, take_turns
from studio.bench.trainee import equal_method, fresh_patches, trainable_kinds
from studio.errors import StudioError
from studio.method import methods
from studio.patch import Delta, Patch

RANK, SHARE = 16, 0.05
CASES: dict[str, Callable[[], nn.ModuleDict]] = {
    "8 linear 1280": lambda: _layers(8, lambda: nn.Linear(1280, 1280)),
    "2 conv 640": lambda: _layers(2, lambda: nn.Conv2d(640, 640, 3, padding=1)),
}


def _layers(count: int, make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({f"layer{number}": make() for number in range(count)}).requires_grad_(False)


def measure(rounds: int, clock: Clock = processor_seconds) -> list[Row]:
    rows = []
    for case, make in CASES.items():
        for kind in trainable_kinds():
            sites = find_sites({"unet": make()})
            try:
                rows.append(_row(case, kind, sites, rounds, clock))
            except StudioError as error:
                rows.append(Row(case, kind, note=error.message))
    return rows


def _row(case: str, kind: str, sites: dict[str, Site], rounds: int, clock: Clock) -> Row:
    kinds = methods()[kind].kinds  # type: ignore[attr-defined]
    sites = {name: site for name, site in sites.items() if site.shape.kind in kinds}
    patches = fresh_patches(equal_method(kind, ("all",), RANK, SHARE), sites)
    _as_after_training(patches.values())
    weights = [site.module.weight for site in sites.values()]
    seconds = take_turns(
        {
            "copy": lambda: [weight.clone() for weight in weights],
            "attach and detach": lambda: attach(sites, {name: [patch] for name, patch in patches.items()}).detach(),
            "merge": lambda: [merged(patches[name], site.module.weight) for name, site in sites.items()],
        },
        rounds,
        clock,
    )
    ratios: dict[str, Ratio] = {what: ratio(seconds, what, "copy") for what in ("attach and detach", "merge")}
    trained = sum(p.numel() for patch in patches.values() for p in patch.parameters())
    return Row(case, kind, trained, {"copy_ms": 1e3 * sorted(seconds["copy"])[rounds // 2]}, ratios)


@torch.no_grad()
def merged(patch: Patch, weight: Tensor) -> Tensor:
    assert isinstance(patch, Delta)
    return weight + patch.delta(weight)


@torch.no_grad()
def _as_after_training(patches: object) -> None:
    generator = torch.Generator().manual_seed(0)
    for patch in patches:  # type: ignore[attr-defined]
        for parameter in patch.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
