"""Who is nearest to whom: average-linkage clustering (Sokal and Michener 1958) of adapters by their overlap."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A leaf (`leaf` is its number) or two branches that join at a height."""

    height: float = 0.0
    leaf: int = -1
    parts: tuple[Branch, ...] = ()

    @property
    def leaves(self) -> list[int]:
        return [self.leaf] if not self.parts else [leaf for part in self.parts for leaf in part.leaves]


def dendrogram(distance: Tensor) -> Branch:
    """The tree over a symmetric (K, K) matrix of distances. Ties go to the lower numbers."""
    branches = [Branch(leaf=number) for number in range(len(distance))]
    while len(branches) > 1:
        height, i, j = min(
            (_between(one, other, distance), i, j)
            for i, one in enumerate(branches)
            for j, other in enumerate(branches[:i])
        )
        joined = Branch(height, parts=(branches[j], branches[i]))
        branches = [*(b for number, b in enumerate(branches) if number not in (i, j)), joined]
    return branches[0]


def _between(one: Branch, other: Branch, distance: Tensor) -> float:
    return float(distance[one.leaves][:, other.leaves].mean())
