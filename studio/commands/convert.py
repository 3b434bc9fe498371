"""`studio convert`: the published Mustango, which is pickles, as a folder that the studio opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studio.terminal import print_json, say


def convert(
    folder: Annotated[Path, typer.Argument(help="The folder that the hub has as declare-lab/mustango.")],
    destination: Annotated[Path, typer.Option("--out", help="Folder for the converted pipeline.")],
    tokenizer: Annotated[
        str, typer.Option(help="Folder or hub id of FLAN-T5's tokenizer, which Mustango's files lack.")
    ] = "google/flan-t5-large",
    beat_tokenizer: Annotated[
        str, typer.Option(help="Folder or hub id of DeBERTa's tokenizer, for the predictors.")
    ] = "microsoft/deberta-v3-large",
    predictors: Annotated[
        bool, typer.Option(help="Take the networks along that guess beats and chords (4.7 GB).")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Turn Mustango's published pickles into safetensors. Example: studio convert mustango/ --out mustango-base/"""
    from studio.bases.mustango.convert import convert as write

    path = write(folder, destination, tokenizer, beat_tokenizer, predictors, progress=lambda what: say(what))
    if as_json:
        print_json({"base": str(path)})
    else:
        say(f"wrote {path}; play with: studio generate --base {path} 'a slow waltz on a piano'")
