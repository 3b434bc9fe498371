"""Which site of a base a key of a LoRA file means.

Files name layers with dots or underscores, by diffusers' names or by those of the original UNets, with a dozen
prefixes. All are brought to one spelling, component and path with underscores, and looked up there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Prefix in the file -> the component it means; "denoiser" and "te" stand for whatever the base calls it.
PREFIXES = (
    ("lora_unet_", "denoiser"),
    ("lora_transformer_", "denoiser"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", "denoiser"),
    ("model_diffusion_model_", "denoiser"),
    ("diffusion_model_", "denoiser"),
    ("base_model_model_", ""),
)

# Inside a residual block of the original UNets.
RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}


class SiteNames:
    """Sites of a base by every spelling of their names that files use."""

    def __init__(self, sites: Iterable[str], denoiser: str) -> None:
        self.denoiser = denoiser
        self.by_spelling: dict[str, dict[str, str]] = {}
        for site in sites:
            component, path = site.split(".", 1)
            self.by_spelling.setdefault(component, {})[flat(path)] = site
        own = self.by_spelling.get(denoiser, {})
        original = original_names(own)
        own |= {spelling: own[ours] for spelling, ours in original.items() if ours in own}

    def find(self, key: str) -> str | None:
        """The site of a layer's name in a file, or None."""
        spelled = flat(key)
        components = self.by_spelling
        for prefix, component in PREFIXES:
            if spelled.startswith(prefix):
                rest = spelled.removeprefix(prefix)
                if component:
                    name = self.denoiser if component == "denoiser" else component
                    return self._in(name, rest) or self.find(rest)
                spelled = rest
                break
        named = [name for name in components if spelled.startswith(f"{name}_")]
        for name in sorted(named, key=len, reverse=True):
            found = self._in(name, spelled.removeprefix(f"{name}_"))
            if found:
                return found
        return next((found for name in components if (found := self._in(name, spelled))), None)

    def _in(self, component: str, path: str) -> str | None:
        table = self.by_spelling.get(component, {})
        return next((table[way] for way in _ways(path) if way in table), None)


def flat(name: str) -> str:
    return name.replace(".", "_")


def _ways(path: str) -> Iterable[str]:
    """A path, without the level that transformers 5 dropped, and as older diffusers wrote attention."""
    bare = path.removeprefix("text_model_")
    processor = re.sub(r"_processor_(to_[qkv]|to_out)_lora$", r"_\1", bare)
    return path, bare, processor, re.sub(r"_to_out$", "_to_out_0", processor)


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Original names of a UNet's layers -> diffusers' (both with underscores), read off the layout of the blocks."""
    paths = set(paths)
    layers = 1 + max((int(m[1]) for p in paths if (m := re.match(r"down_blocks_0_resnets_(\d+)_", p))), default=-1)
    if not layers:
        return {}
    found = dict(OUTER)
    for path in paths:
        original = _original(path, layers, paths)
        if original:
            found[original] = path
    return found


def _original(path: str, layers: int, paths: set[str]) -> str | None:
    match = re.match(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)", path)
    if match:
        side, i, part, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if part == "downsamplers":
            return f"input_blocks_{(layers + 1) * (i + 1)}_0_op"
        if part == "upsamplers":
            attends = any(p.startswith(f"up_blocks_{i}_attentions_") for p in paths)
            return f"output_blocks_{(layers + 1) * i + layers}_{2 if attends else 1}_{rest}"
        block = (layers + 1) * i + j + (1 if side == "down" else 0)
        name = f"{'input' if side == 'down' else 'output'}_blocks_{block}"
        return f"{name}_0_{_resnet(rest)}" if part == "resnets" else f"{name}_1_{rest}"
    match = re.match(r"mid_block_(resnets|attentions)_(\d+)_(.+)", path)
    if match:
        return (
            f"middle_block_{2 * int(match[2])}_{_resnet(match[3])}"
            if match[1] == "resnets"
            else f"middle_block_1_{match[3]}"
        )
    return None


def _resnet(rest: str) -> str:
    return next((theirs for theirs, ours in RESNET.items() if ours == rest), rest)
