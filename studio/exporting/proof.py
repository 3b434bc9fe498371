"""Proof of an export: a fresh process reads the files as other programs do, and every layer is compared.

The process gets a skeleton of the base, its configurations and tokenizers without weights: what a LoRA adds does not
depend on them, so the proof costs as much memory as the LoRA, for SDXL as for a pico model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studio.base import Base
from studio.errors import WorkError
from studio.exporting.job import Job
from studio.exporting.report import EXACT, LayerRow
from studio.exporting.textual_inversion import WordFile

PROGRAM = Path(__file__).with_name("fresh.py")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}

Answer = tuple[dict[str, Any], bytes]
Meant = Callable[[str], Tensor]  # the delta, in fp64, that a reader should find at a site


def ask_fresh_process(*arguments: str) -> Iterator[Answer]:
    """Runs `fresh.py` and yields its answers. Raises WorkError with its last words if it fails.

    -P keeps this folder off its path, where `diffusers.py` is ours.
    """
    command = [sys.executable, "-P", str(PROGRAM), *arguments]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **QUIET}
        ) as process,
    ):
        assert process.stdout is not None
        try:
            while line := process.stdout.readline():
                header = json.loads(line)
                yield header, process.stdout.read(header["bytes"])
        except BaseException:  # also when the reader of this iterator gives up
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise WorkError(f"the export cannot be read back: {said[-1][:300]}", "nothing was written")


def write_skeleton(base: Base, folder: Path) -> None:
    """Everything of a pipeline but the weights: configurations, tokenizers, schedulers."""
    networks: dict[str, tuple[str, str] | None] = {}
    for name, part in base.pipe.components.items():
        if part is None:
            networks[name] = None
        elif not isinstance(part, nn.Module):
            part.save_pretrained(folder / name)
        else:
            networks[name] = write_configuration(part, folder / name)
    base.pipe.save_config(folder)
    (folder / "networks.json").write_text(json.dumps(networks))


def write_configuration(network: Any, folder: Path) -> tuple[str, str]:
    """A network's configuration without weights; returns (module, name) of its class."""
    save_config = network.save_config if hasattr(network, "save_config") else network.config.save_pretrained
    save_config(folder)
    return type(network).__module__, type(network).__name__


def prove_in_diffusers(job: Job, lora: Path | None, words: Iterable[WordFile], meant: Meant) -> dict[str, LayerRow]:
    """Plain diffusers loads the LoRA and the words. Raises WorkError for any layer or word that comes out otherwise."""
    asked = [{"path": str(word.path), "token": word.word, "keys": word.keys} for word in words]
    if lora is None and not asked:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        write_skeleton(job.base, Path(scratch))
        answers = ask_fresh_process("plain", scratch, str(lora or ""), json.dumps(asked))
        deltas = _check_words(answers, {word.word: word.vectors for word in words})
        return compare(job, deltas, meant, "diffusers") if lora else _exhaust(deltas)


def prove_by_formula(
    job: Job, file: Path, meant: Meant, biases: Mapping[str, Tensor] | None = None
) -> dict[str, LayerRow]:
    """An independent reading of kohya's and the dense format's formulas, over the names of all the base's layers."""
    with tempfile.TemporaryDirectory() as scratch:
        names = Path(scratch) / "names.json"
        modules = [f"{c}.{path}" for c, root in job.base.components.items() for path, _ in root.named_modules() if path]
        names.write_text(json.dumps(modules))
        answers = _check_biases(ask_fresh_process("formula", str(file), str(names)), biases or {})
        return compare(job, answers, meant, "the formula")


def _exhaust(answers: Iterator[Answer]) -> dict[str, LayerRow]:
    for _ in answers:
        pass
    return {}


def compare(job: Job, answers: Iterable[Answer], meant: Meant, reader: str) -> dict[str, LayerRow]:
    """Each layer against what was meant to be written (it must agree) and against the adapter's own delta (a row)."""
    rows = {}
    for header, payload in answers:
        site, found = header["site"], _tensor(header, payload)
        if site not in job.deltas:
            if found.any():
                raise WorkError(f"read back by {reader}, the export changes '{site}', which the adapter does not")
            continue
        target, own = meant(site), job.deltas[site].dense()
        fault = relative_error(found, target)
        if fault > EXACT:
            raise WorkError(f"read back by {reader}, '{site}' is wrong by {fault:.1e}", "nothing was written")
        norm = float(own.norm())
        kept = min(1.0, float(found.norm() / norm) ** 2) if norm else 1.0
        rows[site] = LayerRow(site, None, norm, relative_error(found, own), kept)
    missing = [site for site in job.deltas if site not in rows]
    if missing:
        raise WorkError(
            f"read back by {reader}, {len(missing)} of {len(job.deltas)} layers are not there, first '{missing[0]}'",
            "nothing was written",
        )
    return {site: rows[site] for site in job.deltas}


def _check_words(answers: Iterable[Answer], words: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Answer]:
    """Passes the layers on and compares the words: read back, their vectors must be the written ones."""
    expected = {(word, encoder): vectors for word, by in words.items() for encoder, vectors in by.items()}
    for header, payload in answers:
        if "word" not in header:
            yield header, payload
            continue
        key = (header["word"], header["encoder"])
        if not torch.equal(_tensor(header, payload), expected.pop(key).double()):
            raise WorkError(f"read back by diffusers, the word '{key[0]}' has other vectors in '{key[1]}'")
    if expected:
        word, encoder = next(iter(expected))
        raise WorkError(f"read back by diffusers, the word '{word}' is not there in '{encoder}'")


def _check_biases(answers: Iterable[Answer], biases: Mapping[str, Tensor]) -> Iterator[Answer]:
    """Passes the weights on and compares the changes of biases: read back, they must be the written ones."""
    expected = dict(biases)
    for header, payload in answers:
        if "bias" not in header:
            yield header, payload
        elif not torch.equal(_tensor(header, payload), expected.pop(header["bias"])):
            raise WorkError(f"read back by the formula, the bias of '{header['bias']}' is wrong", "nothing was written")
    if expected:
        raise WorkError(f"read back by the formula, the bias of '{next(iter(expected))}' is not there")


def relative_error(found: Tensor, own: Tensor) -> float:
    """|found - own| / |own| in the Frobenius norm; infinite where only `own` is zero."""
    difference, norm = float((found - own).norm()), float(own.norm())
    return difference / norm if norm else (float("inf") if difference else 0.0)


def _tensor(header: dict[str, Any], payload: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float64)).reshape(header["shape"])
