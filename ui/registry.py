"""What a page is, and how the pages are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradio.context import Context


@dataclass(frozen=True)
class Page:
    """A page of the studio. `build` is called inside its Blocks; `order` sorts the navigation."""

    title: str
    path: str
    order: int
    build: Callable[[], None]


def opened_page() -> Any:
    """The event that a page was opened, for `gr.on`, inside `build`.

    `gr.on(None, ...)` would run at each change of its inputs, too: a form that gave the browser its draft's name was
    made a second time, over what had been typed into the first.
    """
    assert Context.root_block is not None
    return Context.root_block.load


def pages() -> list[Page]:
    """The pages in the order of the navigation."""
    package = importlib.import_module("ui.pages")
    modules = [importlib.import_module(f"ui.pages.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return sorted((module.PAGE for module in modules if hasattr(module, "PAGE")), key=lambda page: page.order)
