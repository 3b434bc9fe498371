"""Checkpoints that are one file, as people pass them on: all weights under the names of the original programs.

Which model such a file holds is told from the names and shapes in its header: Stable Diffusion 1, 2, XL, 3 or 3.5.
diffusers converts the names, and wants a pipeline folder with the configurations and tokenizers; `published.py` writes
that folder, so that no hub is needed. T5's tokenizer is not in it: Stable Diffusion 3 is opened without T5, whether or
not the file has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.bases.folder import check_weights
from studio.errors import BaseError

DENOISER = "model.diffusion_model."
VAE = "first_stage_model."
T5 = "text_encoders.t5xxl."
SD3_TEXT = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
KNOWN = "Stable Diffusion 1, 2, XL and 3"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """A model that people pass on as one file. `tensors` is how many its denoiser has, no more, no less."""

    name: str
    family: str
    text_prefixes: tuple[str, ...]
    text_width: int  # of the text that the denoiser looks at
    tensors: int
    channels: int = 4  # of the latents
    whole: str = "take the full version of the checkpoint"  # for who has one without autoencoder or text encoders


LAYOUTS = (
    Layout("sd15", "stable_diffusion", ("cond_stage_model.transformer.",), 768, 686),
    Layout("sd21", "stable_diffusion", ("cond_stage_model.model.",), 1024, 686),
    Layout("sdxl", "sdxl", ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."), 2048, 1680),
    Layout("sd3-medium", "sd3", SD3_TEXT, 4096, 491, 16, "take sd3_medium_incl_clips.safetensors or alias sd3-medium"),
    Layout(
        name="sd35-medium",
        family="sd3",
        text_prefixes=SD3_TEXT,
        text_width=4096,
        tensors=665,
        channels=16,
        whole="take sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors or alias sd35-medium",
    ),
    Layout("sd35-large", "sd3", SD3_TEXT, 4096, 923, 16, "take its diffusers folder or alias sd35-large"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a header tells. `prediction_type` is None where it does not say."""

    layout: Layout
    prediction_type: str | None
    zero_snr: bool
    licence: str
    has_t5: bool = False

    def notes(self, name: str) -> list[str]:
        """What the user of the file should know, a line each."""
        if self.layout.name == "sd21" and self.prediction_type is None:
            return [f"'{name}' does not say what it predicts: taken for Stable Diffusion 2.1 (v, 768 pixels)"]
        if self.layout.family == "sd3":
            why = "T5 in it is left unread, for want of its tokenizer" if self.has_t5 else "it has no T5"
            return [f"'{name}' reads prompts with its two CLIPs alone: {why} (a diffusers folder can have all three)"]
        return []


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
    has_t5 = any(key.startswith(T5) for key in shapes)
    return Checkpoint(layout, prediction, "ztsnr" in shapes, header.get("modelspec.license", ""), has_t5)


def recognise(shapes: Shapes, header: Mapping[str, str], file: str) -> Layout:
    """The layout of a file's tensors. Raises BaseError that says what the file is instead."""
    if "studio_card" in header or any(_is_of_an_adapter(key) for key in shapes):
        raise BaseError(f"'{file}' is an adapter, not a base", "give it with --adapter, and name a base beside it")
    entry = _entry(shapes)
    if entry is None:
        raise BaseError(f"'{file}' is no checkpoint of {KNOWN}: {_what_is(shapes)}", _other_way(shapes))
    _refuse_scaled(shapes, file)
    layout = _layout_of(shapes, file)
    if entry[1] != layout.channels:
        raise BaseError(
            f"'{file}' is for inpainting or editing: it takes {entry[1]} channels, not {layout.channels}",
            "take the version of the model that draws from text alone",
        )
    for what, prefix in (("autoencoder", VAE), *(("text encoder", prefix) for prefix in layout.text_prefixes)):
        if not any(key.startswith(prefix) for key in shapes):
            raise BaseError(f"'{file}' has no {what} in it ({prefix}*)", layout.whole)
    return layout


def _entry(shapes: Shapes) -> tuple[int, ...] | None:
    """The shape (O, I, height, width) of the first convolution of a UNet or of Stable Diffusion 3's transformer."""
    is_transformer = any(key.startswith(f"{DENOISER}joint_blocks.") for key in shapes)
    return shapes.get(DENOISER + ("x_embedder.proj.weight" if is_transformer else "input_blocks.0.0.weight"))


def _layout_of(shapes: Shapes, file: str) -> Layout:
    names = [key for key in shapes if key.startswith(DENOISER)]
    readers = [key for key in names if key.endswith(("attn2.to_k.weight", ".context_embedder.weight"))]
    widths = {shapes[key][1] for key in readers}
    for layout in LAYOUTS:
        if widths == {layout.text_width} and len(names) == layout.tensors:
            return layout
    raise BaseError(
        f"'{file}' holds a network of another build than {KNOWN} ({len(names)} tensors)",
        hint="use its diffusers folder, if there is one",
    )


def _refuse_scaled(shapes: Shapes, file: str) -> None:
    """diffusers would take such weights without their scales, and draw noise."""
    if any(key.startswith(DENOISER) and key.endswith(("scaled_fp8", ".scale_weight")) for key in shapes):
        raise BaseError(f"'{file}' holds scaled 8-bit weights, for drawing only", "take its fp16 or bf16 version")


def _is_of_an_adapter(key: str) -> bool:
    return key.startswith(("lora_unet_", "lora_te")) or ".lora_" in key or ".lora." in key


def _what_is(shapes: Shapes) -> str:
    if any("joint_blocks." in key for key in shapes):
        return "it is the transformer of Stable Diffusion 3 alone"
    if any(key.startswith(("down_blocks.", "transformer_blocks.")) for key in shapes):
        return "it is one network of a diffusers folder"
    return "its tensors have other names"


def _other_way(shapes: Shapes) -> str:
    if any("joint_blocks." in key for key in shapes):
        return "take a file that has autoencoder and both CLIPs too, such as sd3_medium_incl_clips.safetensors"
    return "give the whole pipeline folder, or another file"
