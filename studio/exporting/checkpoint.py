"""`--to checkpoint`: a complete pipeline folder with the adapter merged into the weights, for any program.

Merged in fp64, rounded once to fp32, then cast. The base in memory is never written to: what is saved is a copy of its
modules that shares every tensor but the merged ones. Text encoders stay in fp32 whatever the dtype, because
transformers loads them in their stored dtype and diffusers the rest in fp32, so a folder in fp16 throughout would fail
at its first step.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studio.bases.folder import forget_origin
from studio.errors import ExportRefused, WorkError
from studio.exporting.job import Job
from studio.exporting.proof import ask_fresh_process, relative_error
from studio.exporting.report import LayerRow
from studio.exporting.site_delta import SiteDelta
from studio.exporting.textual_inversion import check_words
from studio.words import encoders_of, tokens_of


def export_to_checkpoint(job: Job, folder: Path) -> tuple[Path, list[LayerRow]]:
    """Writes the pipeline and proves that every weight reloads as meant."""
    from diffusers import DiffusionPipeline

    if not isinstance(job.base.pipe, DiffusionPipeline) or not type(job.base.pipe).__module__.startswith("diffusers."):
        raise ExportRefused(f"'{job.base.name}' is no pipeline of diffusers, so it has no checkpoint folder")
    check_words(job)
    networks = {name: shared_copy(module) for name, module in job.base.modules.items()}
    rows = [merge_into(networks, site, _dtype(job, site.component)) for site in job.deltas.values()]
    tokenizers = add_words(job, networks)
    for name, network in networks.items():
        cast(network, _dtype(job, name))
    save_pipeline(job.base.pipe, networks, tokenizers, folder)
    _prove(folder, networks, {name: _ids(job, name, tokenizer) for name, tokenizer in tokenizers.items()})
    if job.dtype != torch.float32:
        job.warnings.append(
            f"{str(job.dtype)[6:]} rounds away part of a small change: up to {max(r.error for r in rows):.1%} of a "
            "layer's delta is lost here; float32 keeps it"
        )
    if absent := _absent(job.base.pipe):
        given = ", ".join(f"{name}=None" for name in absent)
        job.warnings.append(f"the base has no {' and no '.join(absent)}: diffusers opens the folder if given {given}")
    return folder, rows


def _absent(pipe: Any) -> list[str]:
    """The parts that the pipeline lacks, and that diffusers asks for all the same."""
    return [name for name, part in pipe.components.items() if part is None and name not in pipe._optional_components]


def _dtype(job: Job, component: str) -> torch.dtype:
    return job.dtype if hasattr(job.base.modules[component], "save_config") else torch.float32


def shared_copy(module: nn.Module) -> nn.Module:
    """The same module in other objects, with the very same tensors: replacing one leaves the original alone."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def merge_into(networks: Mapping[str, nn.Module], site: SiteDelta, dtype: torch.dtype) -> LayerRow:
    """Puts weight + delta, summed in fp64 and rounded once to fp32, in place of a weight; its bias likewise.

    Returns what the dtype loses of the weight's delta.
    """
    own, weight = site.dense(), site.weight.double().cpu()
    merged = (weight + own).float()
    layer: Any = networks[site.component].get_submodule(site.path)
    layer.weight = nn.Parameter(merged.to(site.weight.device), requires_grad=False)
    bias = site.dense_bias()
    if bias is not None:
        total = (layer.bias.detach().double().cpu() + bias).float()
        layer.bias = nn.Parameter(total.to(site.weight.device), requires_grad=False)
    norm = float(own.norm())
    return LayerRow(site.name, None, norm, relative_error(merged.to(dtype).double() - weight, own))


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to(dtype)`, which would write into the tensors shared with the base."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and value.is_floating_point() and value.dtype != dtype:
                part._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)


def add_words(job: Job, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Copies of the tokenizers that know the learned words, whose vectors join the embedding of the copied encoders."""
    tokenizers = {}
    for encoder, words in job.adapter.words.items():
        tokenizer: Any = copy.deepcopy(encoders_of(job.base)[encoder])
        network: Any = networks[encoder]
        tokens = [token for word, vectors in words.items() for token in tokens_of(word, len(vectors))]
        tokenizer.add_tokens(tokens)
        ids = tokenizer.convert_tokens_to_ids(tokens)
        old = network.get_input_embeddings().weight
        table = torch.zeros(max(len(old), max(ids) + 1), old.shape[1])
        table[: len(old)] = old.detach().float().cpu()
        table[ids] = torch.cat([vectors.detach().float().cpu() for vectors in words.values()])
        # Resizing writes into the old matrix, which is the base's, and draws start values for the new rows.
        network.get_input_embeddings().weight = nn.Parameter(old.detach().clone(), requires_grad=False)
        with torch.random.fork_rng(devices=[]):
            network.resize_token_embeddings(len(table), mean_resizing=False)
        network.get_input_embeddings().weight = nn.Parameter(table, requires_grad=False)
        tokenizers[encoder.replace("text_encoder", "tokenizer")] = tokenizer
    return tokenizers


def _ids(job: Job, name: str, tokenizer: Any) -> dict[str, list[int]]:
    words = job.adapter.words[name.replace("tokenizer", "text_encoder")]
    return {word: tokenizer.convert_tokens_to_ids(tokens_of(word, len(vectors))) for word, vectors in words.items()}


def save_pipeline(pipe: Any, networks: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], folder: Path) -> None:
    """The pipeline's folder as diffusers lays it out, with these networks and tokenizers in place of its own."""
    for name, part in pipe.components.items():
        part = networks.get(name, tokenizers.get(name, part))
        if part is not None:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)
    forget_origin(folder)


def _prove(folder: Path, networks: Mapping[str, nn.Module], tokens: Mapping[str, Mapping[str, list[int]]]) -> None:
    """Plain diffusers opens the folder: every weight must be the merged one, every word its ids. Raises WorkError."""
    expected = dict(_hashes(networks))
    asked = json.dumps({name: list(_spellings(words)) for name, words in tokens.items()})
    for header, _ in ask_fresh_process("checkpoint", str(folder), asked):
        if "word" in header:
            word = header["word"].split(" ")[0]
            own = tokens[header["tokenizer"]][word]
            if [token for token in header["ids"] if token in own] != own:
                raise WorkError(f"read back, the word '{word}' has other tokens in '{header['tokenizer']}'")
        elif expected.pop(header["site"], None) != header["sha256"]:
            raise WorkError(f"read back, '{header['site']}' has other values than were merged", "nothing was written")
    if expected:
        raise WorkError(f"read back, '{next(iter(expected))}' is not in the checkpoint", "nothing was written")


def _spellings(words: Mapping[str, list[int]]) -> Iterator[str]:
    """The words as diffusers spells them out in a prompt: `<cat> <cat>_1`."""
    for word, ids in words.items():
        yield " ".join(tokens_of(word, len(ids)))


def _hashes(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """SHA-256 of every stored tensor, in fp32."""
    for component, network in networks.items():
        for name, value in network.state_dict().items():
            yield f"{component}.{name}", _hash(value)


def _hash(value: Tensor) -> str:
    array = value.detach().cpu()
    array = array.float() if array.is_floating_point() else array
    return hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest()
