"""`studio ui`: the studio in a browser, on this machine."""

from __future__ import annotations

import importlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from studio.errors import MissingPart, StudioError
from studio.terminal import say


def _gather() -> None:
    from studio.schemas import schemas

    with suppress(StudioError):  # whoever needs them next says why
        schemas()


def ui(
    host: Annotated[str, typer.Option(help="Another than this machine's own needs --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    auth: Annotated[Path | None, typer.Option(help="File with lines name:password, readable by you alone.")] = None,
    library: Annotated[Path | None, typer.Option(help="Another folder of adapters than the home's.")] = None,
) -> None:
    """Train, look, draw and keep, in the browser. Example: studio ui --port 7860"""
    if library is not None:
        os.environ["STUDIO_LIBRARY"] = str(library.expanduser().resolve())  # for the trainings begun from there too
    importlib.import_module("ui.access").users_for(host, auth)
    waiting = importlib.import_module("ui.waiting").Waiting(host, port)
    say(f"open http://{host}:{port}/ in a browser; Ctrl-C ends it, trainings go on")
    threading.Thread(target=_gather, daemon=True).start()  # by another process, while this one imports gradio
    try:
        app = importlib.import_module("ui.app")
    except ModuleNotFoundError as error:
        raise MissingPart(f"the browser pages need '{error.name}'", "pip install 'gradio>=6.31,<7'") from None
    app.serve(host, port, auth, announce=lambda url: say("ready"), ready=waiting.close)
