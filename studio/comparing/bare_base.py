"""What a base does without an adapter: a process of its own, whose figures are the floors of a study.

    python -m studio.comparing.bare_base zeroed --base sticker --share 0.1 --out FILE
    python -m studio.comparing.bare_base described --base sticker --word rabbit --references DIR --out FILE

`zeroed` sets the smallest weights of the denoiser to zero, which SaRA (Hu et al. 2024, arXiv 2409.06633, section 3)
holds to be ineffective. `described` asks for the nearest thing that the base knows, instead of the learned word.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studio.bases.latent_diffusion import LatentDiffusion
from studio.bases.registry import load_base
from studio.data.cache import Cache
from studio.data.stickers import glyphs
from studio.errors import RequestError
from studio.evaluate.card import machine, measure, read_references
from studio.evaluate.exhibit import Drawing, draw_exhibit
from studio.evaluate.judge import bundled_judge
from studio.evaluate.metrics import JudgeMetric, PixelMetric
from studio.evaluate.protocol import read_protocol
from studio.evaluate.sticker_card import measure_base
from studio.files import write_atomically
from studio.paths import studio_home
from studio.terminal import outcome


@torch.no_grad()
def zero_smallest(base: LatentDiffusion, share: float) -> float:
    """Sets this share of the denoiser's numbers, those of least magnitude over all layers, to zero.

    Returns the threshold: the largest magnitude that was zeroed.
    """
    parameters = list(base.denoiser.parameters())
    magnitudes = torch.cat([p.detach().abs().flatten().float() for p in parameters])
    count = round(share * magnitudes.numel())
    if count == 0:
        return 0.0
    threshold = magnitudes.kthvalue(count).values
    for parameter in parameters:
        parameter[parameter.abs().float() <= threshold] = 0
    return float(threshold)


def zeroed(base: LatentDiffusion, share: float, count: int, drawing: Drawing) -> dict[str, Any]:
    """The base's scores by the judge, over `count` trained glyphs spread over the table."""
    known = glyphs("train")
    chosen = [known[i * len(known) // min(count, len(known))] for i in range(min(count, len(known)))]
    threshold = zero_smallest(base, share)
    how: dict[str, Any] = {
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "batch": drawing.batch,
        "seed": drawing.seed,
    }
    scores = measure_base(base, bundled_judge(), 1, choices=chosen, psnr_pictures=1, **how)["scores"]
    names = {"glyph": "glyph_right", "glyph top-5": "glyph_right_top5", "ground": "ground_right", "tint": "tint_right"}
    names |= {"position": "position_right"}
    return {
        "share": share,
        "threshold": threshold,
        "pictures": len(chosen),
        "figures": {to: scores[name]["generated"] for name, to in names.items()},
    }


def described(base: LatentDiffusion, word: str, protocol: str, references: Path, drawing: Drawing) -> dict[str, Any]:
    """The figures of the base alone, asked for `word`."""
    asked = read_protocol(protocol)
    pictures = read_references(references, asked)
    cache = Cache(studio_home() / "cache")
    exhibit, _ = draw_exhibit(base, [], asked, (word, ""), pictures, drawing, cache)
    return {"word": word, "figures": measure(exhibit, [JudgeMetric(bundled_judge()), PixelMetric()])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studio.comparing.bare_base", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["zeroed", "described"])
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--glyphs", type=int, default=96)
    parser.add_argument("--word", default="")
    parser.add_argument("--protocol", default="sticker-subject")
    parser.add_argument("--references", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    return outcome(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    base = load_base(options.base)
    if not isinstance(base, LatentDiffusion):
        raise RequestError(f"'{options.base}' draws no pictures")
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    drawing = Drawing(options.steps, batch=options.batch)
    if options.what == "zeroed":
        card = zeroed(base, options.share, options.glyphs, drawing)
    else:
        card = described(base, options.word, options.protocol, options.references, drawing)
    write_atomically(options.out, json.dumps(card | {"machine": machine()}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
