"""A merge before anything is computed: files opened, sites matched, everything checked from the headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import studio
from studio.adapter import BaseIdentity, Card
from studio.base import Base, same_values
from studio.deltas import WeightDelta
from studio.errors import AdapterError, RequestError
from studio.importing.opening import open_sources
from studio.importing.own import AdapterFile
from studio.importing.source import Source
from studio.keyed import key_of
from studio.merging.calibration import Calibration
from studio.merging.choosing import Choice, tally
from studio.merging.memory import estimate, resident_bytes
from studio.merging.recipe import Part, Recipe, within
from studio.merging.strategy import Meeting, Strategy, strategy_named
from studio.patch import LayerShape


@dataclass(frozen=True)
class Guest:
    """One opened file and its strength."""

    part: Part
    source: Source


@dataclass
class Plan:
    """What will be merged where. `guests` are sorted by content, so that the order they were named in is no matter."""

    recipe: Recipe
    guests: list[Guest]
    base: Base | None
    identity: BaseIdentity
    shapes: dict[str, LayerShape]
    words: dict[str, dict[str, Tensor]]
    warnings: list[str]
    calibration: Calibration | None = None
    choice: Choice = field(default_factory=lambda: Choice("sum", ""))

    @property
    def base_name(self) -> str:
        """The base as `--base` takes it."""
        named = (g.source.trained_on for g in self.guests if isinstance(g.source, AdapterFile))
        return self.recipe.base or (self.base.name if self.base else next(named, self.identity.name))

    @property
    def strategy(self) -> Strategy:
        return strategy_named(self.choice.strategy)

    @property
    def options(self) -> dict[str, Any]:
        return self.strategy.options(self.recipe.options)

    def at(self, site: str) -> list[Guest]:
        """Those who change a site, at a strength that is not zero."""
        return [guest for guest in self.guests if site in guest.source.shapes and guest.part.at(site) != 0]

    def weight_of(self, site: str) -> Tensor:
        """The base's own weight. Raises AdapterError where there is no base."""
        if self.base is None:
            raise AdapterError("its change depends on the base's weights", "name the base with --base")
        component, path = site.split(".", 1)
        return self.base.components[component].get_parameter(f"{path}.weight").detach().cpu()

    def read(self, site: str) -> tuple[list[Guest], list[WeightDelta], list[tuple[float, Tensor]]]:
        """Who changes the site's weight and how, without strengths; and the changes of its bias, with them."""
        guests, deltas, biases = [], [], []
        for guest in self.at(site):
            delta, bias = guest.source.read(site, self.weight_of if self.base is not None else None)
            if delta is not None:
                guests.append(guest)
                deltas.append(delta)
            if bias is not None:
                biases.append((guest.part.at(site), bias))
        return guests, deltas, biases

    def meeting(self, site: str, guests: Sequence[Guest], deltas: Sequence[WeightDelta]) -> Meeting:
        found = Meeting(
            site,
            deltas,
            [guest.part.at(site) for guest in guests],
            [guest.source.sha256 for guest in guests],
            self.recipe.seed,
        )
        if self.strategy.needs_sketches:
            found.sketches = [self.sketch(guest, site) for guest in guests]
            found.base_sketch = self.base_sketch(guests, site)
        return found

    def sketch(self, guest: Guest, site: str) -> Any:
        return self.calibration.concept(guest.source, site) if self.calibration else guest.source.sketch(site)

    def base_sketch(self, guests: Sequence[Guest], site: str) -> Any:
        if self.calibration:
            return self.calibration.generic(site)
        return next((found for g in guests if (found := g.source.sketch(site, "base_sketch")) is not None), None)

    def card(self) -> Card:
        """The merged adapter's card. No times and no name of its own, so the same merge gives the same bytes."""
        method = {
            "kind": "merged",
            "strategy": self.choice.strategy,
            "options": self.options,
            "rank": self.recipe.rank,
            "tolerance": self.recipe.tolerance,
            "seed": self.recipe.seed,
            **({"compress": self.recipe.compress} if self.recipe.compress else {}),
        }
        triggers = dict.fromkeys(guest.source.trigger for guest in self.guests if guest.source.trigger)
        classes = dict.fromkeys(guest.source.class_word for guest in self.guests if guest.source.class_word)
        return Card(
            method=method,
            base=self.identity,
            sites=self.shapes,
            trigger=", ".join(triggers),
            class_word=", ".join(classes),
            concept=f"{key_of(*(g.source.sha256 for g in self.guests)):016x}",
            seed=self.recipe.seed,
            library_version=studio.__version__,
            parents=self.parents(),
        )

    def parents(self) -> list[dict[str, Any]]:
        return [
            {
                "name": guest.source.name,
                "weight": guest.part.weight,
                **({"blocks": guest.part.blocks} if guest.part.blocks else {}),
                "method": guest.source.kind,
                "trigger": guest.source.trigger,
                "sha256": guest.source.sha256,
            }
            for guest in self.guests
        ]


BaseLoader = Callable[[str], Base]


def make_plan(recipe: Recipe, load: BaseLoader | None = None, max_bytes: int | None = None) -> Plan:
    """Opens and checks everything. Raises RequestError (AdapterError, ...) with nothing written.

    `load` gives a base by its name; by default it is found as everywhere.
    """
    bases = _Bases(recipe.base, load)
    sources = open_sources([part.adapter for part in recipe.adapters], bases.outlined)
    guests = [Guest(part, source) for part, source in zip(recipe.adapters, sources, strict=True)]
    bases.default = next((source.trained_on for source in sources if isinstance(source, AdapterFile)), "")
    guests.sort(key=lambda guest: (guest.source.sha256, guest.part.weight, sorted(guest.part.blocks.items())))
    identity, warnings = _identity(guests, bases)
    if recipe.calibrate or any(guest.source.needs_weights for guest in guests):
        _check_values(guests, bases.obtain())
    shapes = _shapes(guests)
    plan = Plan(recipe, guests, bases.loaded, identity, shapes, _words(guests), warnings)
    _check_blocks(plan)
    plan.shapes = {site: shape for site, shape in sorted(shapes.items()) if plan.at(site)}
    if not plan.shapes and not plan.words:
        raise RequestError("every weight is zero, so the merge would change nothing", "give one a weight")
    if recipe.calibrate:
        plan.calibration = Calibration(bases.obtain(), [guest.source for guest in guests])
    plan.choice = _choice(plan)
    plan.warnings += plan.choice.warnings
    if plan.options is not None and plan.strategy.needs_sketches:
        _check_sketches(plan)
    if max_bytes is not None:
        _check_memory(plan, max_bytes)
    return plan


class _Bases:
    """The base, as far as somebody needs it: files of other programs its layers, few methods its weights."""

    def __init__(self, name: str | None, load: BaseLoader | None) -> None:
        self.name, self.load, self.default = name, load, ""
        self.loaded: Base | None = None
        self.outline: Base | None = None

    def obtain(self) -> Base:
        """The base with its weights."""
        if self.loaded is None:
            from studio.bases.registry import load_base

            self.loaded = (self.load or load_base)(self._called())
        return self.loaded

    def outlined(self, default: str = "") -> Base:
        """The base's layers, whose weights need not be there."""
        self.default = self.default or default
        if self.load is not None:
            return self.obtain()
        if self.outline is None:
            from studio.bases.outline import outline

            self.outline = outline(self._called())
        return self.outline

    @property
    def known(self) -> Base | None:
        return self.loaded or self.outline

    def _called(self) -> str:
        name = self.name or self.default
        if not name:
            raise RequestError("files of other programs do not say which base they fit", "name it with --base")
        return name


def _identity(guests: Sequence[Guest], bases: _Bases) -> tuple[BaseIdentity, list[str]]:
    """The base that all were made for, and warnings. Raises AdapterError for another architecture."""
    known = [(guest.source.name, guest.source.identity) for guest in guests if guest.source.identity is not None]
    if bases.name:
        bases.outlined()
    if base := bases.known:
        known.insert(0, (f"--base {base.name}" if bases.name else base.name, base.identity()))
    (first, identity), warnings = known[0], []
    for name, other in known[1:]:
        if other.architecture != identity.architecture:
            raise AdapterError(
                f"'{name}' was made for '{other.name}' ({other.family}) and '{first}' for '{identity.name}' "
                f"({identity.family}), which are built otherwise",
                "merge adapters of one base",
            )
        if not same_values(other.values, identity.values):
            warnings.append(f"'{name}' was made for '{other.name}', which has other weights than '{identity.name}'")
        if not identity.values:  # of an outline
            identity = identity.model_copy(update={"values": other.values})
    return identity, warnings


def _check_values(guests: Sequence[Guest], base: Base) -> None:
    for guest in guests:
        if guest.source.identity is not None:
            base.check(guest.source.identity, guest.source.needs_weights)


def _shapes(guests: Sequence[Guest]) -> dict[str, LayerShape]:
    shapes: dict[str, LayerShape] = {}
    for guest in guests:
        for site, shape in guest.source.shapes.items():
            if shapes.setdefault(site, shape).weight != shape.weight:
                raise AdapterError(
                    f"'{guest.source.name}' has a weight of shape {shape.weight} at '{site}', another adapter one of "
                    f"{shapes[site].weight}",
                    "merge adapters of one base",
                )
    return shapes


def _words(guests: Sequence[Guest]) -> dict[str, dict[str, Tensor]]:
    """The learned words of all. Raises RequestError where two taught one word different things."""
    words: dict[str, dict[str, Tensor]] = {}
    for guest in guests:
        for encoder, own in guest.source.words().items():
            for word, vectors in own.items():
                known = words.setdefault(encoder, {}).setdefault(word, vectors)
                if known.shape != vectors.shape or not known.equal(vectors):
                    raise RequestError(
                        f"two of the adapters have learned the word '{word}' ('{guest.source.name}' is one)",
                        "train one of them with another trigger word",
                    )
    return words


def _check_blocks(plan: Plan) -> None:
    for guest in plan.guests:
        for pattern in guest.part.blocks:
            if not any(within(site, pattern) for site in plan.shapes):
                raise RequestError(
                    f"blocks of '{guest.part.adapter}': no layer matches '{pattern}'",
                    f"layers are called like '{next(iter(plan.shapes), '')}'",
                )


def _choice(plan: Plan) -> Choice:
    if plan.recipe.strategy != "auto":
        strategy_named(plan.recipe.strategy).options(plan.recipe.options)
        return Choice(plan.recipe.strategy, "asked for")
    if plan.recipe.options:
        raise RequestError("strategy 'auto' has no options", "name a strategy beside them")
    place = {id(guest): number for number, guest in enumerate(plan.guests)}

    def layers() -> Any:
        for site in plan.shapes:
            guests, deltas, _ = plan.read(site)
            if guests:
                scaled = [delta.scaled(guest.part.at(site)) for guest, delta in zip(guests, deltas, strict=True)]
                yield site, [place[id(guest)] for guest in guests], scaled

    found = tally(len(plan.guests), layers())
    return found.choose(plan.calibration is not None or _first_without_sketch(plan) is None)


SKETCHED = ("linear", "conv1d", "conv2d", "conv3d")


def _first_without_sketch(plan: Plan) -> tuple[str, str] | None:
    """An adapter and a site where gram would need a sketch that is not there; by names in the headers alone."""
    for site, shape in plan.shapes.items():
        if shape.kind in SKETCHED:
            for guest in plan.at(site):
                source = guest.source
                if not isinstance(source, AdapterFile) or "sketch" not in source.by_site[site]:
                    return source.name, site
    return None


def _check_sketches(plan: Plan) -> None:
    missing = None if plan.calibration else _first_without_sketch(plan)
    if missing:
        raise RequestError(
            f"'{plan.choice.strategy}' needs to know the layers' inputs, and '{missing[0]}' has no sketch of them "
            f"at '{missing[1]}'",
            "add --calibrate, which records them with the base, or use --strategy sum",
        )


def _check_memory(plan: Plan, max_bytes: int) -> None:
    """Raises RequestError if a layer will not fit beside what the program holds already."""
    room = max_bytes - resident_bytes()
    for site, shape in plan.shapes.items():
        height = shape.weight[0]
        dense = height
        for size in shape.weight[1:]:
            dense *= size
        guests = plan.at(site)
        elementwise = plan.strategy.dense or any(guest.source.kind not in THIN for guest in guests)
        compressed = plan.strategy.dense or plan.recipe.rank is not None or plan.recipe.tolerance is not None
        square = min(height, dense // height) ** 2 if compressed and elementwise else 0
        own = sum(guest.source.numbers(site) for guest in guests)
        needed = estimate(own, dense, len(guests), elementwise, compressed and elementwise, square)
        if needed > room:
            raise RequestError(
                f"merging '{site}' needs about {needed / 2**20:.0f} MiB, and --max-ram leaves "
                f"{max(0, room) / 2**20:.0f} MiB",
                f"give --max-ram {(max_bytes - room + needed) / 2**30 + 0.05:.1f}GiB, or another strategy",
            )


THIN = (
    "lora",
    "orthogonal",
    "flora",
    "merged",
    "kohya",
    "peft",
    "diffusers",
)  # kinds whose changes are low-rank as a rule
