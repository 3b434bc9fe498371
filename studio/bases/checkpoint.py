"""Checkpoints that are one file, as people pass them on: all weights under the names of the original programs.

Which model such a file holds is told from the names and shapes in its header. diffusers converts the names, and wants
a pipeline folder with the configurations and tokenizers; that folder is built here, from code and from CLIP's
vocabulary in `assets/clip`, so that no hub is needed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.bases.folder import INDEX, check_weights
from studio.bases.tiny import NOISE
from studio.errors import BaseError
from studio.paths import assets_dir

UNET = "model.diffusion_model."
VAE = "first_stage_model."
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """A model that people pass on as one file. `unet_tensors` is how many tensors its UNet has, no more, no less."""

    name: str
    family: str
    text_prefixes: tuple[str, ...]
    text_width: int  # of the text that the UNet looks at
    unet_tensors: int


LAYOUTS = (
    Layout("sd15", "stable_diffusion", ("cond_stage_model.transformer.",), 768, 686),
    Layout("sd21", "stable_diffusion", ("cond_stage_model.model.",), 1024, 686),
    Layout("sdxl", "sdxl", ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."), 2048, 1680),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a header tells. `prediction_type` is None where it does not say."""

    layout: Layout
    prediction_type: str | None
    zero_snr: bool
    licence: str


def read_checkpoint(file: Path) -> Checkpoint:
    """Recognises a file by its header. Raises BaseError for one that is damaged, or no base that we know."""
    from safetensors import safe_open

    check_weights(file)
    with safe_open(file, framework="pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        header = opened.metadata() or {}
    layout = recognise(shapes, header, str(file))
    told = {"epsilon": "epsilon", "v": "v_prediction"}.get(header.get("modelspec.prediction_type", ""))
    prediction = "v_prediction" if "v_pred" in shapes else told
    return Checkpoint(layout, prediction, "ztsnr" in shapes, header.get("modelspec.license", ""))


def recognise(shapes: Shapes, header: Mapping[str, str], file: str) -> Layout:
    """The layout of a file's tensors. Raises BaseError that says what the file is instead."""
    if "studio_card" in header or any(_is_of_an_adapter(key) for key in shapes):
        raise BaseError(f"'{file}' is an adapter, not a base", "give it with --adapter, and name a base beside it")
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise BaseError(
            f"'{file}' is no Stable Diffusion 1, 2 or XL checkpoint: {_what_is(shapes)}", _other_way(shapes)
        )
    if first[1] != 4:
        raise BaseError(f"'{file}' is for inpainting or editing: its UNet takes {first[1]} channels, not 4")
    widths = {shape[1] for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
    unet_tensors = sum(key.startswith(UNET) for key in shapes)
    layout = next((one for one in LAYOUTS if widths == {one.text_width}), None)
    if layout is None or layout.unet_tensors != unet_tensors:
        raise BaseError(
            f"'{file}' holds a UNet of another build than Stable Diffusion 1, 2 and XL ({unet_tensors} tensors)",
            hint="use its diffusers folder, if there is one",
        )
    for what, prefix in (("autoencoder", VAE), *(("text encoder", prefix) for prefix in layout.text_prefixes)):
        if not any(key.startswith(prefix) for key in shapes):
            raise BaseError(f"'{file}' has no {what} in it ({prefix}*)", "take the full version of the checkpoint")
    return layout


def _is_of_an_adapter(key: str) -> bool:
    return key.startswith(("lora_unet_", "lora_te")) or ".lora_" in key or ".lora." in key


def _what_is(shapes: Shapes) -> str:
    if any("joint_blocks." in key for key in shapes):
        return "it is of Stable Diffusion 3"
    if any(key.startswith(("down_blocks.", "transformer_blocks.")) for key in shapes):
        return "it is one network of a diffusers folder"
    return "its tensors have other names"


def _other_way(shapes: Shapes) -> str:
    if any("joint_blocks." in key for key in shapes):
        return "use its diffusers folder, or the alias sd3-medium"
    return "give the whole pipeline folder, or another file"


# -- configurations ------------------------------------------------------------------------------------------------

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_OPEN = {"hidden_act": "gelu"}  # OpenCLIP's; OpenAI's have quick_gelu

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_XL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD2_UNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,  # overflows in fp16 otherwise
}
_DISCRETE = {**NOISE, "num_train_timesteps": 1000, "timestep_spacing": "leading"}
_DDIM = {**_DISCRETE, "clip_sample": False, "set_alpha_to_one": False}

#: part -> (library, class, configuration); what a text encoder or tokenizer needs beside is in `_write_part`.
_Parts = dict[str, tuple[str, str, dict[str, Any]]]


def configurations(layout: Layout, prediction_type: str | None = None, zero_snr: bool = False) -> _Parts:
    """The published configurations of the parts. Stable Diffusion 2 counts as 2.1 with 768 pixels where none is told.

    2.1 (768 pixels, v) and 2.1-base (512 pixels, epsilon) have the same tensors, so only metadata can tell.
    """
    prediction = prediction_type or ("v_prediction" if layout.name == "sd21" else "epsilon")
    process = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    if zero_snr:
        process["timestep_spacing"] = "trailing"  # else sampling never begins at pure noise
    tokenizer = ("transformers", "CLIPTokenizer", {"pad_token": "<|endoftext|>"})
    open_tokenizer = ("transformers", "CLIPTokenizer", {"pad_token": "!"})
    clip_l = ("transformers", "CLIPTextModel", _CLIP_L | {"projection_dim": 768})
    if layout.name == "sdxl":
        return {
            "unet": ("diffusers", "UNet2DConditionModel", _XL_UNET),
            "vae": (
                "diffusers",
                "AutoencoderKL",
                _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            ),
            "text_encoder": clip_l,
            "text_encoder_2": (
                "transformers",
                "CLIPTextModelWithProjection",
                _CLIP_G | _OPEN | {"projection_dim": 1280},
            ),
            "tokenizer": tokenizer,
            "tokenizer_2": open_tokenizer,
            "scheduler": ("diffusers", "EulerDiscreteScheduler", _DISCRETE | process),
        }
    side = 768 if layout.name == "sd21" and prediction == "v_prediction" else 512
    second = layout.name == "sd21"
    unet = _SD2_UNET if second else {"cross_attention_dim": 768}
    clip_h = ("transformers", "CLIPTextModel", _CLIP_H | _OPEN | {"projection_dim": 512})
    return {
        "unet": ("diffusers", "UNet2DConditionModel", unet | {"sample_size": side // 8}),
        "vae": ("diffusers", "AutoencoderKL", _VAE | {"sample_size": side, "scaling_factor": 0.18215}),
        "text_encoder": clip_h if second else clip_l,
        "tokenizer": open_tokenizer if second else tokenizer,
        "scheduler": ("diffusers", "DDIMScheduler", _DDIM | process),
    }


def write_configurations(parts: _Parts, pipeline_class: str, folder: Path) -> None:
    """A pipeline folder without weights."""
    index: dict[str, Any] = {"_class_name": pipeline_class}
    if pipeline_class == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    for name, (library, class_name, config) in parts.items():
        index[name] = [library, class_name]
        _write_part(folder / name, class_name, config)
    (folder / INDEX).write_text(json.dumps(index))


def _write_part(folder: Path, class_name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    if class_name == "CLIPTokenizer":
        clip_tokenizer(**config).save_pretrained(folder)
    elif class_name.startswith("CLIPTextModel"):
        from transformers import CLIPTextConfig

        sizes: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
        ids: dict[str, Any] = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
        CLIPTextConfig(**sizes, **ids, **config).save_pretrained(folder)
    else:
        _write_whole_configuration(folder, class_name, config)


def _write_whole_configuration(folder: Path, class_name: str, config: dict[str, Any]) -> None:
    """With every default spelled out, as diffusers' conversion of names wants it."""
    import diffusers
    import torch

    with torch.device("cpu" if class_name.endswith("Scheduler") else "meta"):
        getattr(diffusers, class_name).from_config(config).save_config(folder)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer of 49,408 tokens, from the merges in `assets/clip`."""
    from transformers import CLIPTokenizer

    packed = assets_dir() / "clip" / "merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    merges: Any = [(left, right) for left, right in (line.split(" ") for line in lines)]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _byte_letters() -> list[str]:
    """A printable letter for each byte: itself where it is one, else one above 255; in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + others))]
