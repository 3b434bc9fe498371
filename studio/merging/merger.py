"""Carrying out a plan, layer by layer, into a file or an adapter in memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from studio.adapter import HEADER_KEY, TOKENS, Adapter, adapter_from
from studio.deltas import Dense, LowRank, Sparse, WeightDelta, compress
from studio.deltas.patches import stored_terms
from studio.errors import AdapterError, RequestError
from studio.merging.plan import Guest, Plan
from studio.merging.report import MergeReport, Row
from studio.merging.spool import Spool, header_bytes

AUTO_TOLERANCE = 0.01  # of --rank auto, where no tolerance is given
Progress = Callable[[int, int], None]


class Merger:
    """The merge of a plan. Nothing is computed before `save` or `adapter`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = MergeReport(
            plan.choice.strategy, plan.options, plan.choice.reason, [], plan.parents(), warnings=plan.warnings
        )

    def save(self, path: Path | str, progress: Progress | None = None) -> MergeReport:
        """Writes the merged adapter, whole or not at all, and says what came of it. Raises AdapterError, DiskError."""
        path, began = Path(path).expanduser(), time.monotonic()
        header = {HEADER_KEY: self._card_text()}
        with Spool(path, self._expected_bytes(), header_bytes(self._expected_names(), header)) as spool:
            for name, value in self._tensors(progress):
                spool.add(name, value)
            spool.finish(header)
        self.report.path, self.report.bytes = path, path.stat().st_size
        self.report.seconds = time.monotonic() - began
        unit = 1 if sys.platform == "darwin" else 1024
        self.report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self.report

    def adapter(self) -> Adapter:
        """The merged adapter in memory."""
        return adapter_from(self.plan.card(), dict(self._tensors(None)))

    def _card_text(self) -> str:
        return json.dumps(self.plan.card().model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    def _tensors(self, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
        self.report.rows = []
        for number, site in enumerate(self.plan.shapes):
            for term, tensors in sorted(self._site(site).items()):
                for name, value in sorted(tensors.items()):
                    yield f"{site}.{term}.{name}", value
            if progress is not None:
                progress(number + 1, len(self.plan.shapes))
        for encoder, words in sorted(self.plan.words.items()):
            for word, vectors in sorted(words.items()):
                yield f"{encoder}.{TOKENS}.{word}", vectors

    @torch.no_grad()
    def _site(self, site: str) -> dict[str, dict[str, Tensor]]:
        guests, deltas, biases = self.plan.read(site)
        change = self._merged(site, guests, deltas) if deltas else None
        bias = None
        for weight, own in biases:
            bias = weight * own if bias is None else bias + weight * own
        terms = stored_terms(change, bias, torch.float32)
        for term, tensors in terms.items():
            for name, value in tensors.items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise AdapterError(f"the merge is not finite at '{site}' ({term}.{name})", "use smaller weights")
        return terms

    def _merged(self, site: str, guests: list[Guest], deltas: list[WeightDelta]) -> WeightDelta:
        plan = self.plan
        change = plan.strategy.rule(plan.meeting(site, guests, deltas), **plan.options)
        whole, error = change, 0.0
        rank, tolerance = self._aim(deltas, change)
        if rank is not None or tolerance:
            found = compress(change, rank, tolerance)
            if found.delta.rank * (change.height + change.width) < change.numel:
                change, error = found.delta, found.error
        norm = whole.norm()
        form, kept = _form(change)
        self.report.rows.append(Row(site, len(guests), form, kept, norm, error if error > 1e-7 else 0.0))
        return change

    def _aim(self, deltas: list[WeightDelta], change: WeightDelta) -> tuple[int | None, float | None]:
        """(rank, tolerance) to bring a result down to; (None, None) keeps it as it is.

        Unless asked otherwise, a strategy that fills every number of a weight comes down to the sum of its parents'
        ranks; `tolerance: 0` keeps it dense. Weights with one axis are left alone.
        """
        recipe = self.plan.recipe
        if len(change.shape) < 2:
            return None, None
        if recipe.rank == "auto":
            return None, recipe.tolerance if recipe.tolerance is not None else AUTO_TOLERANCE
        if recipe.rank is not None or recipe.tolerance is not None:
            return recipe.rank, recipe.tolerance
        if self.plan.choice.strategy == "svd":
            raise RequestError(
                "strategy 'svd' needs to know how far to go", "add --rank N, --rank auto or --tolerance X"
            )
        ranks = [low.rank for delta in deltas if (low := delta.low_rank()) is not None]
        return (sum(ranks), None) if self.plan.strategy.dense and len(ranks) == len(deltas) else (None, None)

    def _expected_names(self) -> dict[str, int]:
        """Names as long as most files have them, with their number of axes."""
        axes = {
            f"{site}.low_rank.{part}": len(shape.weight) for site, shape in self.plan.shapes.items() for part in "12"
        }
        words = {f"{encoder}.{TOKENS}.{word}": 2 for encoder, own in self.plan.words.items() for word in own}
        return axes | words

    def _expected_bytes(self) -> int:
        """An upper bound of the data: what all parents hold, or dense where that is smaller or the strategy is."""
        total = 0
        for site, shape in self.plan.shapes.items():
            dense = torch.Size(shape.weight).numel()
            own = sum(guest.source.numbers(site) for guest in self.plan.at(site))
            total += min(own, dense) + (shape.weight[0] if shape.bias else 0)
        return 4 * total


def _form(change: WeightDelta) -> tuple[str, int | None]:
    low = change if isinstance(change, LowRank) else None
    if low is not None and low.rank * (low.height + low.width) < low.numel:
        return "low-rank", low.rank
    return {Sparse: "sparse", Dense: "dense"}.get(type(change), "low-rank" if low is not None else "mixed"), None
