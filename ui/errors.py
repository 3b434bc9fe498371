"""Errors as a person meets them in a page: one clear sentence, then the remedy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr

from studio.errors import StudioError


def said(error: StudioError) -> gr.Error:
    text = f"{error.message}. {error.hint}" if error.hint else error.message
    return gr.Error(text[:1].upper() + text[1:] + ".", duration=12, print_exception=False, title="That did not work")


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
