"""What can be wrong between adapters beside their numbers: words, bases, and sizes out of all proportion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from studio.base import same_values
from studio.importing.source import Source

LAYER_OUTLIER = 10.0  # times the median layer of the same adapter
ADAPTER_OUTLIER = 4.0  # times the median adapter


def findings_before(sources: Sequence[Source]) -> list[str]:
    """From the cards alone: clashes of words, mismatches of bases and shapes."""
    found = []
    for one, other in combinations(sources, 2):
        found += [*_words(one, other), *_bases(one, other), *_shapes(one, other)]
    return found


def _words(one: Source, other: Source) -> list[str]:
    triggers = [{word for word in source.trigger.split(", ") if word} for source in (one, other)]
    found = [
        f"'{one.name}' and '{other.name}' have the same trigger word, '{w}'" for w in sorted(triggers[0] & triggers[1])
    ]
    for word in sorted(triggers[0] - triggers[1]):
        for second in sorted(triggers[1] - triggers[0]):
            if word in second or second in word:
                found.append(
                    f"of the trigger words '{word}' ('{one.name}') and '{second}' ('{other.name}') one holds the other"
                )
    learned = [{word for words in source.words().values() for word in words} for source in (one, other)]
    return found + [
        f"'{one.name}' and '{other.name}' have both learned the word '{word}', so they cannot be merged"
        for word in sorted(learned[0] & learned[1])
    ]


def _bases(one: Source, other: Source) -> list[str]:
    if one.identity is None or other.identity is None:
        return []
    pair = f"'{one.name}' was made for '{one.identity.name}', '{other.name}' for '{other.identity.name}'"
    if one.identity.architecture != other.identity.architecture:
        return [f"{pair}, which are built otherwise: they cannot be used together"]
    return [] if same_values(one.identity.values, other.identity.values) else [f"{pair}, which have other weights"]


def _shapes(one: Source, other: Source) -> list[str]:
    both = [site for site in one.shapes if site in other.shapes]
    wrong = [site for site in both if one.shapes[site].weight != other.shapes[site].weight]
    if wrong:
        return [f"'{one.name}' and '{other.name}' have other shapes at {len(wrong)} layers, first '{wrong[0]}'"]
    return [] if both else [f"'{one.name}' and '{other.name}' change no layer in common"]


def size_outliers(names: Sequence[str], sites: Sequence[str], norms: Tensor) -> list[str]:
    """`norms` (layers, K): Frobenius norms of the changes, 0 where an adapter leaves a layer alone."""
    found = []
    for number, name in enumerate(names):
        own = norms[:, number]
        middle = float(own[own > 0].median()) if bool((own > 0).any()) else 0.0
        large = (own > LAYER_OUTLIER * middle).nonzero().flatten().tolist() if middle else []
        if large:
            worst = max(large, key=lambda place: float(own[place]))
            found.append(
                f"'{name}' changes {len(large)} layers over {LAYER_OUTLIER:.0f} times as much as its median layer, "
                f"'{sites[worst]}' {float(own[worst]) / middle:.0f} times"
            )
    totals = norms.square().sum(0).sqrt()
    middle = float(totals.median()) if len(names) > 2 else float(totals.min())
    for name, whole in zip(names, totals.tolist(), strict=True):
        if middle and whole > ADAPTER_OUTLIER * middle:
            against = "the median adapter" if len(names) > 2 else "the other"
            found.append(f"'{name}' changes the base {whole / middle:.0f} times as much as {against}: lower its weight")
    empty = [name for name, whole in zip(names, totals.tolist(), strict=True) if whole == 0]
    return found + [f"'{name}' changes nothing" for name in empty]


def norms_of(inners: Sequence[Tensor]) -> Tensor:
    """(layers, K) from each layer's inner products (K, K)."""
    return torch.stack([inner.diagonal().clamp(min=0).sqrt() for inner in inners])
