"""What became of the files that were offered as training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """Names, (name, reason) of the dropped ones, remarks, and how many there are to train on in each bucket.

    A bucket is called by what is alike in it: pictures' size ("512x768"), clips' number of frames, recordings' length.
    """

    used: list[str]
    held_out: list[str]
    dropped: list[tuple[str, str]]
    warnings: list[str]
    buckets: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
