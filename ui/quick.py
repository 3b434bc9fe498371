"""gradio, imported and set up without what it does over and over meanwhile: of 11 s of processor time, 7.

It writes a `.pyi` for editors beside each component's source at every import, and makes a web server for each page as
it is written, of which the last one alone is used. Where gradio does otherwise some day, this does nothing.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing leaves this machine

WRITES_INTERFACES = "create_or_modify_pyi"  # it leaves out classes that have no file


@contextmanager
def _without_interfaces() -> Iterator[None]:
    file_of = inspect.getfile

    def file_or_none(of: Any) -> str:
        if sys._getframe(1).f_code.co_name == WRITES_INTERFACES:
            raise OSError
        return file_of(of)

    with mock.patch.object(inspect, "getfile", file_or_none):
        yield


with _without_interfaces():
    import gradio


@contextmanager
def without_servers() -> Iterator[None]:
    """Inside, pages are written and nothing serves them; `launch` makes its own server in any case."""
    with mock.patch.object(gradio.blocks.App, "create_app", return_value=None):
        yield
