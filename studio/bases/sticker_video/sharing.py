"""A clip base on disk without what it shares with a bundled image base.

`shared.json` names the image base. Of the parts in `WHOLE` nothing is written; of those in `OVERLAID` only the tensors
that are not the image base's own, the others being taken from there on loading. What is shared is found by comparing
the values as they are stored, so nothing has to say what was trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from studio.bases.folder import SHARED, choose_weights, forget_origin, shared_in
from studio.bases.halves import save_part
from studio.errors import BaseError
from studio.files import write_atomically

WHOLE = ("vae",)
#: Parts of a clip base whose tensors may be those of the same part of the image base, and what their names begin with.
OVERLAID = {"unet": "image.", "text_encoder": ""}
FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def save_clip_base(base: Any, folder: Path, share: bool = True) -> None:
    """Writes the pipeline of a StickerVideo: UNet and VAE in fp16, the text encoder in fp32, as image bases have them.

    With `share`, what the image base in `base.shares_with` has is left out, and the text encoder's own tensors are
    written in fp16. Raises DiskError.
    """
    lender = base.shares_with if share else ""
    shared = _lent(base.pipe, lender) if lender else {}
    for name, part in base.pipe.components.items():
        if name in shared and name in WHOLE:
            continue
        if name in shared:
            _write_own(part, folder / name, FILES[name], shared[name])
        else:
            save_part(name, part, folder / name)
    base.pipe.save_config(folder)
    forget_origin(folder)
    if shared:
        facts = {"base": lender, "values": _fingerprint(shared), "parts": sorted(shared)}
        write_atomically(folder / SHARED, json.dumps(facts, indent=1) + "\n")


def load_shared_parts(folder: Path, lender: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The networks of a folder that are wholly or partly those of the image base in `lender`. Raises BaseError."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from studio.bases.sticker_video.network import StickerUNet

    facts = shared_in(folder)
    built: dict[str, Callable[[Path], Any]] = {
        "vae": lambda part: AutoencoderKL.from_config(AutoencoderKL.load_config(part)),
        "unet": lambda part: StickerUNet.from_config(StickerUNet.load_config(part)),
        "text_encoder": lambda part: CLIPTextModel(CLIPTextConfig.from_pretrained(part)),
    }
    networks, lent = {}, {}
    for name in facts["parts"]:
        part = lender / name if name in WHOLE else folder / name
        networks[name] = network = built[name](part)
        own = {} if name in WHOLE else weights_in(part)
        wanted = dict(network.named_parameters())
        lent[name] = _completing(wanted, own, _named(name, weights_in(lender / name)), part)
        network.load_state_dict({key: value.float() for key, value in (lent[name] | own).items()}, strict=False)
        network.to(dtype).eval()
    if _fingerprint(lent) != facts["values"]:
        raise BaseError(
            f"'{folder}' shares weights with the base '{facts['base']}', which has others now",
            "take the version of the studio that it was made with, or an export of the whole base",
        )
    return networks


def weights_in(part: Path) -> dict[str, Tensor]:
    """Every tensor of a part of a pipeline folder, as stored."""
    files = choose_weights([file.name for file in part.iterdir()], prefer_half=False)
    return {name: value for file in files for name, value in load_file(part / file).items()}


def _lent(pipe: Any, lender: str) -> dict[str, dict[str, Tensor]]:
    """By part, the tensors that the pipeline has in common with the bundled base: those that need not be written."""
    from studio.bases.registry import bundled

    folder = bundled()[lender]
    found: dict[str, dict[str, Tensor]] = {}
    for name in (*WHOLE, *OVERLAID):
        held = dict(getattr(pipe, name).named_parameters())
        theirs = _named(name, weights_in(folder / name))
        same = {key: value for key, value in theirs.items() if key in held and _equal(held[key], value)}
        if same and (name in OVERLAID or len(same) == len(held)):
            found[name] = same
    return found


def _equal(held: Tensor, stored: Tensor) -> bool:
    """Whether a tensor has the values that are stored, in the precision that they are stored in."""
    return held.shape == stored.shape and torch.equal(held.detach().cpu().to(stored.dtype), stored)


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image base's tensors under the names that they have in a clip base."""
    prefix = OVERLAID.get(part, "")
    return {f"{prefix}{key.removeprefix('text_model.')}": value for key, value in tensors.items()}


def _write_own(part: Any, folder: Path, file: str, shared: Mapping[str, Tensor]) -> None:
    # Parameters alone: buffers are positions, which a network knows by itself and fp16 would round.
    own = {key: value.detach().half().cpu() for key, value in part.named_parameters() if key not in shared}
    config = part.config
    if hasattr(part, "save_config"):
        part.save_config(folder)
    else:
        config.save_pretrained(folder)
    write_atomically(folder / file, save({key: value.contiguous() for key, value in own.items()}))


def _completing(
    wanted: Mapping[str, Tensor], own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], part: Path
) -> dict[str, Tensor]:
    """The tensors that `own` leaves to the image base. Raises BaseError for one that neither has."""
    missing = [key for key, value in wanted.items() if key not in own]
    absent = [key for key in missing if key not in theirs or theirs[key].shape != wanted[key].shape]
    if absent:
        raise BaseError(f"'{part}' is not complete: it lacks '{absent[0]}'", "copy or download it again")
    return {key: theirs[key] for key in missing}


def _fingerprint(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A hash over names and values of the shared tensors, as the image base stores them."""
    found = hashlib.sha256()
    for part, tensors in sorted(parts.items()):
        for name, value in sorted(tensors.items()):
            found.update(f"{part}.{name} {value.dtype}".encode())
            found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
