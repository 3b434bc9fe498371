"""One cell of a study of clip bases: trains it, for its steps or for a time, and measures what it draws.

    python -m studio.comparing.motion_arm --preset FILE --run DIR --out card.json [--seconds S]

Stopped at any moment, the same command goes on. A time is that of this process's processor, over all its parts, so that
methods of unequal cost can be given the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studio.bases.registry import load_base
from studio.bases.sticker_video.family import StickerVideo
from studio.errors import DataError
from studio.evaluate.card import machine
from studio.evaluate.motion_card import QUESTIONS, measure_clips
from studio.evaluate.motion_distance import measure_distance
from studio.evaluate.motion_judge import bundled_motion_judge
from studio.files import write_atomically
from studio.run import Run
from studio.terminal import StopSignal, outcome, say
from studio.training import Order, plan, plan_resume

SPENT = "spent.json"


def train(preset: str, folder: Path, limit: float) -> Path:
    """The trained base. `limit` is in processor seconds, 0 for none. Exits as signals ask, at a checkpoint."""
    run = Run(folder)
    spent = _spent(folder)
    if spent.get("done") or _has_finished(run):
        kept = [path / "base" for path in (folder, *reversed(run.checkpoint_folders())) if (path / "base").exists()]
        if kept:  # a finished study keeps no checkpoints
            return kept[0]
    if not run.checkpoint_folders():
        shutil.rmtree(folder, ignore_errors=True)  # interrupted before its first checkpoint
        training, before = plan(Order(preset, run=folder)), 0.0
    else:
        training, before = plan_resume(folder), float(spent.get("seconds", 0))
    began = time.process_time()

    def seconds() -> float:
        return before + time.process_time() - began

    with StopSignal() as stop:
        for event in training.events(lambda: stop() or bool(limit and seconds() >= limit)):
            if event.kind in ("checkpoint", "stopped", "finished"):
                over = event.kind == "finished" or bool(limit and seconds() >= limit)
                told = {"seconds": seconds(), "step": event.step, "done": over}
                write_atomically(folder / SPENT, json.dumps(told))
        if stop():
            sys.exit(stop.exit_code)
    return run.checkpoint_folders()[-1] / "base"


def _spent(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SPENT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_finished(run: Run) -> bool:
    return any(event["kind"] == "finished" for event in run.events())


def measure(folder: Path, run: Path, clips: int, distance_clips: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """The figures of a trained base, and what its training cost."""
    base = load_base(str(folder))
    if not isinstance(base, StickerVideo):
        raise DataError(f"'{folder}' draws no moving stickers")
    judge = bundled_motion_judge()
    card, _ = measure_clips(base, judge, clips, steps=steps, seed=seed)
    picture, between, text = (card[question] for question in QUESTIONS)
    figures = {
        "picture_gain": picture["gain"],
        "picture_motion": picture["motion right"],
        "between_gain": between["gain"],
        "between_motion": between["motion right"],
        "text_motion": text["motion right"],
    }
    if distance_clips:
        found = measure_distance(base, judge, distance_clips, steps=steps, seed=seed)
        figures |= {"s_fvd": found["s_fvd"], "s_fvd_floor": found["s_fvd of true renderings"]}
    events = Run(run).history()
    losses = [event["loss"] for event in events if event["kind"] == "validation"]
    spent = _spent(run)
    trained = next((event["trained_parameters"] for event in events if event["kind"] == "started"), 0)
    training = {"step": spent.get("step"), "seconds": spent.get("seconds"), "num_trainable_params": trained}
    return {
        "figures": figures | ({"validation_loss": losses[-1]} if losses else {}),
        "training": training,
        "trivial": {
            "picture": picture["psnr of the trivial clip"],
            "between": between["psnr of the trivial clip"],
            "between_motion": between["motion right in the trivial clips"],
            "text_motion": text["motion right in true renderings"],
        },
        "machine": machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m studio.comparing.motion_arm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", required=True, help="name or file")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go")
    parser.add_argument("--seconds", type=float, default=0, help="processor time of the training (default: its steps)")
    parser.add_argument("--clips", type=int, default=40, help="clips of each question (default 40)")
    parser.add_argument("--distance-clips", type=int, default=0, help="clips of the S-FVD (default 0: none)")
    parser.add_argument("--sampling-steps", type=int, default=12, help="sampling steps (default 12)")
    options = parser.parse_args(arguments)
    return outcome(lambda: _train_and_measure(options))


def _train_and_measure(options: argparse.Namespace) -> None:
    base = train(options.preset, options.run, options.seconds)
    say(f"trained: {base}; drawing {3 * options.clips + options.distance_clips} clips")
    card = measure(base, options.run, options.clips, options.distance_clips, options.sampling_steps)
    write_atomically(options.out, json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
