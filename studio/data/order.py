"""Which example goes where: a pure function of (seed, index of the micro-batch), so that a resumed run goes on exactly.

Examples fall into buckets (anything hashable, such as sizes), and a batch holds one bucket only. An epoch shows every
example once and then fills incomplete batches by showing some of the same bucket again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

from studio.keyed import hashed_order


class Epoch(NamedTuple):
    """The batches of one epoch, and how many of their slots show an example again."""

    batches: list[list[int]]
    repeats: int


class Order:
    """Batches of `batch_size` example indices, all of one bucket, over all processes.

    With `prior` (the buckets of class pictures, whose indices follow those of the examples) each epoch has as many
    class pictures as examples. They are taken in turn, so that over epochs each is shown equally often.
    """

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int, prior: Sequence[Hashable] = ()) -> None:
        if not buckets or batch_size < 1:
            raise ValueError("an order needs examples and a batch size of at least 1")
        self.buckets, self.prior_start = [*buckets, *prior], len(buckets)
        self.batch_size, self.seed = batch_size, seed
        self.turns = [self.prior_start + i for i in hashed_order(len(prior), "prior turns", seed)]
        # Class pictures of several buckets change the number of batches, until the same ones come round again.
        period = len(prior) // math.gcd(len(prior), len(buckets)) if len(set(prior)) > 1 else 1
        self.ends = list(accumulate(self._batch_count(epoch) for epoch in range(period)))
        self._drawn: tuple[int, Epoch] | None = None

    def batch(self, index: int) -> list[int]:
        """The examples of the micro-batch `index`, counted from the start of the run."""
        epoch, place = self.locate(index)
        return self._epoch(epoch).batches[place]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place in it) of a micro-batch."""
        rounds, rest = divmod(index, self.ends[-1])
        within = bisect_right(self.ends, rest)
        return rounds * len(self.ends) + within, rest - (self.ends[within - 1] if within else 0)

    def batches(self, epoch: int = 0) -> int:
        """How many micro-batches an epoch has."""
        within = epoch % len(self.ends)
        return self.ends[within] - (self.ends[within - 1] if within else 0)

    def repeats(self, epoch: int = 0) -> int:
        """How many slots of an epoch show an example again because its bucket does not fill a batch."""
        return self._epoch(epoch).repeats

    # -- one epoch ---------------------------------------------------------------------------------------------

    def _class_pictures(self, epoch: int) -> list[int]:
        count = len(self.turns)
        return [self.turns[(epoch * self.prior_start + i) % count] for i in range(self.prior_start)] if count else []

    def _members(self, epoch: int) -> dict[Hashable, tuple[list[int], list[int]]]:
        """(examples, class pictures) to show by bucket, the latter perhaps several times."""
        members: dict[Hashable, tuple[list[int], list[int]]] = {}
        for index in [*range(self.prior_start), *self._class_pictures(epoch)]:
            kinds = members.setdefault(self.buckets[index], ([], []))
            kinds[index >= self.prior_start].append(index)
        return members

    def _batch_count(self, epoch: int) -> int:
        sizes = (len(examples) + len(prior) for examples, prior in self._members(epoch).values())
        return sum(-(-size // self.batch_size) for size in sizes)

    def _epoch(self, epoch: int) -> Epoch:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> Epoch:
        batches: list[list[int]] = []
        repeats = lead = 0  # lead: by how many repeats the examples are ahead of the class pictures
        buckets = sorted(enumerate(self._members(epoch).values()), key=lambda item: all(item[1]))
        for number, kinds in buckets:  # those of two kinds come last, for they can make up for the lead
            shuffled = [
                [kind[i] for i in hashed_order(len(kind), "members", self.seed, epoch, number, which)]
                for which, kind in enumerate(kinds)
            ]
            slots = _interleaved(*shuffled)
            taken = [0, 0]
            while len(slots) % self.batch_size:
                which = int(lead > 0) if all(shuffled) else int(not shuffled[0])
                # From the front, as the batch to be filled holds the end: no example is in it twice if they suffice.
                slots.append(shuffled[which][taken[which] % len(shuffled[which])])
                taken[which] += 1
                lead += -1 if which else 1
            repeats += sum(taken)
            batches += [slots[i : i + self.batch_size] for i in range(0, len(slots), self.batch_size)]
        shuffled_batches = hashed_order(len(batches), "batches", self.seed, epoch)
        return Epoch([batches[i] for i in shuffled_batches], repeats)


def _interleaved(first: list[int], second: list[int]) -> list[int]:
    """Both lists in their order, spread evenly, so that batches hold both kinds as far as they can."""
    placed = [
        ((i + 0.5) / len(items), which, i) for which, items in enumerate((first, second)) for i in range(len(items))
    ]
    return [(first, second)[which][i] for _, which, i in sorted(placed)]
