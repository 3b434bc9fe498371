"""Taking a parent's share out of a merge again.

A sum and a gradient fusion keep each parent's columns side by side, and the card tells which are whose: they are cut
out exactly, without the parent. Where a sum has run together (a dense layer, a bias), the parent's change at its
strength is subtracted, which needs its file. What remains of a fusion is as it was weighed beside the parent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from studio import library
from studio.adapter import HEADER_KEY, TOKENS, Adapter, Card, adapter_from
from studio.deltas import total
from studio.deltas.patches import stored_terms
from studio.errors import RequestError, StudioError, nearest
from studio.importing.opening import open_sources
from studio.importing.own import AdapterFile
from studio.importing.source import Source
from studio.keyed import key_of
from studio.merging.merger import MIXED
from studio.merging.recipe import Part
from studio.merging.spool import Spool, header_bytes

SUMS = ("sum", "svd")


class Unmerger:
    """A merge without one of its parents. Nothing is computed before `save` or `adapter`."""

    def __init__(self, merged: str, parent: str) -> None:
        """`parent` is named as the card names it, by its trigger word, or by its file. Raises RequestError."""
        path = library.find(merged)
        (source,) = open_sources([str(path)], _no_base)
        if not isinstance(source, AdapterFile) or not source.card.parents:
            raise RequestError(f"'{merged}' is no merge, so nothing can be taken out of it")
        self.source, self.old = source, source.card
        self.number, self.parent = _find_parent(source.card, merged, parent)
        self.part = Part(adapter=parent, weight=self.facts["weight"], blocks=self.facts.get("blocks", {}))
        self.shapes = dict(source.card.sites)
        self.place = {site: number for number, site in enumerate(self.shapes)}
        self.kept: list[str] = []
        self._check()

    @property
    def facts(self) -> dict:
        return self.old.parents[self.number]

    def save(self, path: Path) -> Card:
        """Writes what remains, whole or not at all. Raises DiskError."""
        header = {HEADER_KEY: _text(self.old)}
        names = {name: len(entry.shape) for name, entry in self.source.file.entries.items()}
        with Spool(path, path.stat().st_size if path.exists() else 0, header_bytes(names, header)) as spool:
            for name, value in self._tensors():
                spool.add(name, value)
            card = self.card()
            spool.finish({HEADER_KEY: _text(card)})
        return card

    def adapter(self) -> Adapter:
        """What remains, in memory."""
        tensors = dict(self._tensors())
        return adapter_from(self.card(), tensors)

    def card(self) -> Card:
        """The card of what remains: the other parents, and the layers that they change."""
        others = [dict(p) for number, p in enumerate(self.old.parents) if number != self.number]
        for one in others:
            if "ranks" in one:
                one["ranks"] = [one["ranks"][self.place[site]] for site in self.kept]
        triggers = dict.fromkeys(one["trigger"] for one in others if one.get("trigger"))
        return self.old.model_copy(
            update={
                "parents": others,
                "sites": {site: self.shapes[site] for site in self.kept},
                "trigger": ", ".join(triggers),
                "concept": f"{key_of(*(one['sha256'] for one in others)):016x}",
            }
        )

    # -- before anything is computed -----------------------------------------------------------------------------

    def _rank(self, site: str) -> int:
        """The parent's columns at a site, MIXED where they are not told apart, 0 where it has none."""
        return self._rank_of_parent(self.number, site)

    def _rank_of_parent(self, number: int, site: str) -> int:
        ranks = self.old.parents[number].get("ranks")
        return MIXED if ranks is None else int(ranks[self.place[site]])

    def _is_alone(self, site: str) -> bool:
        """Whether no other parent changes the site's weight."""
        return not any(self._rank_of_parent(n, site) for n in range(len(self.old.parents)) if n != self.number)

    def _check(self) -> None:
        mixed = [site for site in self.shapes if self._rank(site) == MIXED and not self._is_alone(site)]
        biased = [site for site in self.shapes if "bias" in self.source.by_site.get(site, {})]
        if not (mixed or biased):
            return
        strategy = str(self.old.method.get("strategy"))
        where = f"at {len(mixed or biased)} layers, first '{(mixed or biased)[0]}'"
        if mixed and strategy not in SUMS:
            raise RequestError(
                f"'{strategy}' has mixed the parents {where}, so no share can be told apart",
                "merge the others anew",
            )
        if mixed and self.old.method.get("compress"):
            raise RequestError(
                f"the merge is compressed, and its parents run together {where}", "merge the others anew"
            )
        if mixed and strategy == "svd":
            raise RequestError(f"the merge was brought to a lower rank {where}", "merge the others anew")
        if self.parent is None:
            raise RequestError(
                f"the parents run together {where}, and the file of '{self.facts['name']}' is not the one merged",
                "name the parent's own file with --without",
            )

    # -- layer by layer ------------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        self.kept = []
        for site in self.shapes:
            terms = self._site(site)
            if terms:
                self.kept.append(site)
            for term, tensors in sorted(terms.items()):
                for name, value in sorted(tensors.items()):
                    yield f"{site}.{term}.{name}", value
        lost = self._lost_words()
        for encoder, words in sorted(self.source.words().items()):
            for word, vectors in sorted(words.items()):
                if word not in lost:
                    yield f"{encoder}.{TOKENS}.{word}", vectors

    def _lost_words(self) -> set[str]:
        own = {word for words in self.parent.words().values() for word in words} if self.parent is not None else set()
        return own | {self.facts.get("trigger", "")}

    @torch.no_grad()
    def _site(self, site: str) -> dict[str, dict[str, Tensor]]:
        stored = {
            term: {name: self.source.file.read(key) for name, key in own.items()}
            for term, own in self.source.by_site.get(site, {}).items()
        }
        rank, bias = self._rank(site), stored.pop("bias", {}).get("bias")
        if rank and self._is_alone(site):
            stored, rank = {}, 0
        elif rank > 0:
            stored["low_rank"] = _without(stored["low_rank"], self._span(site))
        if self.parent is not None and site in self.parent.shapes and (rank == MIXED or bias is not None):
            change, own_bias = self.parent.read(site, None)
            strength = self.part.at(site)
            if rank == MIXED and change is not None:
                whole, _ = self.source.read(site, None)
                left = change.scaled(-strength) if whole is None else total([whole, change.scaled(-strength)])
                stored = stored_terms(left, None, torch.float32)
            if bias is not None and own_bias is not None:
                bias = bias - strength * own_bias
        if bias is not None:
            stored["bias"] = {"bias": bias}
        return {term: tensors for term, tensors in stored.items() if tensors}

    def _span(self, site: str) -> slice:
        before = sum(self._rank_of_parent(number, site) for number in range(self.number))
        return slice(before, before + self._rank(site))


def _without(factors: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    """Factors, plain or coded, without some of their ranks: a plain `up` has them on its second axis."""
    kept = torch.cat([torch.arange(span.start), torch.arange(span.stop, _rank_of(factors))])
    return {
        name: (value.index_select(1, kept) if name == "up" else value.index_select(0, kept)).contiguous()
        for name, value in factors.items()
    }


def _rank_of(factors: dict[str, Tensor]) -> int:
    return len(factors["down"] if "down" in factors else factors["down_scales"])


def _find_parent(card: Card, merged: str, wanted: str) -> tuple[int, Source | None]:
    """Which parent is meant, and its file if that is at hand and the very one. Raises RequestError."""
    try:
        (file,) = open_sources([wanted], _no_base)
    except StudioError:
        file = None
    names = [(one["name"], one.get("trigger", ""), one["sha256"]) for one in card.parents]
    found = [n for n, (_, _, sha) in enumerate(names) if file is not None and sha == file.sha256]
    found = found or [n for n, (name, trigger, _) in enumerate(names) if wanted in (name, trigger)]
    if not found:
        raise RequestError(f"'{wanted}' is no parent of '{merged}'", nearest(wanted, [name for name, _, _ in names]))
    if len(found) > 1:
        raise RequestError(f"'{wanted}' names {len(found)} parents of '{merged}'", "name its file")
    same = file is not None and file.sha256 == names[found[0]][2]
    return found[0], file if same else None


def _no_base(name: str) -> NoReturn:
    raise RequestError("a file of another program is no merge of the studio")


def _text(card: Card) -> str:
    return json.dumps(card.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
