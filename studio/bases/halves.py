"""Writing a pipeline at half its size: the large networks in fp16, what encodes in fp32.

transformers loads a text encoder in the dtype it was stored in and diffusers the rest in fp32, so a pipeline stored in
fp16 throughout fails at its first step on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio.bases.folder import forget_origin

HALVED = ("unet", "vae")


def save_with_halves(pipe: Any, folder: Path) -> None:
    """Writes a folder that `from_pretrained` of the pipeline's class loads. The pipeline keeps its values."""
    for name, part in pipe.components.items():
        save_part(name, part, folder / name)
    pipe.save_config(folder)
    forget_origin(folder)


def save_part(name: str, part: Any, folder: Path) -> None:
    """Writes one part of a pipeline, if it is one that can be written."""
    if name in HALVED:
        own = {key: value.clone() for key, value in part.state_dict().items()}
        part.half().save_pretrained(folder)
        part.float().load_state_dict(own)
    elif hasattr(part, "save_pretrained"):
        part.save_pretrained(folder)
