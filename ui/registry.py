"""What a page is, and how the pages are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """A page of the studio. `build` is called inside its Blocks; `order` sorts the navigation."""

    title: str
    path: str
    order: int
    build: Callable[[], None]


def pages() -> list[Page]:
    """The pages in the order of the navigation."""
    package = importlib.import_module("ui.pages")
    modules = [importlib.import_module(f"ui.pages.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return sorted((module.PAGE for module in modules if hasattr(module, "PAGE")), key=lambda page: page.order)
