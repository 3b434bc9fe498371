"""Pipeline folders, as diffusers writes them: checked before anything in them is opened.

A folder holds `model_index.json`, which names the pipeline's class and its parts, and one folder for each part.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from studio.errors import BaseError
from studio.files import is_pickle

INDEX = "model_index.json"
CONFIG = "config.json"  # what a folder of transformers has instead: one network, with all it needs
PROMPTS = "prompts.txt"  # ours: what the base is known to draw, a prompt a line
#: Parts of published pipelines that no family loads: a censor, and what only picture prompts need.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
SHARED = "shared.json"  # ours: the bundled base whose weights this one goes on using, and of which parts
OWN = "studio.bases."  # the module of networks that the studio itself brings
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
NO_PICKLES = "pickles can run code when they are opened, so the studio never does; take a .safetensors version of it"

_PLAIN = re.compile(r"[A-Za-z_]+(-\d{5}-of-\d{5})?\.safetensors")
_HALF = re.compile(r"[A-Za-z_]+\.fp16(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that passed the checks. `variant` is "fp16" where a part has its weights under that name only."""

    path: Path
    pipeline_class: str
    variant: str | None
    licence: str


def open_folder(path: Path) -> PipelineFolder:
    """Checks a folder. Raises BaseError for a missing, foreign or damaged part, naming it."""
    if whole := whole_network_in(path):
        variant = "fp16" if _check_network(path) else None
        return PipelineFolder(path, whole, variant, licence_in(path))
    index = _read_json(path / INDEX, path)
    halves = set()
    shared = shared_in(path)["parts"]
    for part, _, class_name in parts_of(index, path):
        if part in shared and not (path / part).exists():
            continue
        if not (path / part).is_dir():
            raise BaseError(f"'{path}' is not complete: its part '{part}' is missing", "copy or download it again")
        if _is_network(class_name):
            halves.add(_check_network(path / part))
    variant = "fp16" if True in halves else None
    return PipelineFolder(path, str(index["_class_name"]), variant, licence_in(path))


def parts_of(index: dict[str, Any], path: Path) -> list[tuple[str, str, str]]:
    """(name, library, class) of the parts that are there. Raises BaseError for one that wants code of its own."""
    parts = []
    for name, value in index.items():
        if name.startswith("_") or name in LEFT_OUT or not isinstance(value, list) or len(value) != 2:
            continue
        library, class_name = value
        if library is None or class_name is None:
            continue
        if not _is_known(library):
            raise BaseError(
                f"'{path}' wants code of its own for its part '{name}' ({library}.{class_name})",
                hint="the studio runs no code that comes with weights",
            )
        parts.append((name, str(library), str(class_name)))
    return parts


def _is_known(library: object) -> bool:
    """Whether a part is of a library that is installed here: diffusers, transformers, or the studio's own networks."""
    return isinstance(library, str) and (library in ("diffusers", "transformers") or library.startswith(OWN))


def whole_network_in(path: Path) -> str:
    """The class of a folder of transformers that is no part of a pipeline; "" for any other folder."""
    if (path / INDEX).is_file() or (path.parent / INDEX).is_file() or not (path / CONFIG).is_file():
        return ""
    try:
        architectures = json.loads((path / CONFIG).read_text(encoding="utf-8"))["architectures"]
        return str(architectures[0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def class_of(path: Path) -> str:
    """What a folder that was checked says that it holds."""
    return whole_network_in(path) or str(_read_json(path / INDEX, path)["_class_name"])


def absent_parts(path: Path) -> list[str]:
    """The parts that the pipeline could have and this folder has not."""
    return [name for name, value in _read_json(path / INDEX, path).items() if value == [None, None]]


def shared_in(path: Path) -> dict[str, Any]:
    """The folder's shared.json: `base`, a bundled base's name; `parts`, of which it has weights that this folder lacks.

    Without one, no parts. Raises BaseError for one that says something else.
    """
    try:
        facts = json.loads((path / SHARED).read_text(encoding="utf-8"))
        return {"base": str(facts["base"]), "parts": [str(part) for part in facts["parts"]], "values": facts["values"]}
    except FileNotFoundError:
        return {"base": "", "parts": [], "values": ""}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BaseError(f"'{path / SHARED}' cannot be read: {error}", "copy or download it again") from None


def choose_weights(names: list[str], prefer_half: bool) -> list[str]:
    """Of the weight files of one part (plain file names), those to load: one precision, all its shards."""
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    half = [name for name in names if _HALF.fullmatch(name)]
    return (half or plain) if prefer_half else (plain or half)


def size_of(path: Path) -> int:
    """Bytes on disk; a file that is linked to from several places counts once."""
    files = {file.resolve() for file in path.rglob("*") if file.is_file()}
    return sum(file.stat().st_size for file in files)


def licence_in(path: Path) -> str:
    """The `license` in the front matter of the folder's README.md, or ""."""
    facts = _front_matter(path)
    named = facts.get("license_name") if facts.get("license") == "other" else None
    return str(named or facts.get("license") or "")


def forget_origin(path: Path) -> None:
    """Takes the folder that networks were loaded from out of a pipeline's configurations: it is nobody's business."""
    for file in [path / INDEX, *path.glob("*/config.json")]:
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def guidance_in(path: Path) -> float | None:
    """The `guidance_scale` in the front matter of the folder's README.md, which is ours, or None."""
    value = _front_matter(path).get("guidance_scale")
    return float(value) if isinstance(value, int | float) and value >= 0 else None


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return facts if isinstance(facts, dict) else {}


def prompts_in(path: Path) -> tuple[str, ...]:
    """The lines of the folder's prompts.txt, if it has one."""
    try:
        text = (path / PROMPTS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"'{folder}' is no pipeline folder: it has no {INDEX}", _what_else(folder)) from None
    except (OSError, ValueError) as error:
        raise BaseError(f"'{file}' cannot be read: {error}", "copy or download it again") from None
    if isinstance(content, dict) and isinstance(content.get("_class_name"), list):
        raise BaseError(
            f"'{folder}' wants code of its own for its pipeline ({'.'.join(map(str, content['_class_name']))})",
            hint="the studio runs no code that comes with weights",
        )
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise BaseError(f"'{file}' names no pipeline class", "copy or download it again")
    return content


def _what_else(folder: Path) -> str:
    """A hint for a folder that is not itself a pipeline."""
    if (folder.parent / INDEX).is_file():
        return f"it is a part of one: give '{folder.parent}'"
    inside = sorted(folder.glob(f"*/{INDEX}"))
    if inside:
        return f"did you mean '{inside[0].parent}'?"
    if (folder / "ldm" / "pytorch_model_ldm.bin").is_file():
        return "it is Mustango as its authors publish it: 'studio convert' makes a pipeline folder of it"
    checkpoints = sorted(folder.glob("*.safetensors"))
    if checkpoints:
        return f"to use a checkpoint in it, give the file: '{checkpoints[0]}'"
    return f"give a folder as diffusers saves it, with {INDEX} in it"


def _is_network(class_name: str) -> bool:
    return not class_name.removesuffix("Fast").endswith(("Tokenizer", "Scheduler", "Processor", "Extractor"))


def _check_network(part: Path) -> bool:
    """Whether the part has its weights in the fp16 variant only. Raises BaseError if it has none that are whole."""
    if not (part / "config.json").is_file():
        raise BaseError(f"'{part}' is not complete: config.json is missing", "copy or download it again")
    files = choose_weights([file.name for file in part.iterdir()], prefer_half=False)
    if not files:
        pickled = [file.name for file in part.iterdir() if file.suffix in PICKLES]
        if pickled:
            raise BaseError(f"'{part}' has its weights only as a pickle, '{pickled[0]}'", NO_PICKLES)
        raise BaseError(f"'{part}' is not complete: it has no weights (.safetensors)", "copy or download it again")
    for file in files:
        check_weights(part / file)
    _check_shards(part, files)
    return bool(_HALF.fullmatch(files[0]))


def refuse_random_parts(path: Path, networks: dict[str, Any]) -> None:
    """Raises BaseError if a network has weights that its files lack: transformers would leave them random, silently."""
    from safetensors import safe_open

    for part, network in networks.items():
        folder = path / part
        if not folder.is_dir():
            continue
        stored: set[str] = set()
        for name in choose_weights([file.name for file in folder.iterdir()], prefer_half=False):
            with safe_open(folder / name, framework="pt") as file:
                stored |= {_level_less(key) for key in file.keys()}  # noqa: SIM118
        state = network.state_dict()
        held = {value.data_ptr() for key, value in state.items() if _level_less(key) in stored}
        absent = [k for k, v in state.items() if _level_less(k) not in stored and v.data_ptr() not in held]
        if absent:
            raise BaseError(
                f"'{folder}' is not complete: its files lack {len(absent)} tensors, first '{absent[0]}'",
                "copy or download it again",
            )


def _level_less(key: str) -> str:
    """A tensor's name without the level `text_model`, which transformers 5 dropped."""
    return key.removeprefix("text_model.")


def _check_shards(part: Path, files: list[str]) -> None:
    counts = {int(match[1]) for name in files if (match := re.search(r"-of-(\d{5})\.", name))}
    if counts and len(files) != max(counts):
        raise BaseError(
            f"'{part}' is not complete: {len(files)} of {max(counts)} weight files", "copy or download it again"
        )


def check_weights(file: Path) -> None:
    """Reads a safetensors header. Raises BaseError for a file that is truncated, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        if is_pickle(file):
            raise BaseError(f"'{file}' is a pickle, whatever its name says", NO_PICKLES)
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseError(f"'{file}' is damaged or truncated: {error}", "copy or download it again") from None
