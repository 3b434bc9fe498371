"""The judge of moving stickers: a small network that tells which motion a clip shows, whatever moves.

It was trained on nothing but renderings (`trainers/motion_judge.py`), so it measures what a clip base draws without
knowing the base. It looks at transparency and brightness at 32 px, which is where motion is seen.

B clips, F frames, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from studio.data.clips import Clip
from studio.data.motions import MOTIONS
from studio.errors import DataError, MissingPart, reason_of
from studio.files import write_atomically
from studio.paths import assets_dir

SIDE = 32
WIDTHS = (16, 32, 64)
FEATURES = 96
GROUPS = 8
CLASSES = ("", *MOTIONS)  # "" is standing still


class MotionJudge(nn.Module):
    """Each frame through three convolutions, then two over time on what the frames became.

    A frame is seen with what changed since the frame before, so that a small shift is not lost among the thing's shape.
    """

    def __init__(self, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.facts = dict(facts or {})
        widths = (6, *WIDTHS)
        self.frame = nn.ModuleList(
            nn.Conv2d(width_in, width, 4 if index == 0 else 3, stride=2, padding=1)
            for index, (width_in, width) in enumerate(zip(widths, WIDTHS))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for width in WIDTHS)
        self.feature = nn.Linear(WIDTHS[-1] * (SIDE // 8) ** 2, FEATURES)
        self.over_time = nn.ModuleList(nn.Conv1d(FEATURES, FEATURES, 3, padding=1) for _ in range(2))
        self.answer = nn.Linear(2 * FEATURES, len(CLASSES))

    def forward(self, seen: Tensor) -> Tensor:
        """Logits (B, classes) of clips as `seen` gives them, (B, F, 2, H, W)."""
        return self.answer(self.features(seen))

    def features(self, seen: Tensor) -> Tensor:
        """(B, 2 x 96): what the frames became, at its mean and at its peak over time."""
        batch, count = seen.shape[:2]
        x = _with_changes_and_places(seen).flatten(0, 1)
        for conv, norm in zip(self.frame, self.norms):
            x = functional.silu(norm(conv(x)))
        x = functional.silu(self.feature(x.flatten(1))).view(batch, count, FEATURES).transpose(1, 2)
        for conv in self.over_time:
            x = x + functional.silu(conv(x))
        return torch.cat([x.mean(-1), x.amax(-1)], -1)

    @torch.no_grad()
    def judge(self, clips: Sequence[Clip]) -> list[str]:
        """The likeliest motion of each clip, "" for none. Raises DataError for no clips, and for stills."""
        if not clips:
            raise DataError("there is no clip to judge")
        if any(len(clip.frames) < 2 for clip in clips):
            raise DataError("a clip of one frame shows no motion")
        return [CLASSES[int(self(seen([clip]))[0].argmax())] for clip in clips]


def seen(clips: Sequence[Clip]) -> Tensor:
    """What the judge sees of clips of one length: transparency and premultiplied brightness, (B, F, 2, 32, 32)."""
    return torch.stack([torch.stack([_small(frame) for frame in clip.frames]) for clip in clips])


def _small(frame: Image.Image) -> Tensor:
    small = frame.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.asarray(small).astype(np.float32) / 255)
    return torch.stack([pixels[..., 3], pixels[..., :3].mean(-1)])


def _with_changes_and_places(x: Tensor) -> Tensor:
    """(B, F, 6, H, W): what is seen, what of it changed since the frame before, and each pixel's place."""
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    line = torch.linspace(-1, 1, SIDE, device=x.device)
    places = torch.stack([line[None].expand(SIDE, -1), line[:, None].expand(-1, SIDE)])
    return torch.cat([x, 3 * (x - before), places.expand(*x.shape[:2], -1, -1, -1)], 2)


# -- files -----------------------------------------------------------------------------------------------------


def save_motion_judge(judge: MotionJudge, folder: Path) -> None:
    """Writes `judge.safetensors` (fp16) and `judge.json`. Raises DiskError."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in judge.state_dict().items()}
    write_atomically(folder / "judge.safetensors", save(tensors))
    content = {"format": 1, "facts": judge.facts, "motions": CLASSES}
    write_atomically(folder / "judge.json", json.dumps(content, indent=1) + "\n")


def load_motion_judge(folder: Path | None = None) -> MotionJudge:
    """The judge of a folder, by default the bundled one, in fp32. Raises MissingPart."""
    folder = folder or assets_dir() / "motion-judge"
    try:
        content = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        if tuple(content["motions"]) != CLASSES:
            raise ValueError("it knows other motions than the studio draws")
        judge = MotionJudge(content["facts"])
        judge.load_state_dict({name: t.float() for name, t in load_file(folder / "judge.safetensors").items()})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise MissingPart(
            f"the judge of motions in '{folder}' cannot be read: {reason}",
            "train one: studio train --preset motion-judge",
        ) from None
    return judge.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def bundled_motion_judge() -> MotionJudge:
    """The bundled judge, loaded once."""
    return load_motion_judge()
