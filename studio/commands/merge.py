"""`studio merge`: adapters made into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.terminal import CountProgress, file_size, out, print_json, print_table, say


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Names in the library, files, PEFT folders."),
    ] = None,
    out_path: Annotated[Path | None, typer.Option("--out", help="The file to write.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the library, instead of --out.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="auto, sum, svd, gram, ties, dare, della, pcb, tsv or knots. Default: auto.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="A setting of the strategy; see --list.")
    ] = None,
    rank: Annotated[str | None, typer.Option(metavar="N|auto", help="Highest rank of a layer.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative error that a lower rank may cost.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with all of this, and weights by block.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, for LoRA files of other programs.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Record the layers' inputs anew, for gram.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of dare and della.")] = None,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Refuse what would need more, as 2GiB.")] = None,
    compress: Annotated[
        str | None, typer.Option(metavar="int8|ternary:DENSITY", help="Keep low-rank layers in few bits, with a loss.")
    ] = None,
    without: Annotated[
        str | None, typer.Option(metavar="PARENT", help="Take this parent's share out of a merge again.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Export at once: checkpoint, diffusers, kohya or diff.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the strategies with their settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Make several adapters one. Example: studio merge my-cat:0.8 my-dog:0.6 --name both"""
    if show:
        _list(as_json)
        return
    from studio.merging.command import MergeOrder, merge_to_order, parse_rank

    changes = {
        "strategy": strategy,
        "rank": parse_rank(rank),
        "tolerance": tolerance,
        "base": base,
        "calibrate": calibrate or None,
        "seed": seed,
        "compress": compress,
    }
    order = MergeOrder(
        tuple(adapters or ()), recipe, changes, tuple(option or ()), out_path, name, to, max_ram, force, without
    )
    progress: list[CountProgress] = []

    def show_progress(done: int, total: int) -> None:
        if not progress:
            progress.append(CountProgress("merging layers", total))
            progress[0].__enter__()
        progress[0].show(done)

    try:
        report, exported = merge_to_order(order, show_progress)
    finally:
        for bar in progress:
            bar.__exit__()
    _tell(report, exported, as_json)


def _tell(report: Any, exported: Any, as_json: bool) -> None:
    facts = report.to_dict() | ({"export": exported.to_dict()} if exported is not None else {})
    if as_json:
        print_json(facts)
        return
    for warning in (*report.warnings, *(exported.warnings if exported is not None else ())):
        say(f"warning: {warning}", style="yellow")
    reason = f" ({report.reason})" if report.reason not in ("", "asked for") else ""
    out.print(f"{report.label}{reason}", soft_wrap=True, markup=False)
    parents = ", ".join(f"{parent['name']} x {parent['weight']:g}" for parent in report.parents)
    layers = f"{len(report.rows)} layers" if report.rows else report.reason
    size = f", {file_size(report.bytes)}, {report.seconds:.1f} s" if report.bytes else ""
    out.print(f"{report.path}: {parents}; {layers}{size}", soft_wrap=True, markup=False)


def _list(as_json: bool) -> None:
    from studio.merging import strategies

    found = strategies().values()
    if as_json:
        print_json({s.name: {"summary": s.summary, "settings": s.settings.model_json_schema()} for s in found})
        return
    rows = []
    for entry in found:
        settings = (f"{name}={field.default:g}" for name, field in entry.settings.model_fields.items())
        rows.append((entry.name, entry.summary, " ".join(settings)))
    print_table(["strategy", "what", "settings"], rows)
