"""`studio generate`: pictures, sounds and clips from a base and any number of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from studio.errors import RequestError
from studio.terminal import CountProgress, out, print_json, say


def generate(
    prompt: str,
    base: Annotated[str | None, typer.Option(help="Default: the base of the first adapter, else sticker.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME|FILE[:WEIGHT]", help="May be given again.")] = None,
    bank: Annotated[bool, typer.Option("--bank", help="Add the library's adapters that the prompt calls.")] = False,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1|MASK.png:ADAPTER[:WEIGHT]:PROMPT",
            help="A box in fractions of the picture, or a painted mask, white inside, where this adapter draws this "
            "prompt. May be given again; elsewhere PROMPT is drawn.",
        ),
    ] = None,
    feather: Annotated[
        float | None, typer.Option(min=0, max=1, help="Width over which regions fade, a fraction of the picture.")
    ] = None,
    apart: Annotated[
        float | None, typer.Option(min=0, max=1, help="First share of the steps in which regions are kept apart.")
    ] = None,
    distance: Annotated[
        float | None, typer.Option(min=0, max=1, help="How far apart: the share of attention that is taken away.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many pictures.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels. Default: the base's own.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Length of a sound. Default: the base's own.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip. Default: 8.")] = None,
    fps: Annotated[float | None, typer.Option(min=1, max=60, help="Frames of a clip a second. Default: 8.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="A clip that plays in a circle.")] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX=FILE", help="A picture that is this frame of the clip, from 0."),
    ] = None,
    out_path: Annotated[Path | None, typer.Option("--out", help="A file, or a folder for several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Draw pictures, play music. Example: studio generate "a zovuki, on blue" --adapter my-cat:0.9 --out cat.png

    Several concepts: studio generate "on a green background" --region "0,0,0.5,1:my-cat:a mycat, on a green background"
    --region "0.5,0,1,1:my-dog:a mydog, on a green background"
    """
    from studio.base import Request
    from studio.bases.registry import load_base
    from studio.generation import free_paths, given_frames, parse_use, remarks_on, wearing, works_of
    from studio.regions.drawing import drawing

    width, height = _parse_size(size)
    if out_path is not None and out_path.suffix:
        free_paths(out_path, count, "", force)  # told before anything is loaded
    uses = [parse_use(text) for text in adapter or ()]
    layout = _layout(region, feather, apart, distance)
    called = _called(prompt, bank, uses)
    own = next((use.base for use in (*uses, *(layout.uses if layout else ()))), called.base if called else "")
    loaded = load_base(base or own or "sticker")
    for note in loaded.notes:
        say(note)
    works = works_of(loaded)
    paths = works.paths(out_path, count, prompt, force)
    uses += called.worn(loaded) if called else []
    pictures = given_frames(given or (), loaded, frames, fps, loop)
    worn = drawing(loaded, layout, uses, (width, height)) if layout else wearing(loaded, uses)
    with worn as warnings, CountProgress("drawing", count) as progress:
        for warning in (*warnings, *remarks_on(prompt, uses, loaded), *(called.warnings if called else ())):
            say(f"warning: {warning}", style="yellow")
        for number, path in enumerate(paths):
            request = Request([prompt], [seed + number], negative, steps, guidance, width, height, seconds)
            request = replace(request, frames=frames, fps=fps, loop=loop, given=pictures)
            facts = works.facts(request, 0, loaded, uses) | (layout.facts() if layout else {})
            works.save(loaded.generate(request)[0], path, facts)
            progress.show(number + 1)
    if as_json:
        print_json({works.noun: [str(path) for path in paths], "seeds": list(range(seed, seed + count))})
    else:
        for path in paths:
            out.print(str(path), soft_wrap=True, markup=False)


def _layout(texts: list[str] | None, feather: float | None, apart: float | None, distance: float | None) -> Any:
    """The regions that are asked for, and how they meet; None without any."""
    blend = {"feather": feather, "apart": apart, "distance": distance}
    chosen = {name: value for name, value in blend.items() if value is not None}
    if not texts:
        if chosen:
            raise RequestError(f"--{next(iter(chosen))} is for regions, and there is none", "give one with --region")
        return None
    from studio.regions.canvas import Blend
    from studio.regions.layout import Layout, parse_region

    return Layout(tuple(map(parse_region, texts)), Blend(**chosen))


def _called(prompt: str, bank: bool, uses: list[Any]) -> Any:
    """What the prompt calls from the library, if the bank is asked for."""
    if not bank:
        return None
    from studio.bank import pick

    architecture = uses[0].adapter.card.base.architecture if uses else ""
    called = pick(prompt, [use.name for use in uses], architecture)
    for entry in called.entries:
        say(f"from the bank: {entry.name}")
    return called


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise RequestError(f"--size '{text}' is not of the form WIDTHxHEIGHT", "for example --size 128x128")
    return int(parts[0]), int(parts[1])
