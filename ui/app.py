"""The server: all pages in one look, on this machine alone unless a password is asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ui.quick import without_servers  # isort: skip  gradio, which all others import

import gradio as gr

from studio import library
from studio.cards import read_card
from studio.drawing import pictures_dir
from studio.errors import RequestError
from studio.jobs import Dispatcher
from studio.paths import studio_home
from studio.trace import trace_of
from ui import look
from ui.access import users_for
from ui.pages import generate
from ui.registry import Page, pages

LARGEST_UPLOAD = "2gb"
LOOK_EVERY_SECONDS = 0.03
KEPT = (3600, 86_400)  # seconds: how often old uploads are looked for, and how old they may grow


def build() -> gr.Blocks:
    """All pages as one app."""
    first, *others = pages()
    with without_servers():
        return _written(first, others)


def _written(first: Page, others: list[Page]) -> gr.Blocks:
    with gr.Blocks(title="The studio", analytics_enabled=False, fill_width=True, delete_cache=KEPT) as app:
        gr.Navbar(main_page_name=first.title)
        first.build()
    for page in others:
        with app.route(page.title, page.path):
            gr.Navbar(main_page_name=first.title)
            page.build()
    return app


def _look_around() -> None:
    """Reads the logs of all runs and the cards of all adapters once, so that no page waits for hundreds of them."""
    for folder in library.run_folders():
        with suppress(Exception):  # whoever shows it says what is wrong with it
            trace_of(folder)
    for entry in library.entries():
        with suppress(Exception):
            read_card(entry.path)


def _rest_between_looks(app: gr.Blocks) -> None:
    """The library's queue looks for events a thousand times a second: 7 % of a core while nothing happens."""
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        if hasattr(app._queue, name):
            setattr(app._queue, name, LOOK_EVERY_SECONDS)


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: Path | None = None,
    announce: Callable[[str], None] = lambda url: None,
    wait: bool = True,
    ready: Callable[[], None] = lambda: None,
) -> Any:
    """Serves until interrupted. Raises RequestError for a host that others reach, without a password.

    `ready` is called when the port is needed. With `wait=False`, returns (url, close) at once.
    """
    users = users_for(host, auth)
    os.environ["GRADIO_TEMP_DIR"] = str(studio_home() / "cache" / "uploads")  # else a folder that others can read
    served = [pictures_dir(), studio_home() / "cache" / "served"]
    for folder in served:
        folder.mkdir(parents=True, exist_ok=True)
    app = build()
    dispatcher = Dispatcher()
    dispatcher.start()
    threading.Thread(target=_look_around, daemon=True).start()
    ready()
    try:
        _rest_between_looks(app.queue(default_concurrency_limit=8))
        started = app.launch(
            server_name=host, server_port=port, auth=users, auth_message="The studio", share=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], allowed_paths=[str(folder) for folder in served],
            max_file_size=LARGEST_UPLOAD, ssr_mode=False, pwa=False, enable_monitoring=False, show_error=True,
            theme=look.theme(), css=look.CSS.read_text(), head=look.head(), js=look.SCRIPT.read_text(),
        )  # fmt: skip
    except OSError as error:
        dispatcher.closing.set()
        raise RequestError(f"cannot serve on port {port}: {error}", "choose another one with --port") from None
    announce(started[1])

    def close() -> None:
        dispatcher.closing.set()
        generate.ENGINE.close()
        app.close(verbose=False)

    if not wait:
        return started[1], close
    try:
        dispatcher.join()
    except KeyboardInterrupt:
        pass
    finally:
        close()
    return None
