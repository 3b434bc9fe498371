"""`studio inspect`: what an adapter is; with several, what they would do to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.errors import RequestError
from studio.terminal import CountProgress, out, print_json, print_table, say

LAYERS_SHOWN = 10


def inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Names in the library, files, PEFT folders.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report on several as a page, too.")] = None,
    base: Annotated[str | None, typer.Option(help="The base: for files of other programs, and for its drift.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Record the layers' inputs anew with the base.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """What an adapter is, or how several get on. Example: studio inspect my-cat"""
    if len(files) == 1:
        if html or calibrate:
            raise RequestError("a report on interference needs two adapters or more", "name another")
        _one(files[0], as_json)
        return
    from studio.interference.command import interference, write_page

    with CountProgress("comparing layers", 0) as progress:
        report = interference(files, base, calibrate, progress.show)
    if html is not None:
        write_page(report, html, force)
    if as_json:
        print_json(report.to_dict())
        return
    _tell(report)
    if html is not None:
        say(f"page: {html}")


def _one(name: str, as_json: bool) -> None:
    from studio.inspecting import describe_adapter

    facts = describe_adapter(name)
    if as_json:
        print_json([facts])
        return
    components = facts.pop("components")
    for key, value in facts.items():
        out.print(f"{key + ':':<14}{value}", soft_wrap=True, markup=False)
    print_table(
        ["part", "layers", "ranks", "numbers", "size of the change"], [list(row.values()) for row in components]
    )


def _tell(report: Any) -> None:
    from studio.interference.page import MEASURES, shown

    for line in report.verdict:
        out.print(line, soft_wrap=True, markup=False, style="bold")
    for line in report.findings:
        out.print(f"- {line}", soft_wrap=True, markup=False)
    print_table(list(report.adapters[0]), [[*map(shown, adapter.values())] for adapter in report.adapters])
    rows = [report.row("everything", report.total)]
    rows += [report.row(name, figures) for name, figures in report.groups.items()]
    pair = ["worst pair"] if len(report.adapters) > 2 else []

    def cells(row: dict[str, Any]) -> list[Any]:
        return [shown(row[key]) for key in MEASURES.values()] + ([" + ".join(row["pair"] or ())] if pair else [])

    print_table(
        ["where", "layers", *MEASURES, *pair], [[row["where"], row["layers"], *cells(row)] for row in rows], "where"
    )
    worst = report.worst_layers(LAYERS_SHOWN)
    out.print(f"The {len(worst)} worst of {len(report.layers)} layers:", style="bold")
    for row in worst:
        out.print("  ".join([row["where"], *cells(row)[len(MEASURES) :]]), soft_wrap=True, markup=False)
        told = [f"{name} {shown(row[key])}" for name, key in MEASURES.items() if row[key] is not None]
        out.print(f"    {', '.join(told)}", soft_wrap=True)
