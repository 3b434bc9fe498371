"""`studio bench`: memory and time of every method beside its peers, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.errors import RequestError, nearest
from studio.terminal import CountProgress, out, print_json, print_table, say

PARTS = ("memory", "speed", "merge", "files", "video")


def bench(
    part: Annotated[str, typer.Argument(metavar="|".join(PARTS), help="Default: all.")] = "",
    case: Annotated[str, typer.Option(help="Only the cases with this in their name, such as sdxl or sticker.")] = "",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often everybody takes a turn.")] = 15,
    out_path: Annotated[Path | None, typer.Option("--out", help="Default: bench.md in the studio's home.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Memory, speed, merging, clips beside PEFT, diffusers and full fine-tuning. Example: studio bench memory"""
    if part and part not in PARTS:
        raise RequestError(f"there is no benchmark '{part}'", nearest(part, PARTS))
    from studio.bench.run import run
    from studio.files import write_atomically
    from studio.paths import studio_home

    results = []
    for each in [part] if part else PARTS:
        with CountProgress(f"bench {each}", 1) as progress:
            results.append(run(each, case if part else "", rounds, _shown_on(progress)))
        if not as_json:
            _print(results[-1])
    path = out_path or studio_home() / "bench.md"
    write_atomically(path, "\n".join(result.to_markdown() for result in results))
    say(f"written: {path}")
    if as_json:
        print_json([result.to_dict() for result in results])


def _shown_on(progress: CountProgress) -> Any:
    def show(what: str, done: int, total: int) -> None:
        progress.what = what
        progress.show_of(done, total)

    return show


def _print(result: Any) -> None:
    from studio.bench.rows import columns_of, verdict_cells

    columns = columns_of(result.rows)
    print_table([head for head, _ in columns], [[cell(row) for _, cell in columns] for row in result.rows])
    out.print()
    print_table(["bar", "case", "at most", "measured", "met"], map(verdict_cells, result.verdicts))
    out.print()
