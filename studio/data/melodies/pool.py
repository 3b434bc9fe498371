"""Pieces kept ready for a training, as waves or as codes, a few of them renewed at each step.

What a pool holds at a step is a function of (seed, step) alone, so a resumed run finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from studio.data.cache import Cache
from studio.keyed import numpy_generator

CHUNK = 16  # pieces encoded at a time


class MelodyPool:
    """`size` rows with their captions, of which `refresh` are drawn anew at each step, in turn.

    `draw` gives the wave (C, T) and the caption of a key, `encode` turns waves (B, C, T) into the rows that are kept; C
    is 1, or how many kindred pieces make one row.
    With a `cache` the first filling is kept on disk, too; `source` tells what its rows depend on beside their keys.
    """

    def __init__(
        self,
        draw: Callable[[tuple[object, ...]], tuple[Tensor, str]],
        encode: Callable[[Tensor], Tensor],
        size: int,
        refresh: int,
        seed: int,
        cache: Cache | None = None,
        source: str = "",
    ) -> None:
        self.cache, self.source = cache, source
        self.draw, self.encode = draw, encode
        self.size, self.refresh, self.seed = size, refresh, seed
        self.versions = [-1] * size
        self.captions = [""] * size
        self.rows: list[Tensor] = [torch.empty(0)] * size

    def fill(self) -> Iterator[int]:
        """Takes the first filling from the cache, drawing what it lacks; yields how many rows there are by now.

        Without a cache there is nothing to do ahead: a resumed run may need none of these rows.
        """
        if self.cache is None:
            return
        for start in range(0, self.size, CHUNK):
            yield start
            self._fill_first(self.cache, range(start, min(start + CHUNK, self.size)))

    def batch(self, step: int, micro: int, slots: range) -> tuple[Tensor, list[str]]:
        """Rows (B, ...) and captions of the samples in these slots of a step."""
        self.bring_to(step)
        chosen = self._chosen(step, micro, slots)
        return torch.stack([self.rows[i] for i in chosen]), [self.captions[i] for i in chosen]

    def keys(self, step: int, micro: int, slots: range) -> list[tuple[object, ...]]:
        """The keys that the pieces of `batch` were drawn by."""
        self.bring_to(step)
        return [(self.seed, i, self.versions[i]) for i in self._chosen(step, micro, slots)]

    def _chosen(self, step: int, micro: int, slots: range) -> list[int]:
        return [int(numpy_generator("pool slot", self.seed, step, micro, slot).integers(self.size)) for slot in slots]

    def bring_to(self, step: int) -> None:
        """Renews what is not as it must be at this step."""
        drawn = step * self.refresh  # draws so far, beyond the first filling
        wanted = [(drawn - 1 - i) // self.size + 1 if drawn > i else 0 for i in range(self.size)]
        stale = [i for i in range(self.size) if self.versions[i] != wanted[i]]
        for start in range(0, len(stale), CHUNK):
            part = stale[start : start + CHUNK]
            self._put(part, *self._made([(self.seed, i, wanted[i]) for i in part]), [wanted[i] for i in part])

    def _made(self, keys: list[tuple[object, ...]]) -> tuple[Tensor, list[str]]:
        pairs = [self.draw(key) for key in keys]
        return self.encode(torch.stack([wave for wave, _ in pairs])).cpu(), [caption for _, caption in pairs]

    def _put(self, where: Sequence[int], rows: Tensor, captions: list[str], versions: Sequence[int]) -> None:
        for i, row, caption, version in zip(where, rows, captions, versions, strict=True):
            self.rows[i], self.captions[i], self.versions[i] = row, caption, version

    def _fill_first(self, cache: Cache, block: range) -> None:
        def compute() -> dict[str, Tensor]:
            rows, captions = self._made([(self.seed, i, 0) for i in block])
            return {"rows": rows, "captions": torch.tensor(list("\n".join(captions).encode()), dtype=torch.uint8)}

        key = f"melodies|{self.source}|{self.seed}|{block.start}-{block.stop}"
        found = cache.get(key, compute)
        captions = bytes(found["captions"].tolist()).decode().split("\n")
        self._put(block, found["rows"], captions, [0] * len(block))
