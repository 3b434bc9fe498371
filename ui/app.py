"""The server: all pages in one look, on this machine alone unless a password is asked for."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing leaves this machine

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio.drawing import pictures_dir
from studio.errors import RequestError
from studio.jobs import Dispatcher
from studio.paths import studio_home
from ui import look
from ui.pages import generate
from ui.registry import pages

LARGEST_UPLOAD = "2gb"


def build() -> gr.Blocks:
    """All pages as one app."""
    first, *others = pages()
    with gr.Blocks(title="The studio", analytics_enabled=False, fill_width=True) as app:
        gr.Navbar(main_page_name=first.title)
        first.build()
    for page in others:
        with app.route(page.title, page.path):
            gr.Navbar(main_page_name=first.title)
            page.build()
    return app


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: Path | None = None,
    announce: Callable[[str], None] = lambda url: None,
    wait: bool = True,
) -> Any:
    """Serves until interrupted. Raises RequestError for a host that others reach, without a password.

    With `wait=False`, returns (url, close) at once.
    """
    users = read_users(auth) if auth is not None else None
    if users is None and not is_loopback(host):
        raise RequestError(
            f"'{host}' can be reached by others, and there is no password",
            "add --auth FILE with lines of the form name:password, or use --host 127.0.0.1",
        )
    served = [pictures_dir(), studio_home() / "cache" / "served"]
    for folder in served:
        folder.mkdir(parents=True, exist_ok=True)
    app = build()
    dispatcher = Dispatcher()
    dispatcher.start()
    try:
        started = app.queue(default_concurrency_limit=8).launch(
            server_name=host, server_port=port, auth=users, auth_message="The studio", share=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], allowed_paths=[str(folder) for folder in served],
            max_file_size=LARGEST_UPLOAD, ssr_mode=False, pwa=False, enable_monitoring=False, show_error=True,
            theme=look.theme(), css=look.CSS.read_text(), js=look.SCRIPT.read_text(),
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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_users(path: Path) -> list[tuple[str, str]]:
    """Lines `name:password`. Raises RequestError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        readable = path.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read '{path}': {error}") from None
    if readable:
        raise RequestError(f"others on this machine can read the passwords in '{path}'", f"run: chmod 600 {path}")
    users = [(name, password) for name, colon, password in (line.partition(":") for line in lines) if colon]
    if not users or not all(name and len(password) >= 8 for name, password in users):
        raise RequestError(f"'{path}' holds no usable password", "write lines name:password, 8 characters or more")
    return users
