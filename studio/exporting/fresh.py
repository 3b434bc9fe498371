"""Reads an export as a stranger would: a program of its own that imports nothing of the studio.

    fresh.py plain SKELETON FILE WORDS     plain diffusers loads LoRA and words; the deltas of PEFT's layers
    fresh.py peft CONFIG MODULE CLASS NAME FOLDER   plain PEFT loads a LoRA into a network; the deltas of its layers
    fresh.py formula FILE NAMES            kohya's and the dense format's formulas in numpy; the deltas by module
    fresh.py checkpoint FOLDER TOKENS      plain diffusers opens a pipeline; a hash of every weight in fp32

Answers on stdout, one JSON line each, followed by as many bytes as its "bytes" says: fp32, little-endian. Everything
that libraries print goes to stderr.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAPTER = "exported"


def send(payload: bytes = b"", **header: Any) -> None:
    ANSWERS.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n")
    ANSWERS.write(payload)


def send_array(array: Any, **header: Any) -> None:
    """A tensor or array as fp32."""
    array = array.detach().float().cpu().numpy() if hasattr(array, "detach") else array
    send(array.astype("<f4").tobytes(), shape=list(array.shape), **header)


# -- plain diffusers, on a pipeline without weights ------------------------------------------------------------


def hollow(folder: Path, module: str, name: str) -> Any:
    """A network of which every tensor is one zero seen from everywhere: real shapes, no memory.

    What a LoRA adds does not depend on the weights, so this stands in for any base of this architecture.
    """
    import torch

    cls = getattr(importlib.import_module(module), name)
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            network = cls.from_config(cls.load_config(folder))
        else:
            network = cls(cls.config_class.from_pretrained(folder))
    for part in network.modules():
        for key, value in list(part._parameters.items()):
            if value is not None:
                zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
                part._parameters[key] = torch.nn.Parameter(zero, requires_grad=False)
        for key, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[key] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return network


def plain(skeleton: str, lora: str, words: str) -> None:
    import diffusers
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks = json.loads(Path(skeleton, "networks.json").read_text())
    parts = {name: hollow(Path(skeleton, name), *where) if where else None for name, where in networks.items()}
    pipe = diffusers.DiffusionPipeline.from_pretrained(skeleton, local_files_only=True, **parts)
    if lora:
        pipe.load_lora_weights(lora, adapter_name=ADAPTER)
    for name in (name for name, where in networks.items() if where):
        for path, layer in getattr(pipe, name).named_modules():
            if isinstance(layer, BaseTunerLayer) and ADAPTER in layer.active_adapters and not layer.disable_adapters:
                lora_layer: Any = layer
                send_array(lora_layer.get_delta_weight(ADAPTER), site=f"{name}.{path}")
    for word in json.loads(words):
        load_word(pipe, **word)


def peft(config: str, module: str, cls: str, component: str, folder: str) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    network: Any = PeftModel.from_pretrained(hollow(Path(config), module, cls), folder).base_model.model
    for path, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            lora_layer: Any = layer
            send_array(lora_layer.get_delta_weight(lora_layer.active_adapters[0]), site=f"{component}.{path}")


def load_word(pipe: Any, path: str, token: str, keys: dict[str, str]) -> None:
    """Loads a textual inversion for each text encoder, and answers with the vectors that the pipeline then has."""
    from safetensors.torch import load_file

    for encoder, key in keys.items():
        tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        text_encoder = getattr(pipe, encoder)
        if key == token:
            pipe.load_textual_inversion(path)
        else:
            pipe.load_textual_inversion(load_file(path)[key], token, tokenizer, text_encoder)
        rows = [tokenizer.get_vocab()[part] for part in pipe.maybe_convert_prompt(token, tokenizer).split()]
        send_array(text_encoder.get_input_embeddings().weight[rows], word=token, encoder=encoder)


# -- the formulas of kohya and of dense deltas, without torch, diffusers or safetensors -----------------------------


def read_tensors(path: str) -> dict[str, Any]:
    """A safetensors file: 8 bytes of length, a JSON header, the data."""
    import numpy as np

    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        block = data[8 + length + start : 8 + length + end]
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(block, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(block, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        tensors[name] = flat.astype(np.float64).reshape(entry["shape"])
    return tensors


def formula(path: str, names: str) -> None:
    """What ComfyUI and A1111 add to the weights: up down alpha / rank, or diff as it is, and diff_b to the biases."""
    tensors = read_tensors(path)
    layers = json.loads(Path(names).read_text())
    several = any(name.startswith("text_encoder_2.") for name in layers)
    modules = {flat_name(name, several): name for name in layers}
    for key, value in tensors.items():
        flat, _, kind = key.partition(".")
        if kind == "diff":
            send_array(value, site=modules[flat])
        elif kind == "diff_b":
            send_array(value, bias=modules[flat])
        elif kind == "lora_down.weight":
            up = tensors[f"{flat}.lora_up.weight"]
            rank = value.shape[0]
            scale = float(tensors[f"{flat}.alpha"]) / rank if f"{flat}.alpha" in tensors else 1.0
            delta = scale * up.reshape(-1, rank) @ value.reshape(rank, -1)
            send_array(delta.reshape(up.shape[0], *value.shape[1:]), site=modules[flat])


def flat_name(name: str, several: bool) -> str:
    """kohya's name of one of diffusers' modules; text encoders are `te`, or `te1` and `te2` where there are several."""
    component, path = name.split(".", 1)
    if component == "unet":
        path = path.replace("add_embedding.linear_1", "label_emb.0.0").replace(
            "add_embedding.linear_2", "label_emb.0.2"
        )
    elif path.startswith("encoder."):
        path = f"text_model.{path}"
    prefix = {"unet": "unet", "text_encoder": "te1" if several else "te", "text_encoder_2": "te2"}[component]
    return f"lora_{prefix}_{path}".replace(".", "_")


# -- a whole pipeline --------------------------------------------------------------------------------------------


def checkpoint(folder: str, tokens: str) -> None:
    import diffusers
    import torch

    index = json.loads(Path(folder, "model_index.json").read_text())
    absent: dict[str, Any] = {part: None for part, value in index.items() if value == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    for component, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            for name, value in network.state_dict().items():
                array = value.float().contiguous().numpy() if value.is_floating_point() else value.numpy()
                send(site=f"{component}.{name}", sha256=hashlib.sha256(array.tobytes()).hexdigest())
    for tokenizer, words in json.loads(tokens).items():
        for word in words:
            send(tokenizer=tokenizer, word=word, ids=getattr(pipe, tokenizer)(word, add_special_tokens=False).input_ids)


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    command, *arguments = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {
        "plain": plain,
        "peft": peft,
        "formula": formula,
        "checkpoint": checkpoint,
    }
    commands[command](*arguments)
    ANSWERS.close()
