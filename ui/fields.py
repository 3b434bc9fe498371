"""Labelled controls as HTML, each telling the server its name and value when it changes (see `pieces.TELL`).

A form of them is one component of the page, however many settings it has, so that it opens at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ui.form import Field
from ui.pieces import text


def control(field: Field, value: Any, key: str = "") -> str:
    """The control of a setting, with its tooltip beneath the label."""
    key = key or field.key
    if field.kind == "bool":
        return checkbox(key, field.label, bool(value), field.hint)
    if field.kind == "choice":
        return select(key, field.label, [(str(c), str(c)) for c in field.choices], str(value or ""), field.hint)
    if field.kind == "choices":
        return _group(key, field, list(value or ()))
    placeholder = "automatic" if field.optional else ""
    lines = {"lines": 3, "yaml": 2}.get(field.kind, 1)
    mode = {"int": "numeric", "float": "decimal"}.get(field.kind, "")
    return line(key, field.label, value, field.hint, placeholder, lines, mode)


def line(
    key: str, label: str, value: Any = "", hint: str = "", placeholder: str = "", lines: int = 1, mode: str = "",
    wide: bool = False,
) -> str:  # fmt: skip
    """A field for text; `mode` is the keyboard that a phone shows."""
    common = f"{_names(key, hint)} placeholder='{text(placeholder)}' autocomplete='off' spellcheck='false'"
    shown = text("" if value is None else value)
    if lines > 1:
        box = f"<textarea rows='{lines}' {common}>{shown}</textarea>"
    else:
        box = f"<input type='text' inputmode='{mode or 'text'}' value='{shown}' {common}>"
    return _labelled(key, label, hint, box, "field wide" if wide else "field")


def select(key: str, label: str, choices: Sequence[tuple[str, str]], value: str, hint: str = "") -> str:
    """`choices` are pairs of what is shown and what is meant."""
    options = "".join(
        f"<option value='{text(meant)}'{' selected' if meant == value else ''}>{text(shown)}</option>"
        for shown, meant in choices
    )
    return _labelled(key, label, hint, f"<select {_names(key, hint)}>{options}</select>")


def checkbox(key: str, label: str, on: bool, hint: str = "") -> str:
    box = f"<input type='checkbox' {_names(key, hint)}{' checked' if on else ''}>"
    named = f"<label for='{_id(key)}'>{box}<span>{text(label)}</span></label>"
    return f"<div class='field tick'>{named}{_hint(key, hint)}</div>"


def slider(key: str, label: str, value: float, low: float, high: float, step: float = 0.05) -> str:
    """A slider whose number follows it."""
    return (
        f"<div class='field slide'><label for='{_id(key)}'>{text(label)}</label><span class='track'>"
        f"<input type='range' min='{low:g}' max='{high:g}' step='{step:g}' value='{value:g}' {_names(key, '')}>"
        f"<output for='{_id(key)}'>{value:g}</output></span></div>"
    )


def button(name: str, label: str, kind: str = "", title: str = "") -> str:
    """A button that tells the server its name. `kind` is primary, quiet or danger."""
    told = f" title='{text(title)}' aria-label='{text(title)}'" if title else ""
    return f"<button type='button' class='button {kind}' data-click='{text(name)}'{told}>{text(label)}</button>"


def more(key: str, title: str, inside: str, open_: bool = False) -> str:
    """A part that opens; the browser remembers whether it is open."""
    opened = " open" if open_ else ""
    return f"<details class='more' data-keep='{text(key)}'{opened}><summary>{text(title)}</summary>{inside}</details>"


def row(*parts: str) -> str:
    return f"<div class='fields'>{''.join(parts)}</div>"


def _group(key: str, field: Field, chosen: Sequence[Any]) -> str:
    boxes = "".join(
        f"<label><input type='checkbox' data-edit='{text(key)}' data-option='{text(choice)}'"
        f"{' checked' if choice in chosen else ''}><span>{text(choice)}</span></label>"
        for choice in field.choices
    )
    hint = f"<small>{text(field.hint)}</small>" if field.hint else ""
    return f"<fieldset class='field group'><legend>{text(field.label)}</legend>{hint}{boxes}</fieldset>"


def _labelled(key: str, label: str, hint: str, box: str, kind: str = "field") -> str:
    return f"<div class='{kind}'><label for='{_id(key)}'>{text(label)}</label>{_hint(key, hint)}{box}</div>"


def _hint(key: str, hint: str) -> str:
    return f"<small id='{_id(key)}-hint'>{text(hint)}</small>" if hint else ""


def _id(key: str) -> str:
    return "f-" + re.sub(r"[^A-Za-z0-9]+", "-", key)


def _names(key: str, hint: str) -> str:
    told = f" aria-describedby='{_id(key)}-hint'" if hint else ""
    return f"id='{_id(key)}' data-edit='{text(key)}'{told}"
