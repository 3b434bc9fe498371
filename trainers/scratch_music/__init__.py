"""Training whole bases of music: how `melody` and `melody-diffusion` are made.

Two stages, as their authors made theirs: what turns sound into codes or latents, then what is told and plays
(Copet et al. 2023; Melechovsky et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from studio.bases.melody import build_melody
from studio.bases.mustango.building import melody_diffusion
from studio.bases.quiet import quiet_libraries
from studio.bases.registry import load_base
from studio.data.melodies.fields import vocabulary
from studio.data.melodies.modes import EVERY, WESTERN
from studio.errors import BaseError, PresetError, nearest
from studio.method import Method, register
from studio.preset import Preset
from studio.run import Run
from trainers.scratch_music.pieces import MusicTask
from trainers.scratch_music.spectrograms import AutoencoderTask, DenoiserTask
from trainers.scratch_music.tokens import CodecTask, DecoderTask

BLUEPRINTS: dict[str, Callable[[int], Any]] = {
    "melody": build_melody,
    "melody-diffusion": lambda seed: melody_diffusion(vocabulary(), seed),
}
TASKS: dict[str, dict[str, type[MusicTask]]] = {
    "melody": {"codec": CodecTask, "decoder": DecoderTask},
    "melody-diffusion": {"autoencoder": AutoencoderTask, "denoiser": DenoiserTask},
}
PARTS = {
    "melody": ("audio_encoder", "text_encoder", "enc_to_dec_proj", "decoder"),
    "melody-diffusion": ("vae", "unet", "text_encoder", "beat_encoder", "chord_encoder"),
}


@register
class ScratchMusic(Method):
    """Trains a small MusicGen or Mustango whole, from random weights or from those of a folder."""

    kind: Literal["scratch-music"] = "scratch-music"
    paper = "Copet et al. 2023, Simple and Controllable Music Generation, arXiv 2306.05284"
    learning_rate = 1e-3
    train: Literal["codec", "decoder", "autoencoder", "denoiser"] = Field(
        "decoder",
        description="Of `melody` the codec, or the decoder together with its text encoder; of `melody-diffusion` the "
        "autoencoder, or the denoiser together with what tells it.",
    )
    init_from: str | None = Field(None, description="Folder to take weights from. Default: random weights.")
    fresh: tuple[str, ...] = Field((), description="Networks that start at random although init_from has them.")
    unquantised: float = Field(
        0.35, ge=0, le=1, description="Codec: share of the steps that train a plain autoencoder, before codes begin."
    )
    commitment: float = Field(0.25, ge=0, description="Codec: weight of keeping frames near their codes.")
    openings: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0, 0.5, 0.25, 0.125),
        min_length=1,
        description="Decoder: what a batch has of its pieces, one of these shares from their beginning.",
    )
    basses: float = Field(
        0.0, ge=0, lt=1, description="Share of the pieces that are turned into a bass's, which is the hardest to hear."
    )
    words_first: int = Field(
        0,
        ge=0,
        description="Denoiser: so many steps first learn from noise alone the mean of pieces under the same words.",
    )
    timestep_shift: float = Field(
        1.0, gt=0, description="Denoiser: moves times towards noise, where the words decide what is played."
    )
    spectral_weight: float = Field(
        0.3, ge=0, description="Codec: weight of the spectra's distance against the wave's relative squared error."
    )

    def base(self, preset: Preset) -> Any:
        """The networks to begin with: random, or those of `init_from`. Raises PresetError, BaseError."""
        if preset.base not in BLUEPRINTS:
            raise PresetError(f"there is no blueprint of a base '{preset.base}'", f"there are: {', '.join(BLUEPRINTS)}")
        quiet_libraries()
        base = BLUEPRINTS[preset.base](preset.seed)
        if strange := next((name for name in self.fresh if name not in PARTS[preset.base]), None):
            known = ", ".join(PARTS[preset.base])
            raise PresetError(f"method.fresh: '{preset.base}' has no network '{strange}'", f"it has {known}")
        if self.init_from is not None:
            self._take(load_base(self.init_from, dtype=torch.float32, device="cpu"), base, PARTS[preset.base])
        return base

    def _take(self, trained: Any, base: Any, parts: tuple[str, ...]) -> None:
        """Copies the weights of the parts that are not `fresh`."""
        if trained.family != base.family:
            raise PresetError(
                f"method.init_from: '{self.init_from}' is no {base.family}", f"give the folder of a {base.family}"
            )
        for part in parts:
            if part in self.fresh:
                continue
            try:
                _part(base, part).load_state_dict(_part(trained, part).state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
                raise BaseError(f"the {part} of '{self.init_from}' is built otherwise: {reason}") from None
            if part == "vae":
                base.pipe.vae.register_to_config(scaling_factor=trained.pipe.vae.config.scaling_factor)

    def task(self, base: Any, preset: Preset, run: Run) -> MusicTask:
        if preset.data.source != "melodies":
            raise PresetError("method 'scratch-music' draws its own data", "set data.source=melodies")
        tasks = TASKS[preset.base]
        if self.train not in tasks:
            raise PresetError(f"method.train: '{preset.base}' has no {self.train}", f"it has {' and '.join(tasks)}")
        if strange := next((name for name in preset.data.modes if name not in EVERY), None):
            raise PresetError(f"data.modes: there is no mode '{strange}'", nearest(strange, EVERY))
        if self.basses and preset.data.modes and WESTERN.keys().isdisjoint(preset.data.modes):
            hint = f"add {' or '.join(WESTERN)}, or set method.basses=0"
            raise PresetError("method.basses: a bass plays none of data.modes", hint)
        return tasks[self.train](self, base, preset, run)


def _part(base: Any, name: str) -> Any:
    """A network of a base by name: of a MusicGen's whole, or of a pipeline."""
    return base.modules[name] if name in base.modules else getattr(base.denoiser, name)
