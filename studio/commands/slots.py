"""`studio library slots`: who holds which directions of which base, and what is free."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from studio.terminal import out, print_json, print_table, say


def slots(
    free: Annotated[
        str | None, typer.Option(metavar="WORD", help="Free the slot of this trigger word or concept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """The slots of concepts trained with basis=slots, and how full each bank is. Example: studio library slots"""
    from studio import slots as ledger

    if free is not None:
        holding = ledger.find(free)
        ledger.release(holding)
        say(f"freed slot {holding.slot} (rank {holding.rank}) of '{holding.trigger or holding.concept}'")
    found = ledger.overview()
    if as_json:
        print_json(found)
    elif not found:
        say("no slots are held; trainings with method orthogonal take them")
    for bank in [] if as_json else found:
        out.print(_words(bank), soft_wrap=True, markup=False)
        columns = ("slot", "rank", "columns", "trigger", "holder", "since")
        print_table(columns, [[row[name] for name in columns] for row in bank["holdings"]])


def _words(bank: dict[str, Any]) -> str:
    text = f"{bank['base']} ({bank['layout']}): {bank['columns_taken']} of {bank['columns']} columns taken"
    if bank["full"]:
        return (
            f"{text}: full for rank {bank['rank']}. Free a slot, use a lower rank, or train with basis=subset and "
            "merge with --strategy gram"
        )
    return f"{text}, {bank['free_slots']} slots of rank {bank['rank']} free"
