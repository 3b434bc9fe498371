"""The judge of the sticker world: a small network that tells what a picture of one thing shows.

It was trained on nothing but renderings (`trainers/judge.py`), so it measures what a base draws without knowing the
base. Its feature of the thing, which hardly sees the ground, stands in for DINO where pictures of a subject are
compared.

B batch, H and W height and width in pixels, C channels, F features, N glyphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from studio.data.sticker_pool import to_pixels
from studio.data.stickers import COLOURS, PATTERNS, POSITIONS, SIZES, TINTS, Scene
from studio.errors import DataError, MissingPart, reason_of
from studio.files import write_atomically
from studio.paths import assets_dir

SIDE = 64  # the judge looks at pictures of this side, in pixels: a quarter of the cost of 128, and no less exact
WIDTHS = (32, 64, 128, 128)
FEATURES = 128
GROUPS = 8
HEADS: dict[str, tuple[str, ...]] = {
    "tint": ("", *TINTS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "ground": tuple(COLOURS),
    "pattern": PATTERNS,
}


@dataclass(frozen=True)
class Verdict:
    """What the judge says of B pictures: features (B, F) of length 1, and logits (B, classes) by head."""

    features: Tensor
    logits: dict[str, Tensor]

    def answers(self, head: str) -> Tensor:
        """The likeliest class of each picture, (B,)."""
        return self.logits[head].argmax(-1)

    def is_among(self, head: str, wanted: Tensor, k: int) -> Tensor:
        """Whether the wanted class (B,) is one of the k likeliest."""
        return (self.logits[head].topk(k).indices == wanted[:, None]).any(-1)


class Judge(nn.Module):
    """A residual network on 64 px pictures. Where the thing is, it learns to look: the glyph's feature is pooled there.

    The heads but for the glyph see the whole picture's mean, the thing's, and its place.
    """

    def __init__(self, glyphs: Sequence[str], facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.glyphs = tuple(glyphs)
        self.facts = dict(facts or {})
        first, *_, last = WIDTHS
        # No norm in the stem: it would dim the absolute colour that grounds and tints are told by.
        self.stem = nn.Conv2d(5, first, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(_Block(width_in, width, 1 if width == width_in else 2) for width_in, width in pairwise(WIDTHS))
        )
        self.look = nn.Conv2d(last, 1, 1)
        self.feature = nn.Linear(last, FEATURES)
        # Plain products, not cosines: with those, no glyph was told from another in the first 1,000 steps.
        self.prototypes = nn.Parameter(torch.randn(len(self.glyphs), FEATURES) * FEATURES**-0.5)
        self.attributes = nn.Linear(2 * last + 2, sum(map(len, HEADS.values())))

    def forward(self, pixels: Tensor) -> Verdict:
        """Judges pixels in [-1, 1], (B, 3, H, W). Any size; the picture is brought to 64 x 64 first."""
        x = shrunk(pixels)
        places = _places(x)
        x = F.silu(self.stem(torch.cat([x, places], 1)))
        x = self.blocks(x)
        focus = self.look(x).flatten(2).float().softmax(-1)  # (B, 1, cells)
        cells = x.flatten(2).float()
        thing = (cells * focus).sum(-1)
        place = (F.adaptive_avg_pool2d(places, x.shape[-2:]).flatten(2) * focus).sum(-1)
        feature = self.feature(thing).float()
        rest = self.attributes(torch.cat([cells.mean(-1), thing, place], -1)).float()
        logits = dict(zip(HEADS, rest.split([len(classes) for classes in HEADS.values()], -1)))
        return Verdict(F.normalize(feature, dim=-1), {"glyph": feature @ self.prototypes.T, **logits})

    @torch.no_grad()
    def judge(self, pictures: Sequence[Image.Image], batch: int = 64) -> Verdict:
        """Judges PIL pictures of any sizes; the verdict is on the CPU. Raises DataError if there are none."""
        if not pictures:
            raise DataError("there is no picture to judge")
        device = self.prototypes.device
        small = [shrunk(to_pixels([picture.convert("RGB")]).to(device)) for picture in pictures]
        parts = [self(torch.cat(small[start : start + batch])) for start in range(0, len(small), batch)]
        logits = {head: torch.cat([part.logits[head] for part in parts]).cpu() for head in parts[0].logits}
        return Verdict(torch.cat([part.features for part in parts]).cpu(), logits)

    def labels(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """The right answers to scenes of one thing by head, (B,) each. Raises DataError for an unknown glyph."""
        index = {name: i for i, name in enumerate(self.glyphs)}
        unknown = [scene.things[0].glyph.name for scene in scenes if scene.things[0].glyph.name not in index]
        if unknown:
            raise DataError(f"the judge never learned the glyph '{unknown[0]}'", "it knows those of the split 'train'")
        glyphs = torch.tensor([index[scene.things[0].glyph.name] for scene in scenes])
        return {"glyph": glyphs, **attribute_labels(scenes)}


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, normalised over groups of channels."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + self.shortcut(x))


def shrunk(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) as (B, 3, 64, 64), by averaging areas."""
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels.float()
    return F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def _places(x: Tensor) -> Tensor:
    """Each pixel's place, (B, 2, H, W) in [-1, 1]: x, then y."""
    height, width = x.shape[-2:]
    y, x_ = torch.meshgrid(
        torch.linspace(-1, 1, height, device=x.device), torch.linspace(-1, 1, width, device=x.device), indexing="ij"
    )
    return torch.stack([x_, y]).expand(len(x), -1, -1, -1)


def attribute_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right answers but for the glyph, to scenes of one thing, (B,) each."""
    told = [
        {
            "tint": scene.things[0].tint,
            "size": scene.things[0].size,
            "position": scene.position,
            "ground": scene.ground.colour,
            "pattern": scene.ground.pattern,
        }
        for scene in scenes
    ]
    return {head: torch.tensor([names.index(t[head]) for t in told]) for head, names in HEADS.items()}


# -- files -----------------------------------------------------------------------------------------------------


def save_judge(judge: Judge, folder: Path, glyphs: int | None = None) -> None:
    """Writes `judge.safetensors` (fp16) and `judge.json`; of the glyphs only the first `glyphs`. Raises DiskError."""
    count = len(judge.glyphs) if glyphs is None else glyphs
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in judge.state_dict().items()}
    tensors["prototypes"] = tensors["prototypes"][:count].clone()
    write_atomically(folder / "judge.safetensors", save(tensors))
    content = {"format": 1, "facts": judge.facts, "glyphs": judge.glyphs[:count]}
    write_atomically(folder / "judge.json", json.dumps(content, indent=1) + "\n")


def load_judge(folder: Path | None = None) -> Judge:
    """The judge of a folder, by default the bundled one, in fp32. Raises MissingPart."""
    folder = folder or assets_dir() / "judge"
    try:
        content = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        judge = Judge(content["glyphs"], content["facts"])
        judge.load_state_dict({name: t.float() for name, t in load_file(folder / "judge.safetensors").items()})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise MissingPart(
            f"the judge in '{folder}' cannot be read: {reason}", "get assets/judge again from the project"
        ) from None
    return judge.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def bundled_judge() -> Judge:
    """The bundled judge, loaded once."""
    return load_judge()
