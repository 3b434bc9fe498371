"""What a base of the sticker world can do, as numbers and as a sheet of pictures.

    python -m studio.evaluate.sticker_card FOLDER --out DIR

writes DIR/card.json and DIR/sheet.png. Every trained emoji is asked for in a random scene, and the judge tells what
was drawn. Beside it stand the judge's answers to true renderings of the same scenes, which is the most that can be
measured, and what guessing would give. A score is a fraction in [0, 1].
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from studio.base import Request
from studio.bases.latent_diffusion import LatentDiffusion
from studio.data.sticker_pool import draw, to_pixels
from studio.data.stickers import Glyph, draw_scene, glyphs, render
from studio.errors import DataError
from studio.evaluate.judge import HEADS, Judge, Verdict, bundled_judge
from studio.files import write_atomically
from studio.keyed import numpy_generator, torch_generator
from studio.paths import assets_dir
from studio.samples import save_png, wrap_text

Progress = Callable[[int, int], None]  # pictures drawn so far, pictures in all


def measure_base(
    base: LatentDiffusion,
    judge: Judge,
    per_glyph: int = 1,
    *,
    choices: Sequence[Glyph] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
    psnr_pictures: int = 64,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of pictures drawn by `base`, `per_glyph` of each trained glyph (or of `choices`), and of its autoencoder.

    The same arguments ask for the same scenes and noises. Raises MissingPart without the emoji font.
    """
    began = time.monotonic()
    choices = glyphs("train") if choices is None else choices
    keys = [("card", seed, glyph.name, i) for glyph in choices for i in range(per_glyph)]
    scenes, captions, renderings = [], [], []
    for key, glyph in zip(keys, (g for g in choices for _ in range(per_glyph)), strict=True):
        rng = numpy_generator(*key)
        scene = draw_scene(rng, (glyph,))
        scenes.append(scene)
        captions.append(scene.caption(rng))
        renderings.append(render(scene, base.resolution, rng))
    drawn = draw_batches(base, captions, keys, batch, steps, guidance, on_progress)
    wanted = judge.labels(scenes)
    return {
        "base": base.name,
        "pictures": len(drawn),
        "per_glyph": per_glyph,
        "seed": seed,
        "steps": steps,
        "guidance": base.guidance if guidance is None else guidance,
        "scores": scores(judge.judge(drawn), judge.judge(renderings), wanted),
        "autoencoder_psnr_db": {split: autoencoder_psnr(base, split, psnr_pictures) for split in ("train", "held-out")},
        "seconds": round(time.monotonic() - began, 1),
    }


@torch.no_grad()
def draw_batches(
    base: LatentDiffusion,
    prompts: Sequence[str],
    keys: Sequence[tuple[object, ...]],
    batch: int,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: Progress | None = None,
) -> list[Image.Image]:
    """One picture per prompt, its noise drawn by its key; `batch` at a time, which is faster than `generate`."""
    options: dict[str, Any] = {"width": base.resolution, "height": base.resolution, "output_type": "pil"}
    if steps is not None:
        options["num_inference_steps"] = steps
    guidance = base.guidance if guidance is None else guidance
    if guidance is not None:
        options["guidance_scale"] = guidance
    base.pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generators = [torch_generator(*key) for key in keys[part]]
        pictures += base.pipe(list(prompts[part]), generator=generators, **options).images
        if on_progress:
            on_progress(len(pictures), len(prompts))
    return pictures


def scores(drawn: Verdict, rendered: Verdict, wanted: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """By question: the share of right answers for drawn pictures, for renderings, and for the best blind guess.

    `tint asked` counts only the scenes that name a tint; among all, "none" is right three times in four.
    """
    everywhere = torch.ones_like(wanted["tint"], dtype=torch.bool)
    tinted = wanted["tint"] > 0
    count = drawn.logits["glyph"].shape[-1]
    table = {
        "glyph": _score(drawn, rendered, wanted, "glyph", everywhere, 1 / count),
        "glyph top-5": _score(drawn, rendered, wanted, "glyph", everywhere, min(5, count) / count, k=min(5, count)),
    }
    for head in HEADS:
        commonest = Counter(wanted[head].tolist()).most_common(1)[0][1] / len(everywhere)
        table[head] = _score(drawn, rendered, wanted, head, everywhere, commonest)
    if tinted.any():
        table["tint asked"] = _score(drawn, rendered, wanted, "tint", tinted, 1 / (len(HEADS["tint"]) - 1))
    return table


def _score(
    drawn: Verdict, rendered: Verdict, wanted: dict[str, Tensor], head: str, among: Tensor, chance: float, k: int = 1
) -> dict[str, float]:
    right = [verdict.is_among(head, wanted[head], k)[among].float().mean() for verdict in (drawn, rendered)]
    figures = (float(right[0]), float(right[1]), chance, int(among.sum()))
    return {n: round(v, 4) for n, v in zip(("generated", "renderings", "chance", "pictures"), figures, strict=True)}


@torch.no_grad()
def autoencoder_psnr(base: LatentDiffusion, split: str, count: int) -> float:
    """Mean PSNR in dB over `count` renderings of glyphs of that split, encoded and decoded; full scale is 255."""
    values = []
    for start in range(0, count, 16):
        keys = [("psnr", split, i) for i in range(start, min(start + 16, count))]
        pixels = to_pixels([draw(key, base.resolution, split)[0] for key in keys])
        decoded = base.decode_latents(base.encode_pictures(pixels)).float().cpu().clamp(-1, 1)
        values += psnr_db(decoded, pixels).tolist()
    return round(sum(values) / len(values), 2)


def psnr_db(pixels: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, (B,), from (B, 3, H, W) in [-1, 1]; 100 dB at most."""
    error = ((pixels - truth) / 2).square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


# -- the sheet -------------------------------------------------------------------------------------------------

COLUMNS, MARGIN, LINES, LINE = 8, 6, 4, 11  # sizes in pixels, but columns and lines


def sheet_prompts() -> list[str]:
    """The 64 prompts of the sheet; that of row i is drawn with seed i."""
    path = assets_dir() / "stickers" / "sheet-prompts.txt"
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def sample_sheet(
    base: LatentDiffusion,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: Progress | None = None,
) -> Image.Image:
    """The fixed prompts as `studio generate --seed ROW` draws them, eight in a row, each above its prompt."""
    prompts = sheet_prompts() if prompts is None else prompts
    if not prompts:
        raise DataError("there is no prompt to draw")
    pictures = []
    for row, prompt in enumerate(prompts):
        pictures += base.generate(Request([prompt], [row], steps=steps, guidance=guidance))
        if on_progress:
            on_progress(row + 1, len(prompts))
    return labelled_grid(pictures, [f"{row}  {prompt}" for row, prompt in enumerate(prompts)])


def labelled_grid(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Pictures of one size in rows, with a small caption under each."""
    font = ImageFont.load_default(size=LINE - 1)
    width, height = pictures[0].size
    step_x, step_y = width + MARGIN, height + LINES * LINE + MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        sheet.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=(225, 225, 225))
        for line, text in enumerate(wrap_text(label, width, font)[:LINES]):
            pen.text((x, y + height + 2 + line * LINE), text, fill=(40, 40, 40), font=font)
    return sheet


# -- as a program ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a base and writes card.json and sheet.png. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.evaluate.sticker_card", description=__doc__.split("\n")[0])
    parser.add_argument("base", metavar="FOLDER", help="pipeline folder, or the name of a bundled base")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where card.json and sheet.png go")
    parser.add_argument("--per-glyph", type=int, default=1, help="pictures drawn of each emoji (default 1)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the base's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the base's own)")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and noises (default 0)")
    parser.add_argument("--no-sheet", action="store_true", help="leave the sheet out")
    options = parser.parse_args(arguments)
    from studio.terminal import outcome

    return outcome(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    from studio.bases.registry import load_base
    from studio.terminal import CountProgress, print_table, say

    base = load_base(options.base)
    if not isinstance(base, LatentDiffusion):
        raise DataError(f"'{options.base}' draws no pictures", "the card is for bases of the sticker world")
    how = {"steps": options.steps, "guidance": options.guidance}
    with CountProgress("drawing", len(glyphs("train")) * options.per_glyph) as progress:
        show: Progress = lambda done, total: progress.show(done)  # noqa: E731
        asked = {"batch": options.batch, "seed": options.seed, "on_progress": show}
        card = measure_base(base, bundled_judge(), options.per_glyph, **how, **asked)
    write_atomically(options.out / "card.json", json.dumps(card, indent=1) + "\n")
    rows = [
        (name, f"{s['generated']:.1%}", f"{s['renderings']:.1%}", f"{s['chance']:.1%}", s["pictures"])
        for name, s in card["scores"].items()
    ]
    print_table(("question", "drawn", "renderings", "chance", "pictures"), rows)
    psnr = card["autoencoder_psnr_db"]
    print_table(("autoencoder", "PSNR"), [(split, f"{value:.2f} dB") for split, value in psnr.items()])
    if not options.no_sheet:
        with CountProgress("sheet", len(sheet_prompts())) as progress:
            sheet = sample_sheet(base, **how, on_progress=lambda done, total: progress.show(done))
        save_png(sheet, options.out / "sheet.png", {"base": base.name, **how})
    say(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
