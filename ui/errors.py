"""Errors as a person meets them in a page: one clear sentence, then the remedy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr

from studio.errors import StudioError


def sentence(error: StudioError) -> str:
    """What is wrong, then what to do."""
    parts = [part for part in (error.message, error.hint) if part]
    return " ".join(part[:1].upper() + part[1:].rstrip(".") + "." for part in parts)


def said(error: StudioError) -> gr.Error:
    return gr.Error(sentence(error), duration=12, print_exception=False, title="That did not work")


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a StudioError raised inside is shown in the page."""

    @functools.wraps(function)
    def one(*values: Any) -> Any:
        try:
            return function(*values)
        except StudioError as error:
            raise said(error) from None

    @functools.wraps(function)
    def many(*values: Any) -> Any:
        try:
            yield from function(*values)
        except StudioError as error:
            raise said(error) from None

    return many if inspect.isgeneratorfunction(function) else one
