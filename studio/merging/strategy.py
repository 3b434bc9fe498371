"""Merge strategies: one annotated function each, from a Meeting to a WeightDelta. Its signature is its settings.

A Meeting is one weight of the base together with the changes that adapters make to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor

from studio.deltas import LowRank, WeightDelta
from studio.deltas.compression import ThinSvd, thin_svd
from studio.errors import RequestError, nearest
from studio.inputs import Sketch
from studio.method import describe

# Rows of all adapters are looked at together in blocks of this many numbers: 32 MiB. It depends on nothing else, so
# that a limit on memory never changes the bits of a result.
BLOCK_NUMBERS = 1 << 23


@dataclass
class Meeting:
    """The adapters that change one weight. `weights` are their strengths, which may be negative, never zero.

    `keys` identify the adapters' content, for randomness; `sketches` are of their inputs, `base_sketch` of the base's.
    """

    site: str
    deltas: Sequence[WeightDelta]
    weights: Sequence[float]
    keys: Sequence[str]
    seed: int = 0
    sketches: Sequence[Sketch | None] = ()
    base_sketch: Sketch | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def scaled(self) -> list[WeightDelta]:
        """Each change at its strength."""
        return [delta.scaled(weight) for delta, weight in zip(self.deltas, self.weights, strict=True)]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.deltas[0].shape

    @property
    def count(self) -> int:
        return len(self.deltas)

    def thin(self) -> list[LowRank]:
        """The changes at their strengths as low-rank ones; a dense one by its SVD."""
        return [delta.low_rank() or _of_svd(thin_svd(delta), delta.shape) for delta in self.scaled]

    def row_blocks(self, numbers: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows of all changes at their strengths: which rows, and (K, rows, N).

        `numbers` are those of one adapter's block, where they must not depend on how many adapters there are.
        """
        deltas = self.scaled
        height, width = deltas[0].height, deltas[0].width
        step = max(1, (numbers or BLOCK_NUMBERS // self.count) // width)
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(start, stop), torch.stack([delta.rows(start, stop) for delta in deltas])

    def empty(self) -> Tensor:
        """A matrix (O, N) for the result."""
        return torch.empty(self.deltas[0].height, self.deltas[0].width, dtype=self.deltas[0].dtype)


def _of_svd(svd: ThinSvd, shape: tuple[int, ...]) -> LowRank:
    return LowRank(svd.right, svd.left * svd.singular, shape)


Rule = Callable[..., WeightDelta]


@dataclass(frozen=True)
class Strategy:
    """A registered function. `dense` says that it looks at all numbers and gives a dense result.

    `needs_sketches` says that it weighs the changes by the adapters' inputs.
    """

    name: str
    rule: Rule
    settings: type[BaseModel]
    dense: bool = False
    needs_sketches: bool = False

    @property
    def summary(self) -> str:
        return (self.rule.__doc__ or "").splitlines()[0]

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The settings, checked, with their defaults. Raises RequestError that names the nearest."""
        try:
            return self.settings.model_validate(given).model_dump()
        except ValidationError as error:
            message, hint = describe(error, self.settings, prefix="options.")
            raise RequestError(f"strategy '{self.name}': {message}", hint) from None


_registry: dict[str, Strategy] = {}


def strategy(name: str, *, dense: bool = False, needs_sketches: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: registers a function whose parameters after the first are annotated settings with defaults."""

    def registered(rule: Rule) -> Rule:
        hints = get_type_hints(rule, include_extras=True)
        parameters = list(inspect.signature(rule).parameters.values())[1:]
        fields: Any = {p.name: (hints[p.name], p.default) for p in parameters}
        model = create_model(f"{name}_settings", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
        _registry[name] = Strategy(name, rule, model, dense, needs_sketches)
        return rule

    return registered


def strategies() -> dict[str, Strategy]:
    """All strategies by name."""
    from studio.merging import agreement, chance, competition, exact, fusion, singular

    assert all((agreement, chance, competition, exact, fusion, singular))
    return dict(sorted(_registry.items()))


def strategy_named(name: str) -> Strategy:
    known = strategies()
    if name not in known:
        raise RequestError(f"unknown strategy '{name}'", nearest(name, [*known, "auto"]))
    return known[name]
