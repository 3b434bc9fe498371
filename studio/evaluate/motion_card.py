"""What a base of moving stickers can do: against copying, against blending, and whether it plays what it is told.

    python -m studio.evaluate.motion_card BASE --out DIR

writes DIR/card.json, DIR/sheet.png and the same clips, moving, as DIR/sheet.webp. Clips are renderings of pairs of a
glyph and a motion that were never trained on, the same for every base. Three questions:

- picture to clip: the first frame is given; is the rest nearer to the truth than that frame repeated?
- interpolation: every other frame is given; are those between nearer than the linear blend of their neighbours?
- text to clip: nothing is given; does the judge see the motion that the prompt names?

PSNR in dB of premultiplied RGBA, of the mean squared error over all drawn frames of all clips; in brackets the 95 %
interval of a bootstrap over clips.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from studio.base import Request
from studio.bases.sticker_video import alpha
from studio.bases.sticker_video.conditioning import blended
from studio.bases.sticker_video.family import StickerVideo
from studio.data import motions
from studio.data.clip_files import webp_bytes
from studio.data.clips import Clip
from studio.errors import DataError, RequestError
from studio.evaluate.motion_judge import MotionJudge, bundled_motion_judge
from studio.files import write_atomically
from studio.keyed import numpy_generator
from studio.samples import save_png

FIRST = (0,)
OTHERS = (0, 2, 4, 6)
BOOTSTRAPS = 1000
TITLE, GAP = 18, 8  # pixels of a sheet
MOVING_COLUMNS, MOVING_MS = 8, 125
QUESTIONS = ("picture to clip", "interpolation", "text to clip")
Progress = Callable[[int, int], None]  # clips drawn so far, clips in all


@dataclass(frozen=True)
class Truth:
    """A rendering, its caption and its motion."""

    clip: Clip
    caption: str
    motion: str


def held_out_clips(count: int, side: int, frames: int, seed: int) -> list[Truth]:
    """Renderings of pairs that training never draws, the motions in turn."""
    found: list[Truth] = []
    index = 0
    names = list(motions.MOTIONS)
    while len(found) < count:
        clip, caption, act = motions.draw_clip(("motion card", seed, index), side, frames, held_out=True)
        index += 1
        if act.motion == names[len(found) % len(names)]:
            found.append(Truth(clip, caption, act.motion))
    return found


def measure_clips(
    base: StickerVideo,
    judge: MotionJudge | None,
    count: int = 40,
    *,
    steps: int = 12,
    guidance: float = 1.0,
    text_guidance: float | None = None,
    frames: int = 8,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> tuple[dict[str, Any], list[tuple[str, Clip]]]:
    """Scores, and (title, clip) pairs for a sheet. `guidance` is for clips with given frames: above 1 it costs PSNR.

    The same arguments ask for the same clips and noises.
    """
    began = time.monotonic()
    truths = held_out_clips(count, base.resolution, frames, seed)
    results: dict[str, Any] = {"base": Path(base.name).name, "clips": count, "frames": frames, "seed": seed}
    shown: list[tuple[str, Clip]] = []
    done = 0

    def drawn(index: int, given: Sequence[int], scale: float | None) -> Clip:
        nonlocal done
        truth = truths[index]
        request = Request(
            [truth.caption],
            [seed + index],
            steps=steps,
            guidance=scale,
            image_guidance=1.0 if given else None,
            frames=frames,
            fps=round(truth.clip.fps, 2),
            loop=truth.clip.loop,
            given={place: truth.clip.frames[place] for place in given},
        )
        clip: Clip = base.generate(request)[0]
        done += 1
        on_progress(done, 3 * count)
        return clip

    for name, given in zip(QUESTIONS, (FIRST, OTHERS)):
        clips = [drawn(index, given, guidance) for index in range(count)]
        trivial = [guessed(truth.clip, given) for truth in truths]
        results[name] = compared([t.clip for t in truths], clips, trivial, given)
        results[name]["given frames exact"] = all(
            clip.frames[place].tobytes() == truth.clip.frames[place].tobytes()
            for clip, truth in zip(clips, truths)
            for place in given
        )
        if judge is not None:
            wanted = [truth.motion for truth in truths]
            results[name]["motion right"] = share_right(judge, clips, wanted)
            results[name]["motion right in the trivial clips"] = share_right(judge, trivial, wanted)
        for truth, clip in list(zip(truths, clips))[:4]:
            shown += [(f"{truth.caption}: the truth", truth.clip), (f"{name}: the same", clip)]
    clips = [drawn(index, (), text_guidance) for index in range(count)]
    shown += [(truths[i].caption, clips[i]) for i in range(min(10, count))]
    if judge is not None:
        wanted = [truth.motion for truth in truths]
        answers = judge.judge(clips)
        results[QUESTIONS[2]] = {
            "motion right": share_right(judge, clips, wanted),
            "motion right in true renderings": share_right(judge, [truth.clip for truth in truths], wanted),
            "by motion": {
                name: [sum(a == name for a, w in zip(answers, wanted) if w == name), wanted.count(name)]
                for name in motions.MOTIONS
            },
        }
    results["seconds"] = round(time.monotonic() - began, 1)
    return results, shown


def guessed(clip: Clip, given: Sequence[int]) -> Clip:
    """The trivial clip: linear blends of given frames, premultiplied, and beyond them the nearest repeated."""
    rgba = premultiplied(clip).transpose(0, 1)[None]
    told = torch.zeros(1, len(clip.frames), dtype=torch.bool)
    told[0, list(given)] = True
    mixed = blended(rgba.masked_fill(~told[:, None, :, None, None], 0), told, torch.ones_like(told))[0].transpose(0, 1)
    straight = torch.cat([mixed[:, :3] / mixed[:, 3:].clamp(min=1e-3), mixed[:, 3:]], 1)
    return Clip(tuple(alpha.to_pictures(straight)), clip.durations, clip.loop)


def premultiplied(clip: Clip) -> Tensor:
    """(F, 4, H, W) in [0, 1]."""
    rgba = alpha.to_tensor(clip.frames)
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def compared(
    truths: Sequence[Clip], clips: Sequence[Clip], trivial: Sequence[Clip], given: Sequence[int]
) -> dict[str, Any]:
    """PSNR of both over the frames that were not given, and the difference with its interval."""
    own, theirs = (np.array([error(t, c, given) for t, c in zip(truths, some)]) for some in (clips, trivial))
    rng = numpy_generator("motion card bootstrap", len(own))
    picks = rng.integers(len(own), size=(BOOTSTRAPS, len(own)))
    gains = psnr(own[picks].mean(1)) - psnr(theirs[picks].mean(1))
    low, high = np.percentile(gains, (2.5, 97.5))
    return {
        "psnr": round(float(psnr(own.mean())), 2),
        "psnr of the trivial clip": round(float(psnr(theirs.mean())), 2),
        "gain": round(float(psnr(own.mean()) - psnr(theirs.mean())), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
    }


def error(truth: Clip, clip: Clip, given: Sequence[int]) -> float:
    """The mean squared error over the frames that were not given."""
    rest = [index for index in range(len(truth.frames)) if index not in given]
    return float((premultiplied(truth)[rest] - premultiplied(clip)[rest]).square().mean())


def psnr(mean_squared: Any) -> Any:
    return -10 * np.log10(np.maximum(mean_squared, 1e-10))


def share_right(judge: MotionJudge, clips: Sequence[Clip], wanted: Sequence[str]) -> float:
    return round(sum(answer == name for answer, name in zip(judge.judge(clips), wanted)) / len(wanted), 3)


def sheet(shown: Sequence[tuple[str, Clip]], columns: int = 2) -> Image.Image:
    """Every clip as a row of its frames under its title, in columns."""
    strips = [(title, clip.sheet()) for title, clip in shown]
    width, height = max(strip.width for _, strip in strips), max(strip.height for _, strip in strips)
    font, cell = ImageFont.load_default(TITLE - 4), (width + GAP, height + TITLE + GAP)
    rows = -(-len(strips) // columns)
    whole = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    pen = ImageDraw.Draw(whole)
    for number, (title, strip) in enumerate(strips):
        left, top = GAP + number // rows * cell[0], GAP + number % rows * cell[1]
        pen.text((left, top), title, fill="#333", font=font)
        whole.paste(strip, (left, top + TITLE))
    return whole


def moving_sheet(shown: Sequence[tuple[str, Clip]]) -> Clip:
    """The same clips in rows, all playing at one rate, on white."""
    clips = [clip for _, clip in shown]
    width, height = max(clip.size[0] for clip in clips) + GAP, max(clip.size[1] for clip in clips) + GAP
    size = (min(len(clips), MOVING_COLUMNS) * width, -(-len(clips) // MOVING_COLUMNS) * height)
    pictures = []
    for moment in range(max(len(clip.frames) for clip in clips)):
        picture = Image.new("RGBA", size, "white")
        for number, clip in enumerate(clips):
            frame = clip.frames[moment % len(clip.frames)]
            picture.alpha_composite(frame, (number % MOVING_COLUMNS * width, number // MOVING_COLUMNS * height))
        pictures.append(picture)
    return Clip(tuple(pictures), (MOVING_MS,) * len(pictures), loop=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a base and writes the card. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.evaluate.motion_card", description=__doc__.split("\n")[0])
    parser.add_argument("base", metavar="BASE", help="pipeline folder, or the name of a bundled base")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the card goes")
    parser.add_argument("--clips", type=int, default=40, help="clips of each question (default 40)")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps (default 12)")
    parser.add_argument("--guidance", type=float, default=1.0, help="for clips with given frames (default 1)")
    parser.add_argument("--text-guidance", type=float, help="for clips from text alone (default: the base's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of clips and noises (default 0)")
    parser.add_argument("--distance-clips", type=int, default=0, help="clips of the S-FVD (default 0: not measured)")
    parser.add_argument("--unjudged", action="store_true", help="measure PSNR alone, without the judge of motions")
    options = parser.parse_args(arguments)
    from studio.terminal import outcome

    return outcome(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    from studio.bases.registry import load_base
    from studio.evaluate.motion_distance import measure_distance
    from studio.terminal import CountProgress, print_table, say

    if options.clips < 1 or options.steps < 1:
        raise RequestError("a card needs a clip and a step at least", "for example --clips 40 --steps 12")
    base = load_base(options.base)
    if not isinstance(base, StickerVideo):
        raise DataError(f"'{options.base}' draws no moving stickers", "give a base of the family sticker_video")
    judge = None if options.unjudged else bundled_motion_judge()
    how = {"steps": options.steps, "guidance": options.guidance, "text_guidance": options.text_guidance}
    with CountProgress("drawing", 3 * options.clips) as progress:
        show: Progress = lambda done, total: progress.show(done)  # noqa: E731
        card, shown = measure_clips(base, judge, options.clips, **how, seed=options.seed, on_progress=show)
    if judge is not None and options.distance_clips:
        with CountProgress("drawing for the S-FVD", options.distance_clips) as progress:
            how_far = {"steps": options.steps, "seed": options.seed}
            found = measure_distance(
                base, judge, options.distance_clips, **how_far, on_progress=lambda done, _: progress.show(done)
            )
        card[QUESTIONS[2]] |= {**found, "clips of the S-FVD": options.distance_clips}
    write_atomically(options.out / "card.json", json.dumps({**card, **how}, indent=1) + "\n")
    save_png(sheet(shown), options.out / "sheet.png", {"clips": [title for title, _ in shown], **how})
    write_atomically(options.out / "sheet.webp", webp_bytes(moving_sheet(shown), quality=80))
    rows = [(question, name, str(value)) for question in QUESTIONS for name, value in card.get(question, {}).items()]
    print_table(("question", "what", "value"), rows)
    say(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
