"""How well adapters learned their subject, and what else they moved, on the bundled base.

    python -m studio.evaluate.subject_card my-cat my-cat-2 my-cat-3 --references assets/examples/mascot

Of each adapter: similarity of its pictures in new settings to the references; whether the ground and the place that the
prompt names are there; drift on unrelated prompts. Beside it two trivial baselines: the base alone with the same
prompts, and the references compared with each other. Several adapters (seeds) give mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from studio.base import Request
from studio.bases.registry import load_base
from studio.data.decode import decode
from studio.errors import DataError, StudioError
from studio.evaluate.judge import HEADS, Judge, bundled_judge
from studio.evaluate.similarity import drift, subject_similarity
from studio.evaluate.sticker_card import sheet_prompts
from studio.generation import Use, parse_use, wearing
from studio.terminal import print_error, print_json, print_table, say

GROUNDS = ("yellow", "blue", "green", "pink", "orange", "purple", "red", "grey")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
UNRELATED = 32  # prompts of the sample sheet


def subject_prompts(word: str) -> list[tuple[str, dict[str, str]]]:
    """Prompts that put the subject on every ground and in every place, with the answers that the judge should give."""
    grounds = [(f"a {word}, on a {colour} background", {"ground": colour}) for colour in GROUNDS]
    places = [(f"a {word} {place}", {"position": place}) for place in PLACES]
    return grounds + places


def measure_subject(
    use: Use, judge: Judge, references: Sequence[Image.Image], base: Any, seed: int = 0
) -> dict[str, float]:
    """Similarity (cosine), shares of right grounds and places, drift and kept glyphs; all but similarity in [0, 1]."""
    asked = subject_prompts(use.adapter.card.trigger)
    prompts = [prompt for prompt, _ in asked]
    unrelated = sheet_prompts()[:UNRELATED]
    alone = _draw(base, prompts, seed), _draw(base, unrelated, seed)
    with wearing(base, [use]):
        worn = _draw(base, prompts, seed), _draw(base, unrelated, seed)
    moved = drift(judge, alone[1], worn[1])
    return {
        "similarity": subject_similarity(judge, worn[0], references),
        "similarity of the base alone": subject_similarity(judge, alone[0], references),
        "similarity among references": subject_similarity(judge, references, references),
        "ground right": _share(judge, worn[0], asked, "ground"),
        "place right": _share(judge, worn[0], asked, "position"),
        "drift": moved.distance,
        "unrelated glyphs kept": moved.kept,
    }


def _draw(base: Any, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    return base.generate(Request(list(prompts), [seed + i for i in range(len(prompts))]))


def _share(judge: Judge, pictures: list[Image.Image], asked: list[tuple[str, dict[str, str]]], head: str) -> float:
    """The share of the pictures whose prompt names an answer of this head that show it."""
    answers = judge.judge(pictures).answers(head)
    right = [
        HEADS[head][int(a)] == wanted[head] for a, (_, wanted) in zip(answers, asked, strict=True) if head in wanted
    ]
    return sum(right) / len(right)


def read_references(folder: Path) -> list[Image.Image]:
    """The pictures of a folder. Raises DataError if there are none."""
    found = [decode(path) for path in sorted(folder.glob("*.png"))]
    if not found:
        raise DataError(f"there are no PNG pictures in '{folder}' to compare with")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapters", nargs="+", help="names in the library, or files")
    parser.add_argument("--references", type=Path, required=True, help="folder of pictures of the subject")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        uses = [parse_use(name) for name in options.adapters]
        judge, base, references = bundled_judge(), load_base(uses[0].base), read_references(options.references)
        rows = []
        for use in uses:
            say(f"measuring {use.name}")
            rows.append(measure_subject(use, judge, references, base))
    except StudioError as error:
        print_error(error)
        sys.exit(error.exit_code)
    if options.json:
        print_json(json.loads(json.dumps(rows)))
        return
    table = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        table.append((key, f"{statistics.mean(values):.3f}", f"{spread:.3f}", "  ".join(f"{v:.3f}" for v in values)))
    print_table(["measure", "mean", "sd", "each"], table)


if __name__ == "__main__":
    main()
