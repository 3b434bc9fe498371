"""The card of an adapter: how well it learned, what else it moved, what it cost; figures with their pictures.

`evaluate` draws a protocol's pictures with the adapter and without it, lets metrics look at them, and adds what the
training cost. Floors and ceilings stand beside every figure: the base alone with the same prompts and noise, and the
references among themselves.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from studio.base import Base
from studio.bases.latent_diffusion import LatentDiffusion
from studio.data.cache import Cache
from studio.data.decode import Unusable, decode
from studio.data.listing import list_folder
from studio.errors import DataError, RequestError, nearest
from studio.evaluate.exhibit import Drawing, Exhibit, Progress, draw_exhibit, of_sticker_world
from studio.evaluate.judge import bundled_judge
from studio.evaluate.metrics import FeatureMetric, JudgeMetric, Metric, PixelMetric, palette
from studio.evaluate.protocol import Protocol, default_protocol, read_protocol
from studio.evaluate.training_cost import run_of, training_cost
from studio.generation import Use, parse_use
from studio.library import find
from studio.paths import assets_dir, studio_home
from studio.preset import read_preset

FORMAT_VERSION = 1
METRICS = ("judge", "palette", "clip", "dino")


@dataclass(frozen=True)
class Question:
    """What is to be evaluated, and how. Fields left None have defaults that fit the adapter."""

    adapter: str
    beside: Sequence[str] = ()  # adapters worn at the same time
    references: Path | None = None
    base: str | None = None
    protocol: str | None = None
    metrics: Sequence[str] = ()
    clip: Path | None = None
    dino: Path | None = None
    drawing: Drawing = field(default_factory=Drawing)


@dataclass(frozen=True)
class Answer:
    """The card as plain data, and the pictures behind it."""

    card: dict[str, Any]
    exhibit: Exhibit
    warnings: list[str]


def evaluate(question: Question, base: Base, on_progress: Progress | None = None) -> Answer:
    """Measures an adapter on a base. Raises RequestError, DataError, MissingPart."""
    began = time.monotonic()
    if not isinstance(base, LatentDiffusion):
        raise RequestError(f"'{base.name}' draws no pictures", "evaluate measures adapters of image models")
    use, path = parse_use(question.adapter), find(_name(question.adapter))
    beside = [parse_use(text) for text in question.beside]
    card = use.adapter.card
    name = question.protocol or default_protocol(card, of_sticker_world(base))
    protocol = read_protocol(name)
    metrics = choose_metrics(question, protocol, of_sticker_world(base))
    references = read_references(question.references or trained_on(path), protocol)
    cache = Cache(studio_home() / "cache")
    words = (card.trigger, card.class_word)
    uses = [use, *beside]
    exhibit, warnings = draw_exhibit(base, uses, protocol, words, references, question.drawing, cache, on_progress)
    figures = measure(exhibit, metrics)
    told = {
        "base": base.name,
        "protocol": Path(name).stem,
        "seed": question.drawing.seed,
        "num_inference_steps": question.drawing.steps,
        "guidance_scale": question.drawing.guidance,
        "pictures": protocol.pictures,
        "references": len(references),
    }
    return Answer(card_of(uses, path, base, told, figures, began), exhibit, warnings)


def card_of(
    uses: Sequence[Use], path: Path, base: Any, told: dict[str, Any], figures: dict[str, float], began: float
) -> dict[str, Any]:
    """What every card has: who was measured, what is `told` of how, the figures, and what training and measuring cost.

    The first of `uses` is measured, the others are worn beside it; `began` is on the monotonic clock.
    """
    use, *beside = uses
    card = use.adapter.card
    return {
        "format": FORMAT_VERSION,
        "adapter": use.name,
        "weight": use.weight,
        "beside": [{"adapter": other.name, "weight": other.weight} for other in beside],
        "method": card.method,
        "trigger": card.trigger,
        "train_seed": card.seed,
        **told,
        "figures": {key: round(value, 5) for key, value in figures.items() if not math.isnan(value)},
        "training": {
            **training_cost(use.adapter, path),
            "num_total_params": sum(p.numel() for p in base.denoiser.parameters()),
        },
        "machine": machine(),
        "eval_time": round(time.monotonic() - began, 2),
    }


def measure(exhibit: Exhibit, metrics: Sequence[Metric]) -> dict[str, float]:
    """All figures, and `drift` once more under that name: DINO's where it is there, else the first metric's."""
    figures: dict[str, float] = {}
    for metric in metrics:
        figures |= metric.measure(exhibit)
    drifts = [f"{name}_drift" for name in ("dino", *(metric.name for metric in metrics))]
    if found := next((key for key in drifts if key in figures), None):
        figures["drift"] = figures[found]
    return figures


def choose_metrics(question: Question, protocol: Protocol, sticker_world: bool) -> list[Metric]:
    """Those asked for by name, else the bundled ones that fit and all whose weights are given. Raises RequestError."""
    given = {"clip": question.clip, "dino": question.dino}
    bundled = ("judge",) if sticker_world else ()
    wanted = list(question.metrics) or [
        *bundled,
        *(("palette",) if protocol.teaches == "style" else ()),
        *(name for name, folder in given.items() if folder),
    ]
    for name in wanted:
        if name not in METRICS:
            raise RequestError(f"unknown metric '{name}'", nearest(name, METRICS))
        if name in given and given[name] is None:
            raise RequestError(f"metric '{name}' needs weights", f"give their folder with --{name} DIR")
    if not wanted:
        raise RequestError(
            "the bundled judge knows only the sticker world, and no other metric was given",
            "give a folder of weights with --dino DIR or --clip DIR, or ask for --metrics palette",
        )
    return [*(_metric(name, given.get(name)) for name in dict.fromkeys(wanted)), PixelMetric()]


def _metric(name: str, folder: Path | None) -> Metric:
    from studio.evaluate.encoders import ClipMetric, dino_metric

    if name == "judge":
        return JudgeMetric(bundled_judge())
    if name == "palette":
        return FeatureMetric("palette", palette)
    assert folder is not None
    return ClipMetric(folder) if name == "clip" else dino_metric(folder)


def read_references(folder: Path | None, protocol: Protocol) -> list[Image.Image]:
    """The pictures of the subject; of a protocol that names them, one for each setting. Raises DataError."""
    if folder is None:
        raise DataError("there is nothing to compare with", "give a folder of pictures with --references")
    if protocol.pairs:
        paths = [folder / setting.reference for setting in protocol.settings]
    else:
        paths = list_folder(folder).pictures
    if not paths:
        raise DataError(f"there are no pictures in '{folder}' to compare with")
    try:
        return [decode(path) for path in paths]
    except (Unusable, OSError) as error:
        raise DataError(f"a picture of '{folder}' cannot be used: it {error}") from None


def trained_on(path: Path) -> Path | None:
    """The pictures that an adapter was trained on, if its run is known and they are still there."""
    told = recipe_of(path).get("data", {}).get("path")
    folder = Path(str(told).replace("{assets}", str(assets_dir()))).expanduser() if told else None
    return folder if folder is not None and folder.is_dir() else None


def adapter_base(question: Question) -> str:
    """The base to load for a question: as asked, as the adapter's run has it, or as the adapter says."""
    own = recipe_of(find(_name(question.adapter))).get("base")
    return question.base or own or parse_use(question.adapter).base


def recipe_of(path: Path) -> dict[str, Any]:
    """The preset of the run that made an adapter's file; empty if that is not known."""
    run = run_of(path)
    return read_preset(str(run.preset_path)) if run is not None and run.preset_path.exists() else {}


def card_folder(adapter: str) -> Path:
    """Where a card goes by default: into the run's folder, else into the studio's home."""
    path = find(_name(adapter))
    run = run_of(path)
    return run.folder / "evaluation" if run is not None else studio_home() / "evaluations" / path.stem


def _name(adapter: str) -> str:
    return adapter.rpartition(":")[0] or adapter


def machine() -> dict[str, Any]:
    """What figures of time and memory depend on."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "os": platform.system()}
