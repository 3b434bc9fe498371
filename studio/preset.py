"""Presets: one typed schema for files, the command line, the browser and the docs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from studio.errors import PresetError, nearest, reason_of
from studio.method import Method, describe, method_from
from studio.paths import presets_dir

AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(method_from)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prior(_Settings):
    """Prior preservation (Ruiz et al. 2023): pictures of the class, drawn by the base itself, trained along."""

    pictures: int = Field(0, ge=0, le=10_000, description="How many class pictures the base draws. 0 turns it off.")
    weight: float = Field(1.0, ge=0, description="Weight of their loss against that of the subject's pictures.")
    prompts: tuple[str, ...] = Field(
        (), description="What to draw, in turn; {class} is the class word. Default: what the base is known to draw."
    )
    steps: int | None = Field(None, ge=1, description="Sampling steps of these pictures. Default: the base's own.")


class Data(_Settings):
    """What to train on."""

    source: Literal["pictures", "stickers", "clips", "motions", "melodies"] = Field(
        "pictures",
        description="A folder of pictures or of clips, or made by the studio: the sticker world, moving stickers, or "
        "melodies.",
    )
    path: str | None = Field(
        None, description="The folder of pictures or sounds, only read. {assets} is the studio's own data."
    )
    seconds: float = Field(
        10.0,
        gt=0,
        le=60,
        description="Sounds: recordings are cut into pieces of this length. Melodies: how long pieces are, or the "
        "codec's crops of them; the pieces of `melody-diffusion` are as long as its clips, whatever this says.",
    )
    part: tuple[float, float] = Field(
        (0.0, 1.0),
        description="Sounds: the part of a recording of a minute or more that is used, as shares of its length; "
        "[0.2, 0.9] leaves out how it begins and ends.",
    )
    resolution: int | None = Field(None, ge=16, le=8192, description="Side in pixels. Default: the base's own.")
    caption: str = Field(
        "{trigger}",
        description="Caption of what has none beside it; {trigger} and {class} are filled in.",
    )
    trigger: str = Field("", description="The word that calls the concept. Default: made from the name.")
    class_word: str = Field("", description="What kind of thing it is, for {class}: dog, cup, style ...")
    buckets: bool = Field(
        True, description="Keep each picture's aspect ratio, in buckets, instead of cutting a square."
    )
    flip: bool = Field(False, description="Train on mirrored pictures too.")
    masks: bool = Field(False, description="Weight the loss by masks: NAME.mask.png beside NAME.png, white counts.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Fraction of samples trained without their caption.")
    validation: int = Field(
        0, ge=0, description="How many pictures, clips or recordings to hold out for a validation loss."
    )
    glyphs: Literal["train", "train+other", "held-out"] = Field("train", description="Stickers: which emoji to draw.")
    crop: int | None = Field(None, ge=16, description="Stickers: train the autoencoder on crops of this side.")
    alone: float = Field(0.0, ge=0, le=1, description="Stickers: share of pictures with one thing in the middle.")
    fill: float | None = Field(None, gt=0, le=1, description="Stickers: its size there, as a fraction of the picture.")
    pool: int = Field(2048, ge=1, description="Worlds that are drawn: examples kept encoded at a time.")
    refresh: int = Field(
        8, ge=0, description="Worlds that are drawn: examples of the pool that are drawn anew at each step."
    )
    frames: int = Field(8, ge=1, le=64, description="Clips: most frames of one; longer ones give their key frames.")
    stills: float = Field(0.2, ge=0, le=1, description="Moving stickers: share of clips with a single frame.")
    modes: tuple[str, ...] = Field(
        (),
        description="Melodies: the modes that are played. Default: all; where they are told, all that are not left to "
        "adapters.",
    )
    intonation: Literal["theory", "performed"] = Field(
        "theory", description="Melodies: makams as the theory divides the octave, or nearer to how they are played."
    )
    stems: bool = Field(False, description="Melodies: the line alone, without drone and drum.")
    prior: Prior = Prior()

    @field_validator("part")
    @classmethod
    def _is_a_part(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("must be two shares of the length, the smaller first: [0.2, 0.9]")
        return value


class Schedule(_Settings):
    """How long, how fast, how often. Everything that the loop itself needs."""

    steps: int = Field(500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(1, ge=1, description="Samples per step, micro-batch and process.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of AdamW. Default: the method's own."
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="How it falls after warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which it rises from zero.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging factors.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm. 0 leaves them.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Averages the trained values over steps. 0 turns it off.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random in the run.")
    sample_every: int = Field(0, ge=0, description="Steps between sample pictures. 0: none.")
    validate_every: int = Field(0, ge=0, description="Steps between validation losses. 0: none.")
    checkpoint_every: int = Field(250, ge=1, description="Steps between checkpoints.")
    checkpoints_kept: int = Field(2, ge=1, description="How many checkpoints stay on disk.")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step` (from 0). A plan settles the peak where the preset has none."""
        assert self.learning_rate is not None
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.learning_rate * factor[self.lr_schedule]

    def fingerprint(self) -> str:
        """A hash over what the trained values depend on; how often things are shown or saved is left out."""
        shown = {"sample_every", "validate_every", "checkpoint_every", "checkpoints_kept"}
        values = {name: getattr(self, name) for name in sorted(Schedule.model_fields) if name not in shown}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Preset(Schedule):
    """A recipe: which base, which method, which data, how long."""

    description: str = Field("", description="One line on what the preset is for.")
    base: str = Field("sticker", description="Bundled name, alias, local folder, hub id or .safetensors checkpoint.")
    method: AnyMethod
    data: Data = Data()
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Precision of the forward pass.")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    min_snr_gamma: float | None = Field(None, gt=0, description="Min-SNR weighting of timesteps; 5 is usual.")
    first_codebook: float = Field(
        1.0, gt=0, description="Music as tokens: how much the first codebook counts, which decides what is played."
    )
    note_beginnings: float = Field(
        1.0,
        gt=0,
        description="Music as tokens: how much the first frames of a note count in the first codebook. The others go "
        "on with what they choose.",
    )
    dco_beta: float | None = Field(
        None,
        gt=0,
        description="Direct consistency optimization (Lee et al. 2024): learn only as far as the base is bettered, the "
        "sharper the larger; 1000 is usual. Costs a second forward pass.",
    )
    learned_words: int = Field(0, ge=0, le=32, description="Train this many vectors for the trigger word itself.")
    learned_words_layerwise: bool = Field(
        False,
        description="Give each cross-attention layer vectors of its own for the trigger word (P+, ED-LoRA): by default "
        "a pair that starts as a random vector and the class word's. Stable Diffusion 1 and 2 only; no export.",
    )
    learned_words_lr: float = Field(5e-3, gt=0, description="Learning rate of the learned words.")
    sketches: int = Field(
        32,
        ge=0,
        le=4096,
        description="Directions of each layer's inputs that the adapter's file tells of, for merging without base and "
        "data. They come from generated pictures. 0: none.",
    )
    sample_prompts: tuple[str, ...] = Field(
        ("{trigger}",),
        description="What to make during training. {trigger} and {class} are filled in, of music {caption}, too: "
        "that of a recording, one that is held out if any is.",
    )
    sample_steps: int | None = Field(None, ge=1, description="Sampling steps of those pictures.")
    sample_seconds: float | None = Field(None, gt=0, description="Length of those sounds. Default: the base's own.")
    export: tuple[Literal["diffusers", "kohya", "peft", "diff", "checkpoint"], ...] = Field(
        (), description="Formats to export to at the end."
    )
    learning_rates: dict[str, float] = Field(
        {}, description="By kind, for this purpose on this base: what --method takes instead of the method's own."
    )
    other_bases: dict[str, Any] = Field(
        {}, description="Fields that change, by dotted name, where --base names another base than the preset's."
    )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def preset_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(presets_dir().glob("*.yaml"))}


def read_preset(name: str) -> dict[str, Any]:
    """The plain content of a preset, by name or file. Raises PresetError with the nearest name.

    `extends: NAME` starts from another preset; what stands beside it takes the place of that one's keys, whole.
    """
    known = preset_files()
    path = known.get(name) or Path(name)
    if not path.is_file():
        if name.endswith((".yaml", ".yml")):
            raise PresetError(f"there is no preset file '{name}'")
        raise PresetError(f"unknown preset '{name}'", nearest(name, known))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"'{path}' is no YAML: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise PresetError(f"'{path}' holds no preset", "a preset is a list of 'key: value' lines")
    start = content.pop("extends", None)
    if start is None:
        return content
    if str(start) not in known or path == known[str(start)]:
        raise PresetError(f"'{path}' extends '{start}', which is no other preset", nearest(str(start), known))
    return {**read_preset(str(start)), **content}


def make_preset(content: dict[str, Any]) -> Preset:
    """Validates. Raises PresetError that names the first fault and the nearest right key."""
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        raise PresetError(*describe(error, Preset)) from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """`a.b=value` as key and value, the value read as YAML. Raises PresetError."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise PresetError(f"--set '{setting}' is not of the form key=value", "for example --set method.rank=16")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        return key, text


def apply_settings(content: dict[str, Any], settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A copy of a preset's content with values set by dotted keys. Raises PresetError."""
    changed = json.loads(json.dumps(content))
    for key, value in settings:
        place = changed
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                raise PresetError(f"unknown key '{key}': '{parent}' has no parts")
            place = place[parent]
        place[last] = value
    return changed
