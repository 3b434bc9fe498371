"""What is drawn where. `--region` says it as text:

    X0,Y0,X1,Y1:ADAPTER[:WEIGHT]:PROMPT        a box in fractions of the picture
    MASK.png:ADAPTER[:WEIGHT]:PROMPT           a painted mask, white inside

Without an ADAPTER (`0,0,0.5,1::a red car`) the base itself draws there.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.generation import Use, parse_use
from studio.regions.canvas import Blend
from studio.regions.masks import Box, Painted

FORM = "for example --region '0,0,0.5,1:my-cat:a mycat', or --region 'mask.png:my-cat:a mycat'"
NUMBER = r"-?\d+(?:\.\d*)?|-?\.\d+"


@dataclass(frozen=True)
class Region:
    """A place, what is drawn there, and the adapter that draws it; None draws it as the base does."""

    shape: Box | Painted
    prompt: str
    use: Use | None = None

    def facts(self) -> dict[str, Any]:
        """What a picture's metadata says of it."""
        own = {"adapter": self.use.name, "weight": self.use.weight} if self.use else {}
        return {**self.shape.facts(), **own, "prompt": self.prompt}


@dataclass(frozen=True)
class Layout:
    """The regions of a picture, and how they meet."""

    regions: tuple[Region, ...]
    blend: Blend = field(default_factory=Blend)

    @property
    def uses(self) -> list[Use]:
        return [region.use for region in self.regions if region.use]

    def facts(self) -> dict[str, Any]:
        return {"regions": [region.facts() for region in self.regions], **asdict(self.blend)}


def parse_region(text: str) -> Region:
    """Raises RequestError, AdapterError, DataError."""
    where, colon, rest = text.partition(":")
    name, second, prompt = rest.partition(":")
    if not colon or not second or not prompt.strip():
        raise RequestError(f"--region '{text}' is not of the form WHERE:ADAPTER:PROMPT", FORM)
    if weighed := re.match(rf"\s*({NUMBER})\s*:(.*)", prompt, re.DOTALL):
        name, prompt = f"{name}:{weighed[1]}", weighed[2]
    shape = _shape(where.strip(), text)
    return Region(shape, prompt.strip(), parse_use(name.strip()) if name.strip() else None)


def _shape(where: str, text: str) -> Box | Painted:
    if Path(where).is_file():
        return Painted(Path(where))
    if "," not in where:
        raise RequestError(f"--region '{text}': there is no mask '{where}'", FORM)
    parts = [part.strip() for part in where.split(",")]
    if len(parts) != 4 or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise RequestError(f"--region '{text}': '{where}' is no box of four numbers X0,Y0,X1,Y1", FORM)
    box = Box(*map(float, parts))
    if not all(0 <= value <= 1 for value in (box.x0, box.y0, box.x1, box.y1)):
        raise RequestError(
            f"--region '{text}': the box leaves the picture", "give fractions of width and height, from 0 to 1"
        )
    if box.x1 <= box.x0 or box.y1 <= box.y0:
        raise RequestError(
            f"--region '{text}': the box has no area", "give left, top, right, bottom: X0 < X1 and Y0 < Y1"
        )
    return box
