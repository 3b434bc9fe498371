"""Choosing adapters of the library, each with a slider for its strength: a piece of several pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from studio import library
from studio.cards import read_card
from studio.errors import AdapterError, RequestError
from studio.schemas import schemas


def adapter_choices(medium: str = "") -> list[tuple[str, str]]:
    """The adapters of the library with the words that call them; of a medium, those whose base is not of another."""
    media = {row["name"]: row["medium"] for row in schemas()["bases"]}
    found = []
    for entry in library.entries():
        try:
            card = read_card(entry.path)
        except AdapterError:
            continue
        if medium and media.get(card.get("base", {}).get("name", ""), medium) != medium:
            continue
        word = card.get("trigger", "")
        found.append((f"{entry.name} - say: {word}" if word else entry.name, entry.name))
    return found


def family_of(name: str) -> str:
    """The family of the base that an adapter of the library was made for; "" of one that cannot be read."""
    try:
        return str(read_card(library.find(name)).get("base", {}).get("family", ""))
    except (AdapterError, RequestError):
        return ""


def checked(names: Sequence[str] | None) -> list[str]:
    """The names, if the library has them all. Raises RequestError."""
    known = {entry.name for entry in library.entries()}
    for name in names or ():
        if name not in known:
            raise RequestError(f"there is no adapter '{name}'", "reload the page")
    return list(names or ())


def make_sliders(most: int, lowest: float = 0.0) -> list[gr.Slider]:
    return [gr.Slider(lowest, 2, 1, step=0.05, visible=False, min_width=160) for _ in range(most)]


def sliders(names: Sequence[str] | None, *values: float) -> list[Any]:
    """A slider for each chosen adapter."""
    names = list(names or ())
    return [
        gr.update(visible=i < len(names), label=f"Strength of {names[i]}" if i < len(names) else "", value=value)
        for i, value in enumerate(values)
    ]
