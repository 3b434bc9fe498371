"""From Mustango as its authors publish it to a pipeline folder of safetensors.

Their files are pickles. This is the one place of the studio that opens any: only files of these names, only with
torch's restricted unpickler (`weights_only=True`), which builds tensors and plain containers and runs nothing, and only
if what comes out is a flat dictionary of tensors, every one of which has its place and its shape here.
The folder on the hub (`declare-lab/mustango`) has neither tokenizers nor the noise schedule: the tokenizers are
named by the user, the schedule is ours (`building.SCHEDULE`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studio.errors import BaseError, RequestError, reason_of
from studio.exporting.destination import is_free
from studio.files import write_atomically

MAIN, SOUND = "ldm/pytorch_model_ldm.bin", "vae/pytorch_model_vae.bin"
BEATS, CHORDS = "beats/microsoft-deberta-v3-large.pt", "chords/flan-t5-large.bin"
FLAN_T5, DEBERTA = "google/flan-t5-large", "microsoft/deberta-v3-large"  # whose tokenizers are wanted
LICENCE = "apache-2.0; autoencoder and vocoder derive from AudioLDM, cc-by-nc-sa-4.0"

#: Where the tensors of each file go: a pattern of their names, and `part:name` or None for copies of something else.
RULES: dict[str, tuple[tuple[str, str | None], ...]] = {
    MAIN: (
        (r"unet\.(.*\.)attentions\.(\d+)\.(.*)", r"unet:\1attentions.\2.text.\3"),
        (r"unet\.(.*\.)attentions2\.(\d+)\.(.*)", r"unet:\1attentions.\2.beat.\3"),
        (r"unet\.(.*\.)attentions3\.(\d+)\.(.*)", r"unet:\1attentions.\2.chord.\3"),
        (r"unet\.(.*)", r"unet:\1"),
        (r"text_encoder\.(.*)", r"text_encoder:\1"),
        (r"FME\.translation_bias", r"chord_encoder:root_bias"),
        (r"beat_embedding_layer\.beat_ffn\.(.*)", r"beat_encoder:ffn.\1"),
        (r"chord_embedding_layer\.chord_ffn\.(.*)", r"chord_encoder:ffn.\1"),
        (r"(.*\.)?PE\.pe", None),  # a table that nothing reads
        (r"chord_embedding_layer\.FME\.translation_bias", None),  # FME's once more
    ),
    SOUND: (
        (r"vocoder\.ups\.(.*)", r"vocoder:upsampler.\1"),
        (r"vocoder\.(.*)", r"vocoder:\1"),
        (r"(.*)", r"vae:\1"),
    ),
    BEATS: ((r".*\.position_ids", None), (r"(.*)", r"beat_predictor:\1")),
    CHORDS: ((r"(.*)", r"chord_predictor:\1"),),
}
#: What else an autoencoder's layers are called there; the levels of its decoder are counted from the other end.
LAYERS = {
    r"(?<!\w)mid\.block_(\d)": lambda m: f"mid_block.resnets.{int(m[1]) - 1}",
    r"(?<!\w)mid\.attn_1\.norm": "mid_block.attentions.0.group_norm",
    r"(?<!\w)mid\.attn_1\.proj_out": "mid_block.attentions.0.to_out.0",
    r"(?<!\w)mid\.attn_1\.([qkv])\.": r"mid_block.attentions.0.to_\1.",
    r"(?<!\w)(down|up)\.(\d+)\.block\.": r"\1_blocks.\2.resnets.",
    r"(?<!\w)(down|up)\.(\d+)\.(down|up)sample\.": r"\1_blocks.\2.\3samplers.0.",
    r"nin_shortcut": "conv_shortcut",
    r"(?<!\w)norm_out": "conv_norm_out",
}


def convert(
    folder: Path,
    out: Path,
    tokenizer: str = FLAN_T5,
    beat_tokenizer: str = DEBERTA,
    predictors: bool = True,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Writes a pipeline folder that `load_base` opens. Raises BaseError, RequestError; the source is only read.

    `predictors` takes the two networks that guess beats and chords along (4.7 GB more).
    """
    from studio.bases.mustango.building import published

    files = [MAIN, SOUND] + [BEATS, CHORDS] * predictors
    absent = next((name for name in files if not (folder / name).is_file()), None)
    if absent is not None:
        raise BaseError(
            f"'{folder}' is no published Mustango: it has no {absent}",
            "give the folder that the hub has as declare-lab/mustango",
        )
    if not is_free(out):
        raise RequestError(f"'{out}' exists already and is not empty", "choose another --out")
    tokenizers = {"tokenizer": _tokenizer(tokenizer)}
    if predictors:
        tokenizers |= {"beat_tokenizer": _tokenizer(beat_tokenizer), "chord_tokenizer": tokenizers["tokenizer"]}
    return write_pipeline(folder, out, published(predictors), tokenizers, {}, 1024, progress)


def write_pipeline(
    folder: Path,
    out: Path,
    networks: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    mel: Mapping[str, Any],
    clip_frames: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Fills empty networks (on the meta device) from the published files and saves everything."""
    from studio.bases.mustango.building import assembled

    for name, rules in RULES.items():
        if name in (BEATS, CHORDS) and "beat_predictor" not in networks:
            continue
        progress(f"reading {name}")
        fill(networks, renamed(read_tensors(folder / name), rules, folder / name), folder / name)
    base = assembled("mustango", {**networks, **tokenizers}, mel, clip_frames, LICENCE)
    progress(f"writing {out}")
    base.pipe.save_pretrained(out, safe_serialization=True)
    write_atomically(out / "README.md", f"---\nlicense: other\nlicense_name: '{LICENCE}'\n---\n")
    return out


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one pickle, by torch's restricted unpickler. Raises BaseError for anything else in it."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever the unpickler says of a file that is something else
        reason = reason_of(error)[:200]
        raise BaseError(f"'{file}' is no file of tensors: {reason}", "download it again from its authors") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BaseError(f"'{file}' holds more than tensors", "download it again from its authors")
    return {str(name): value for name, value in content.items()}


def renamed(
    tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str | None], ...], file: Path
) -> dict[str, dict[str, Tensor]]:
    """The tensors by part of the pipeline and by their names there."""
    found: dict[str, dict[str, Tensor]] = {}
    levels = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    for name, value in tensors.items():
        rule = next(((pattern, target) for pattern, target in rules if re.fullmatch(pattern, name)), None)
        if rule is None:
            raise BaseError(f"'{file}' holds '{name}', which no Mustango has", "is it another version?")
        pattern, target = rule
        if target is None:
            continue
        part, _, own = re.sub(f"^{pattern}$", target, name).partition(":")
        found.setdefault(part, {})[_in_diffusers(own, levels) if part == "vae" else own] = value
    return found


def _in_diffusers(name: str, levels: int) -> str:
    """An autoencoder's name as diffusers has it."""
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    for pattern, word in LAYERS.items():
        name = re.sub(pattern, word, name)  # type: ignore[call-overload]
    return name


def fill(networks: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """Puts tensors into their networks. Raises BaseError unless each has its place and shape, and no place is left."""
    for part, tensors in parts.items():
        network: nn.Module = networks[part]
        wanted = dict(network.state_dict())
        given = {name: _shaped(value, wanted.get(name)) for name, value in tensors.items()}
        for name in ("mean", "scale") if part == "vocoder" else ():
            given.setdefault(name, torch.full_like(wanted[name], float(name == "scale"), device="cpu"))
        for name, tied in (
            ("encoder.embed_tokens.weight", "shared.weight"),
            ("shared.weight", "encoder.embed_tokens.weight"),
        ):
            if part == "text_encoder" and tied in given:
                given.setdefault(name, given[tied])
        wrong = sorted(n for n in wanted.keys() | given.keys() if n not in wanted or n not in given)
        wrong += sorted(n for n in wanted.keys() & given.keys() if wanted[n].shape != given[n].shape)
        if wrong:
            raise BaseError(
                f"'{file}' is of another network: '{wrong[0]}' of its {part} and {len(wrong) - 1} more do not fit",
                "give the files of declare-lab/mustango as they are",
            )
        network.load_state_dict(given, assign=True)


def _shaped(value: Tensor, wanted: Tensor | None) -> Tensor:
    """Attention of an autoencoder is stored as convolutions over single pixels."""
    return value[..., 0, 0] if wanted is not None and value.ndim == 4 and wanted.ndim == 2 else value


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = reason_of(error)[:200]
        raise BaseError(f"there is no tokenizer '{name}': {reason}", "give a folder that holds its files") from None
