"""Concepts made one, measured: a process of its own, whose figures are a cell of a study's table of merges.

    python -m studio.comparing.together concepts ORDER.json --out FILE
    python -m studio.comparing.together pairs ORDER.json --out FILE

`concepts` merges the adapters in each way and asks for every concept by its word: how often the judge takes the picture
for that concept (`identity`), how like its references it is, and how much more the base errs on generic pictures
(`loss_rise`). The way `alone` wears one adapter at a time. `pairs` asks for two neighbours in one picture of the
base's own size, by one prompt of the merged adapter and by regions, and looks at each half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from studio.adapter import load_adapter
from studio.base import Request
from studio.bases.latent_diffusion import LatentDiffusion
from studio.bases.registry import load_base
from studio.comparing.study import Way
from studio.data.sticker_pool import draw, to_pixels
from studio.errors import RequestError
from studio.evaluate.card import machine, read_references
from studio.evaluate.judge import bundled_judge
from studio.evaluate.protocol import read_protocol
from studio.evaluate.similarity import SAME_THING
from studio.evaluate.sticker_card import draw_batches
from studio.files import write_atomically
from studio.generation import Use, wearing
from studio.keyed import torch_generator
from studio.merging import Merger, make_plan, make_recipe
from studio.regions.drawing import drawing
from studio.regions.layout import Layout, Region
from studio.regions.masks import Box
from studio.samples import labelled_grid, save_png
from studio.terminal import outcome

ALONE = "alone"
REGIONS = "regions"
LOSS_BATCH = 16
NOISES = 2  # of each generic picture
THUMB = 64  # pixels
GROUND = "on a blue background"


class Concept(BaseModel):
    """One adapter of the order."""

    model_config = ConfigDict(extra="forbid")

    name: str
    adapter: str
    trigger: str
    references: str
    known_as: str  # the nearest thing that the base knows


class Order(BaseModel):
    """What is measured, as a file."""

    model_config = ConfigDict(extra="forbid")

    base: str
    concepts: list[Concept]
    ways: list[Way]
    protocol: str = "sticker-subject"
    pictures: int = 4
    scenes: int = 32
    pairs: int = 0
    steps: int = 20
    batch: int = 8


@dataclass
class Meeting:
    """An order with what it needs loaded."""

    order: Order
    base: LatentDiffusion

    @cached_property
    def uses(self) -> list[Use]:
        return [Use(c.name, load_adapter(Path(c.adapter)), 1.0, self.base.name) for c in self.order.concepts]

    @cached_property
    def directions(self) -> Tensor:
        """The mean feature of each concept's references, (K, F) of length 1."""
        protocol = read_protocol(self.order.protocol)
        means = [self.features(read_references(Path(c.references), protocol)).mean(0) for c in self.order.concepts]
        return F.normalize(torch.stack(means), dim=-1)

    @cached_property
    def judge(self) -> Any:
        return bundled_judge()

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.judge.judge(pictures).features

    def merged(self, way: Way, uses: Sequence[Use]) -> tuple[list[Use], float]:
        """The adapters made one, and the seconds that took."""
        began = time.monotonic()
        paths = {c.adapter: way.weight for c, use in zip(self.order.concepts, self.uses) if use in uses}
        recipe = make_recipe({"adapters": paths, "strategy": way.strategy, "options": way.options})
        adapter = Merger(make_plan(recipe, lambda name: self.base)).adapter()
        return [Use(way.title, adapter, 1.0, self.base.name)], time.monotonic() - began


# -- each concept beside the others --------------------------------------------------------------------------------


def concepts(meeting: Meeting) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Figures by way, and the first picture of each concept, a row for each way."""
    plain = generic_loss(meeting)
    ways: dict[str, Any] = {}
    rows = []
    for way in meeting.order.ways:
        shown, worn, seconds = [], [], 0.0
        if way.strategy == ALONE:
            worn = [[use] for use in meeting.uses]
        else:
            one, seconds = meeting.merged(way, meeting.uses)
            worn = [one] * len(meeting.uses)
        likeness, rises = [], []
        for index, uses in enumerate(worn):
            with wearing(meeting.base, uses):
                pictures = _pictures(meeting, index)
                if index == 0 or way.strategy == ALONE:
                    rises.append(generic_loss(meeting) / plain - 1)
            likeness.append(meeting.features(pictures) @ meeting.directions[index])
            shown.append(pictures[0])
        rows.append(shown)
        ways[way.title] = {
            "identity": float((torch.stack(likeness) >= SAME_THING).float().mean()),
            "similarity": float(torch.stack(likeness).mean()),
            "worst_similarity": float(torch.stack(likeness).mean(1).min()),
            "loss_rise": statistics.mean(rises),
            "merge_seconds": round(seconds, 3),
        }
    return ways, rows


def _pictures(meeting: Meeting, index: int) -> list[Image.Image]:
    order, concept = meeting.order, meeting.order.concepts[index]
    settings = read_protocol(order.protocol).filled(concept.trigger, "").settings
    chosen = [settings[i * len(settings) // order.pictures].prompt for i in range(order.pictures)]
    keys = [("together", concept.name, i) for i in range(order.pictures)]
    return draw_batches(meeting.base, chosen, keys, order.batch, order.steps)


@torch.no_grad()
def generic_loss(meeting: Meeting) -> float:
    """The mean error of the base, as it is now, on renderings of things that it knows, with fixed noises."""
    base, count = meeting.base, meeting.order.scenes
    side = base.resolution
    values = []
    for start in range(0, count, LOSS_BATCH):
        drawn = [draw(("generic", i), side, "train") for i in range(start, min(start + LOSS_BATCH, count))]
        clean = base.encode_pictures(to_pixels([picture for picture, *_ in drawn]).to(base.device))
        condition = base.encode_prompts([caption for _, caption, *_ in drawn], (side, side))
        for noise in range(NOISES):
            generators = [torch_generator("generic", noise, start + i) for i in range(len(drawn))]
            times = torch.stack([base.objective.draw_time(g) for g in generators])
            added = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean)
            noisy = base.objective.noised(clean, added, times)
            predicted = base.predict(noisy, base.objective.network_time(times), condition).float()
            values += (predicted - base.objective.target(clean, added, times)).square().mean((1, 2, 3)).tolist()
    return statistics.mean(values)


# -- two concepts in one picture -----------------------------------------------------------------------------------


def pairs(meeting: Meeting) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Figures by way and for regions, and the first picture of each pair, a row for each way."""
    order = meeting.order
    chosen = [(i, i + 1) for i in range(0, 2 * order.pairs, 2)]
    ways, rows = {}, []
    for title in [*(way.title for way in order.ways), REGIONS]:
        looked, shown = [], []
        for pair in chosen:
            pictures = _of_two(meeting, title, pair)
            looked.append(_halves(meeting, pair, pictures))
            shown.append(pictures[0])
        rows.append(shown)
        ways[title] = two_in_one(torch.cat(looked))
    return ways, rows


def two_in_one(halves: Tensor) -> dict[str, float]:
    """Rates from cosines (B, half, concept): who is where they belong, who is in the other's place, who is nowhere."""
    there = halves >= SAME_THING
    own, other = there.diagonal(dim1=1, dim2=2), there.flip(2).diagonal(dim1=1, dim2=2)
    return {
        "in_place": float(own.float().mean()),
        "both_in_place": float(own.all(1).float().mean()),
        "swapped": float(other.float().mean()),
        "missing": float((~there.any(1)).float().mean()),
        "similarity": float(halves.diagonal(dim1=1, dim2=2).mean()),
    }


def _halves(meeting: Meeting, pair: tuple[int, int], pictures: Sequence[Image.Image]) -> Tensor:
    found = [meeting.features(halves(picture)) @ meeting.directions[list(pair)].T for picture in pictures]
    return torch.stack(found)


def halves(picture: Image.Image) -> list[Image.Image]:
    """Left and right, each in the middle of a square of the colour of the picture's corner."""
    middle, made = picture.width // 2, []
    for left in (0, middle):
        square = Image.new("RGB", (picture.height, picture.height), picture.convert("RGB").getpixel((0, 0)))
        square.paste(picture.crop((left, 0, left + middle, picture.height)), ((picture.height - middle) // 2, 0))
        made.append(square)
    return made


def _of_two(meeting: Meeting, title: str, pair: tuple[int, int]) -> list[Image.Image]:
    """One prompt tells the scene; with regions each half's does, with the other concept as the thing it resembles."""
    base, order = meeting.base, meeting.order
    left, right = (order.concepts[i] for i in pair)
    uses, side = [meeting.uses[i] for i in pair], base.resolution

    def scene(one: str, other: str) -> str:
        return f"a {one} on the left of a {other}, {GROUND}"

    worn: AbstractContextManager[Any]
    if title == REGIONS:
        prompts = scene(left.trigger, right.known_as), scene(left.known_as, right.trigger)
        boxes = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
        regions = tuple(Region(box, prompt, use) for box, prompt, use in zip(boxes, prompts, uses))
        worn = drawing(base, Layout(regions), (), (side, side))
    else:
        way = next(way for way in order.ways if way.title == title)
        worn = wearing(base, meeting.merged(way, uses)[0])
    asked = [scene(left.trigger, right.trigger)] * order.pictures
    with worn:
        return base.generate(Request(asked, range(order.pictures), steps=order.steps, width=side, height=side))


# -- the process ---------------------------------------------------------------------------------------------------


def sheet(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """A row for each way; pictures `THUMB` high."""
    small = [[p.convert("RGB").resize((p.width * THUMB // p.height, THUMB)) for p in row] for row in rows]
    return labelled_grid(small, list(columns), list(names))


def _columns(order: Order) -> list[str]:
    names = [concept.name for concept in order.concepts]
    return [f"{a}, {b}" for a, b in zip(names[::2], names[1::2])] if order.pairs else names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studio.comparing.together", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["concepts", "pairs"])
    parser.add_argument("order", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    return outcome(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    order = Order.model_validate_json(options.order.read_text(encoding="utf-8"))
    base = load_base(order.base)
    if not isinstance(base, LatentDiffusion):
        raise RequestError(f"'{order.base}' draws no pictures")
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    ways, rows = (concepts if options.what == "concepts" else pairs)(Meeting(order, base))
    save_png(sheet(rows, _columns(order), list(ways)), options.out.with_name("grid.png"), {})
    card = {"base": base.name, "concepts": [c.name for c in order.concepts], "ways": ways, "machine": machine()}
    write_atomically(options.out, json.dumps(card, indent=1))


if __name__ == "__main__":
    sys.exit(main())
