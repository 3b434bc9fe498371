"""The pictures that an adapter is measured by: with it and, from the same noise, without.

What the base draws alone is kept in the cache, since all adapters of a comparison share it. B pictures, H, W in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from studio.bases.latent_diffusion import LatentDiffusion
from studio.data.cache import Cache
from studio.evaluate.protocol import Protocol
from studio.evaluate.sticker_card import draw_batches
from studio.generation import Use, wearing
from studio.paths import assets_dir

Pictures = list[Image.Image]
Progress = Callable[[int, int], None]  # pictures drawn so far, pictures in all


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. Steps and guidance left None are the base's own."""

    steps: int | None = 25
    guidance: float | None = None
    seed: int = 0
    batch: int = 8


@dataclass(frozen=True)
class Drawn:
    """One set of pictures, in the protocol's order."""

    settings: Pictures
    unrelated: Pictures
    repeated: Pictures


@dataclass(frozen=True)
class Exhibit:
    """All that metrics look at. `references` has one picture per setting where the protocol pairs them.

    `texts` are the settings' prompts without the new word, which no other network knows.
    """

    protocol: Protocol
    texts: list[str]
    worn: Drawn
    alone: Drawn
    references: Pictures = field(default_factory=list)


def draw_exhibit(
    base: LatentDiffusion,
    uses: Sequence[Use],
    protocol: Protocol,
    words: tuple[str, str],
    references: Pictures,
    drawing: Drawing,
    cache: Cache,
    on_progress: Progress | None = None,
) -> tuple[Exhibit, list[str]]:
    """Draws the protocol's pictures with (trigger, class word) filled in. Returns warnings about other bases, too."""
    texts = [setting.prompt for setting in protocol.filled("", words[1]).settings]
    protocol, total = protocol.filled(*words), 2 * protocol.pictures
    report = on_progress or (lambda done, of: None)
    alone = _alone(base, protocol, drawing, cache, lambda done: report(done, total))
    if not uses:
        return Exhibit(protocol, texts, alone, alone, references), []
    with wearing(base, uses) as warnings:
        worn = _draw(base, protocol, drawing, lambda done: report(protocol.pictures + done, total))
    return Exhibit(protocol, texts, worn, alone, references), list(warnings)


def _asked(protocol: Protocol, seed: int) -> tuple[list[str], list[tuple[object, ...]]]:
    """Prompts and keys of the noises, in the order settings, unrelated, repeated."""
    prompts = [*(s.prompt for s in protocol.settings), *protocol.unrelated, *[protocol.repeated] * protocol.repeats]
    counts = {"settings": len(protocol.settings), "unrelated": len(protocol.unrelated), "repeated": protocol.repeats}
    return prompts, [("evaluate", seed, part, i) for part, count in counts.items() for i in range(count)]


def _draw(base: LatentDiffusion, protocol: Protocol, drawing: Drawing, report: Callable[[int], None]) -> Drawn:
    prompts, keys = _asked(protocol, drawing.seed)
    pictures = draw_batches(
        base, prompts, keys, drawing.batch, drawing.steps, drawing.guidance, lambda done, total: report(done)
    )
    return _parted(pictures, protocol)


def _parted(pictures: Pictures, protocol: Protocol) -> Drawn:
    first, second = len(protocol.settings), len(protocol.settings) + len(protocol.unrelated)
    return Drawn(pictures[:first], pictures[first:second], pictures[second:])


def _alone(
    base: LatentDiffusion, protocol: Protocol, drawing: Drawing, cache: Cache, report: Callable[[int], None]
) -> Drawn:
    prompts, keys = _asked(protocol, drawing.seed)
    identity = base.identity()
    how = [drawing.steps, drawing.guidance, base.resolution, type(base.pipe.scheduler).__name__, drawing.batch]
    key = json.dumps(["alone", identity.architecture, identity.values, prompts, keys, how])

    def compute() -> dict[str, torch.Tensor]:
        drawn = _draw(base, protocol, drawing, report)
        pictures = [*drawn.settings, *drawn.unrelated, *drawn.repeated]
        return {"pictures": torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))}

    return _parted([Image.fromarray(p) for p in cache.get(key, compute)["pictures"].numpy()], protocol)


def of_sticker_world(base: Any) -> bool:
    """Whether a base has the blueprint of the bundled one, and hence speaks of the world that the judge knows."""
    config = json.loads((assets_dir() / "bases" / "sticker" / "unet" / "config.json").read_text(encoding="utf-8"))
    own = getattr(base.denoiser, "config", {})
    return all(own.get(key) == config[key] for key in ("in_channels", "cross_attention_dim", "sample_size"))
