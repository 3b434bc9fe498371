"""The settings of RDTF, and the clip network that a training starts from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from studio.bases.registry import bundled, load_base
from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.sticker_video.building import PAPER_IMAGE, video_around
from studio.bases.sticker_video.family import StickerVideo
from studio.data import motions
from studio.errors import PresetError
from studio.method import Method, register
from studio.preset import Preset
from studio.run import Run
from trainers.rdtf.curriculum import Mode
from trainers.rdtf.task import ClipTask


@register
class Rdtf(Method):
    """Trains a network for animated stickers whole: dual masks, and a curriculum over six tasks."""

    kind: Literal["rdtf"] = "rdtf"
    paper = "RDTF: Resource-efficient Dual-mask Training Framework, arXiv 2503.17735"
    learning_rate = 3e-4
    train: Literal["all", "temporal"] = Field(
        "all", description="Every weight, or only what the image network lacks: the adapter that RDTF argues against."
    )
    spatial: Literal["image", "random"] = Field(
        "image", description="Start spatial weights from the image base, or at random."
    )
    spatial_rank: int = Field(
        0, ge=0, description="Rank of a change of the spatial weights, for train: temporal, which keeps them; 0: none."
    )
    text: Literal["all", "words", "frozen"] = Field(
        "all", description="Of the text encoder, train everything, or the words' vectors alone, or nothing."
    )
    backbone: Literal["sticker_unet", "paper_unet", "stock_unet3d"] = Field(
        "sticker_unet",
        description="Our network around the image base's; the same in the paper's widths (0.96 billion parameters, "
        "text 1024 wide); or diffusers' UNet3DConditionModel. The latter two start at random.",
    )
    interaction: Literal["sti", "conv", "none"] = Field(
        "sti", description="Between residual blocks: spatial-temporal interaction, its convolution alone, or nothing."
    )
    temporal_told: bool = Field(
        True, description="Tell the layers over time of noise level, frame rate, loop and the text, not frames alone."
    )
    alpha: bool = Field(True, description="Draw transparency, through the same autoencoder.")
    condition_fill: Literal["blend", "zero"] = Field(
        "blend", description="Between given frames, show the network their blend, or nothing as the paper does."
    )
    condition_spread: float = Field(
        0.0,
        ge=0,
        description="How far latents are from the blend of given frames (standard deviation): predictions then start "
        "from the blend. 0: the network finds it by itself.",
    )
    noise_share: float = Field(
        0.0, ge=0, lt=1, description="How much of its noise a frame has in common with all others of its clip."
    )
    batches: Literal["bucketed", "padded"] = Field(
        "bucketed", description="Clips of one length in a step, which costs least, or mixed and padded with masks."
    )
    dual_mask: bool = Field(
        True, description="Six tasks with given frames; without, every clip is drawn from its text alone."
    )
    curriculum: Mode = Field("adaptive", description="How tasks are chosen: none, linear, paper or adaptive.")
    curriculum_end: float = Field(0.5, gt=0, le=1, description="Share of the steps after which it is at its hardest.")
    image_dropout: float = Field(0.1, ge=0, le=1, description="Share of samples trained without their given frames.")
    timestep_shift: float = Field(
        1.0,
        gt=0,
        description="Moves times towards noise, where text decides what moves: SD3's equation 23. 1: uniform.",
    )
    both_dropout: float = Field(0.05, ge=0, le=1, description="Share trained with neither frames nor caption.")
    paper_compat: bool = Field(
        False, description="The published loss: given frames count, and a clip of n frames weighs n / F."
    )

    def base(self, preset: Preset) -> StickerVideo:
        """A clip base as it is, or one built around an image base. Raises PresetError, BaseError."""
        loaded: Any = load_base(preset.base, dtype="fp32")
        if isinstance(loaded, StickerVideo):
            return loaded
        if not isinstance(loaded, StableDiffusion):
            raise PresetError(
                f"'{preset.base}' is of the family {loaded.family}, and a clip network is built around Stable "
                "Diffusion 1 or 2, or a clip base",
                "set base=sticker",
            )
        if self.backbone == "stock_unet3d" and self.batches == "padded":
            raise PresetError("method.backbone=stock_unet3d cannot mask padding", "set method.batches=bucketed")
        width = loaded.pipe.text_encoder.config.hidden_size
        if self.backbone == "paper_unet" and width != PAPER_IMAGE["cross_attention_dim"]:
            raise PresetError(
                f"method.backbone=paper_unet is for text {PAPER_IMAGE['cross_attention_dim']} wide, and that of "
                f"'{preset.base}' is {width} wide",
                "set base=sd21-base, or a folder of Stable Diffusion 2",
            )
        base = video_around(
            loaded,
            "sticker-motion",
            preset.seed,
            alpha=self.alpha,
            words=motions.vocabulary() if self.text != "frozen" else (),
            backbone=self.backbone,
            condition_fill=self.condition_fill,
            condition_spread=self.condition_spread,
            noise_share=self.noise_share,
            keep_weights=self.spatial == "image",
            side=preset.data.resolution,
            **self._options(max(16, preset.data.frames)),
        )
        base.shares_with = preset.base if preset.base in bundled() else ""
        return base

    def _options(self, max_frames: int) -> dict[str, Any]:
        """What the backbone is built with beside its widths."""
        if self.backbone == "stock_unet3d":
            return {}
        options = {"max_frames": max_frames, "interaction": self.interaction}
        if self.backbone == "paper_unet":
            return options
        return options | {
            "interaction_heads": 4,
            "interaction_head_dim": 16,
            "temporal_head_dim": 32,
            "spatial_rank": self.spatial_rank,
            "temporal_told": self.temporal_told,
            "residual_head": self.condition_spread > 0,
        }

    def task(self, base: StickerVideo, preset: Preset, run: Run) -> ClipTask:
        if preset.data.source not in ("motions", "clips"):
            raise PresetError("method 'rdtf' learns from clips", "set data.source=motions, or clips and data.path")
        if self.train == "temporal" and self.backbone != "sticker_unet":
            raise PresetError("method.train=temporal needs layers apart for time", "set method.backbone=sticker_unet")
        if preset.data.frames > base.max_frames:
            raise PresetError(f"data.frames={preset.data.frames}: '{base.name}' draws {base.max_frames} at most")
        return ClipTask(self, base, preset, run)
