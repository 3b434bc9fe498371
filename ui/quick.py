"""gradio, imported and set up without what it does over and over meanwhile: of 10 s of processor time, 6.

It writes a `.pyi` for editors beside each component's source at every import, and makes a web server for each page as
it is written, of which the last one alone is used. Where gradio does otherwise some day, this does nothing.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing leaves this machine

WRITES_INTERFACES = "create_or_modify_pyi"  # it leaves out classes that have no file


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without_interfaces() -> AbstractContextManager[None]:
    file_of = inspect.getfile

    def file_or_none(of: Any) -> str:
        if sys._getframe(1).f_code.co_name == WRITES_INTERFACES:
            raise OSError
        return file_of(of)

    return _replaced(inspect, "getfile", file_or_none)


with _without_interfaces():
    import gradio


def without_servers() -> AbstractContextManager[None]:
    """Inside, pages are written and nothing serves them; `launch` makes its own server in any case."""
    return _replaced(gradio.blocks.App, "create_app", lambda *_, **__: None)
