"""The published configurations of the models that people pass on as one file, written as a pipeline folder.

Such a file holds weights alone. What else diffusers wants comes from here: the configurations from code, the tokenizers
from CLIP's vocabulary in `assets/clip`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from studio.bases.folder import INDEX
from studio.bases.tiny import NOISE
from studio.paths import assets_dir

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
#: Stable Diffusion 3's transformer; 3.5's differ from it as told below.
_MMDIT = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_MMDIT_CHANGES: dict[str, dict[str, Any]] = {
    "sd3-medium": {},
    "sd35-medium": {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
    "sd35-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
_SD3_VAE = {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_DISCRETE = {**NOISE, "num_train_timesteps": 1000, "timestep_spacing": "leading"}
_DDIM = {**_DISCRETE, "clip_sample": False, "set_alpha_to_one": False}

#: library, class, configuration; what a text encoder or tokenizer needs beside is in `_write_part`.
Part = tuple[str, str, dict[str, Any]]
_TOKENIZER: Part = ("transformers", "CLIPTokenizer", {"pad_token": "<|endoftext|>"})
_OPEN_TOKENIZER: Part = ("transformers", "CLIPTokenizer", {"pad_token": "!"})


def configurations(name: str, prediction_type: str | None = None, zero_snr: bool = False) -> dict[str, Part]:
    """The parts of a layout by its name. Stable Diffusion 2 counts as 2.1 with 768 pixels where none is told.

    2.1 (768 pixels, v) and 2.1-base (512 pixels, epsilon) have the same tensors, so only metadata can tell.
    """
    if name in _MMDIT_CHANGES:
        return _sd3(name)
    prediction = prediction_type or ("v_prediction" if name == "sd21" else "epsilon")
    process = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    if zero_snr:
        process["timestep_spacing"] = "trailing"  # else sampling never begins at pure noise
    return _sdxl(process) if name == "sdxl" else _sd1_or_2(name == "sd21", process)


def _sd1_or_2(second: bool, process: dict[str, Any]) -> dict[str, Part]:
    side = 768 if second and process["prediction_type"] == "v_prediction" else 512
    unet = _SD2_UNET if second else {"cross_attention_dim": 768}
    clip = _CLIP_H | _OPEN | {"projection_dim": 512} if second else _CLIP_L | {"projection_dim": 768}
    return {
        "unet": ("diffusers", "UNet2DConditionModel", unet | {"sample_size": side // 8}),
        "vae": ("diffusers", "AutoencoderKL", _VAE | {"sample_size": side, "scaling_factor": 0.18215}),
        "text_encoder": ("transformers", "CLIPTextModel", clip),
        "tokenizer": _OPEN_TOKENIZER if second else _TOKENIZER,
        "scheduler": ("diffusers", "DDIMScheduler", _DDIM | process),
    }


def _sdxl(process: dict[str, Any]) -> dict[str, Part]:
    vae = _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
    return {
        "unet": ("diffusers", "UNet2DConditionModel", _XL_UNET),
        "vae": ("diffusers", "AutoencoderKL", vae),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L | {"projection_dim": 768}),
        **_second_clip(),
        "tokenizer": _TOKENIZER,
        "scheduler": ("diffusers", "EulerDiscreteScheduler", _DISCRETE | process),
    }


def _sd3(name: str) -> dict[str, Part]:
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", _MMDIT | _MMDIT_CHANGES[name]),
        "vae": ("diffusers", "AutoencoderKL", _VAE | _SD3_VAE),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L | {"projection_dim": 768}),
        **_second_clip(),
        "tokenizer": _TOKENIZER,
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
    }


def _second_clip() -> dict[str, Part]:
    config = _CLIP_G | _OPEN | {"projection_dim": 1280}
    return {
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", config),
        "tokenizer_2": _OPEN_TOKENIZER,
    }


#: What else the index of a pipeline says. Stable Diffusion 3's T5 is left out: its tokenizer is nowhere here.
_INDEX: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"force_zeros_for_empty_prompt": True},
    "StableDiffusion3Pipeline": {"text_encoder_3": [None, None], "tokenizer_3": [None, None]},
}


def write_configurations(parts: dict[str, Part], pipeline_class: str, folder: Path) -> None:
    """A pipeline folder without weights."""
    index: dict[str, Any] = {"_class_name": pipeline_class, **_INDEX.get(pipeline_class, {})}
    for name, (library, class_name, config) in parts.items():
        index[name] = [library, class_name]
        _write_part(folder / name, class_name, config)
    (folder / INDEX).write_text(json.dumps(index))


def _write_part(folder: Path, class_name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    if class_name == "CLIPTokenizer":
        clip_tokenizer(**config).save_pretrained(folder)
    elif class_name.startswith("CLIPTextModel"):
        text_configuration(config).save_pretrained(folder)
    else:
        _write_whole_configuration(folder, class_name, config)


def text_configuration(config: dict[str, Any]) -> Any:
    """CLIP's, with what all of them have in common."""
    from transformers import CLIPTextConfig

    sizes: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
    ids: dict[str, Any] = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    return CLIPTextConfig(**sizes, **ids, **config)


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
