"""Carrying out a plan, layer by layer, into a file or an adapter in memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from studio.adapter import HEADER_KEY, TOKENS, Adapter, Card, adapter_from
from studio.deltas import Dense, LowRank, Sparse, WeightDelta, compress
from studio.deltas.coding import Code, coding_error
from studio.deltas.patches import stored_terms
from studio.errors import AdapterError, RequestError
from studio.importing.tensor_file import all_finite
from studio.merging.plan import Guest, Plan
from studio.merging.report import EXACT, MergeReport, Row
from studio.merging.spool import Spool, header_bytes

KEEPS_BLOCKS = ("sum", "gram")  # strategies whose result has each adapter's columns side by side
FACTORED = "gram"  # whose result has them even where dense is smaller: no parent can be subtracted from it
MIXED = -1  # in the card: a parent's share of a layer is in one with the others'
AUTO_TOLERANCE = 0.01  # of --rank auto, where no tolerance is given
Progress = Callable[[int, int], None]


class Merger:
    """The merge of a plan. Nothing is computed before `save` or `adapter`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.code = Code.parse(plan.recipe.compress) if plan.recipe.compress else None
        self.ranks: dict[str, list[int]] = {}  # by site: of each guest's columns, 0 where it has none, else MIXED
        self.report = MergeReport(
            plan.choice.strategy, plan.options, plan.choice.reason, [], plan.parents(), warnings=plan.warnings
        )

    def save(self, path: Path | str, progress: Progress | None = None) -> MergeReport:
        """Writes the merged adapter, whole or not at all, and says what came of it. Raises AdapterError, DiskError."""
        path, began = Path(path).expanduser(), time.monotonic()
        header = {HEADER_KEY: self._card_text()}
        room = header_bytes(self._expected_names(), header) + self._room_for_ranks()
        with Spool(path, self._expected_bytes(), room) as spool:
            for name, value in self._tensors(progress):
                spool.add(name, value)
            spool.finish({HEADER_KEY: self._card_text()})
        self.report.path, self.report.bytes = path, path.stat().st_size
        self.report.seconds = time.monotonic() - began
        unit = 1 if sys.platform == "darwin" else 1024
        self.report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self.report

    def adapter(self) -> Adapter:
        """The merged adapter in memory."""
        tensors = dict(self._tensors(None))
        return adapter_from(self._card(), tensors)

    def _card(self) -> Card:
        """The plan's card with what the merging itself has brought: whose columns are whose, and the error."""
        card = self.plan.card()
        if self.report.rows:
            for number, parent in enumerate(card.parents):
                parent["ranks"] = [self.ranks[site][number] for site in self.plan.shapes]
            if self.report.error > EXACT:
                card.method["error"] = round(self.report.error, 9)
        return card

    def _card_text(self) -> str:
        return json.dumps(self._card().model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    def _room_for_ranks(self) -> int:
        return 40 + len(self.plan.guests) * (16 + 5 * len(self.plan.shapes))

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
        terms = stored_terms(change, bias, torch.float32, self.code, self.plan.choice.strategy == FACTORED)
        self.ranks[site] = self._ranks(guests, deltas, terms)
        if self.code is not None and isinstance(change, LowRank) and "low_rank" in terms:
            self._add_error(coding_error(change, terms["low_rank"]))
        for term, tensors in terms.items():
            for name, value in tensors.items():
                if not all_finite(value):
                    raise AdapterError(f"the merge is not finite at '{site}' ({term}.{name})", "use smaller weights")
        return terms

    def _ranks(self, guests: list[Guest], deltas: list[WeightDelta], terms: dict[str, dict[str, Tensor]]) -> list[int]:
        """How many columns of the result are each guest's own, in the order of the guests."""
        low = [delta.low_rank() for delta in deltas]
        own = {id(guest): part.rank for guest, part in zip(guests, low, strict=True) if part is not None}
        factors = terms.get("low_rank", {})
        kept = factors["up"].shape[1] if "up" in factors else len(factors.get("down_scales", ()))
        whole = self.plan.choice.strategy in KEEPS_BLOCKS and len(own) == len(guests) and kept == sum(own.values())
        present = {id(guest) for guest in guests}
        return [(own[id(g)] if whole else MIXED) if id(g) in present else 0 for g in self.plan.guests]

    def _add_error(self, coding: float) -> None:
        """Of the code, beside that of a lower rank: two errors in directions of their own."""
        row = self.report.rows[-1]
        self.report.rows[-1] = replace(row, error=(row.error**2 + coding**2) ** 0.5)

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
            kept = own if self.plan.choice.strategy == FACTORED else min(own, dense)
            total += kept + (shape.weight[0] if shape.bias else 0)
        return 4 * total


def _form(change: WeightDelta) -> tuple[str, int | None]:
    low = change if isinstance(change, LowRank) else None
    if low is not None and low.rank * (low.height + low.width) < low.numel:
        return "low-rank", low.rank
    return {Sparse: "sparse", Dense: "dense"}.get(type(change), "low-rank" if low is not None else "mixed"), None
