"""The exceptions a user may meet.

StudioError
├── RequestError        the request was wrong; exit code 2, nothing was written
│   ├── PresetError     unknown key, wrong type, impossible combination
│   ├── DataError       pictures or captions that cannot be used
│   ├── BaseError       a base that is not there or not what it should be
│   ├── AdapterError    an adapter file that is damaged or made for another base
│   ├── ExportRefused   the target format cannot hold this adapter exactly
│   └── MissingPart     a program, package or font that this feature needs
└── WorkError           the work failed; exit code 1
    ├── NonFiniteLoss   the loss or a gradient became NaN or infinite
    └── DiskError       a file could not be written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StudioError(Exception):
    """`message` says what and where, in one line; `hint` the next move."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RequestError(StudioError):
    exit_code = 2


class PresetError(RequestError): ...


class DataError(RequestError): ...


class BaseError(RequestError): ...


class AdapterError(RequestError): ...


class ExportRefused(RequestError): ...


class MissingPart(RequestError): ...


class WorkError(StudioError): ...


class NonFiniteLoss(WorkError): ...


class DiskError(WorkError): ...


def reason_of(error: BaseException) -> str:
    """What an error of a library says first; its kind, if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that names the choice nearest to a mistyped word, or else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"there are: {', '.join(choices)}" if choices else "there are none"
