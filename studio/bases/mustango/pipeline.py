"""Sampling of music: words, beats and chords into latents of a mel spectrogram, and those into a wave.

`pipe("a slow waltz | beats: 90 bpm 3/4 | chords: Am Dm E7 Am")`: `studio/music/score.py` says what a prompt may tell.
Saved and loaded with safetensors like any pipeline of diffusers; `vocoder` and the predictors may be absent.
B batch, Z latent channels, t latent steps in time, f in frequency, L frames of the spectrogram, M its bands.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from studio.bases.musicgen import LONGEST_TEXT
from studio.bases.mustango.encoders import BeatEncoder, ChordEncoder  # noqa: F401  diffusers loads what is imported
from studio.bases.mustango.mel import Mel
from studio.bases.mustango.network import MuNet  # noqa: F401
from studio.music.score import Score, read_score

STEPS, GUIDANCE = 100, 3.0  # the authors' own

Condition = dict[str, Tensor]


@dataclass
class MustangoOutput(BaseOutput):
    """`audios`: waves (B, T); or mel spectrograms (B, 1, L, M); or latents (B, Z, t, f)."""

    audios: Tensor


class MustangoPipeline(DiffusionPipeline):
    """`mel` holds the fields of a Mel; `clip_frames` is how many of its frames the networks were trained on.

    `steps` is how many sampling steps are taken where none are asked for. `lower_case`: texts are read so, where the
    tokenizer has no capitals.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae->vocoder"
    _callback_tensor_inputs = ("latents",)
    _optional_components = ["vocoder", "beat_predictor", "beat_tokenizer", "chord_predictor", "chord_tokenizer"]  # noqa: RUF012  as diffusers reads it

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        beat_encoder: Any,
        chord_encoder: Any,
        scheduler: Any,
        vocoder: Any = None,
        beat_predictor: Any = None,
        beat_tokenizer: Any = None,
        chord_predictor: Any = None,
        chord_tokenizer: Any = None,
        mel: dict[str, Any] | None = None,
        clip_frames: int = 1024,
        steps: int = STEPS,
        lower_case: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            beat_encoder=beat_encoder,
            chord_encoder=chord_encoder,
            scheduler=scheduler,
            vocoder=vocoder,
            beat_predictor=beat_predictor,
            beat_tokenizer=beat_tokenizer,
            chord_predictor=chord_predictor,
            chord_tokenizer=chord_tokenizer,
        )
        self.register_to_config(mel=mel or {}, clip_frames=clip_frames, steps=steps, lower_case=lower_case)
        self.spectrogram = Mel(**(mel or {}))

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def latent_factor(self) -> int:
        """Frames of the spectrogram per latent step, and bands."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def frames_multiple(self) -> int:
        """A clip has a multiple of this many frames: a step of the UNet's coarsest level."""
        return self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def clip_seconds(self) -> float:
        """The length of the clips that the networks were trained on."""
        return self.config.clip_frames / self.spectrogram.frames_per_second

    def frames_in(self, seconds: float) -> int:
        """The frames of a clip that has at least this length."""
        frames = math.ceil(round(seconds * self.spectrogram.frames_per_second, 6))
        return -(-frames // self.frames_multiple) * self.frames_multiple

    # -- sounds --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_waves(self, waves: Tensor) -> Tensor:
        """Latents (B, Z, t, f) of waves (B, T), padded with silence to whole steps. Deterministic."""
        mel = self.spectrogram
        samples = self.frames_in(waves.shape[-1] / mel.sample_rate_hz) * mel.hop
        waves = torch.nn.functional.pad(waves.to(self.vae.device, torch.float32), (0, samples - waves.shape[-1]))
        found = self.vae.encode(mel.of(waves).to(self.vae.dtype)).latent_dist.mode()
        return found * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_mel(self, latents: Tensor) -> Tensor:
        """(B, 1, L, M)."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    @torch.no_grad()
    def heard(self, mel: Tensor) -> Tensor:
        """Waves (B, T) of spectrograms (B, 1, L, M), by the vocoder if there is one."""
        if self.vocoder is None:
            return self.spectrogram.heard(mel)
        return self.vocoder(mel[:, 0].to(self.vocoder.dtype)).float()

    # -- what is told --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, score: Score) -> Score:
        """The score with what it does not tell: guessed from the words where there are predictors, else nothing."""
        if self.beat_predictor is None and self.chord_predictor is None:
            return score
        from studio.bases.mustango.predictors import predict_beats, predict_chords

        bar = max((count for _, count in score.beats or ()), default=4)
        if score.beats is None and self.beat_predictor is not None and score.text:
            longest = self.beat_encoder.config["length"]
            beats, bar = predict_beats(self.beat_predictor, self.beat_tokenizer, score.text, longest)
            score = replace(score, beats=beats)
        if score.chords is None and self.chord_predictor is not None and score.text:
            asked = (self.chord_predictor, self.chord_tokenizer, score.text, score.beats or (), bar)
            score = replace(score, chords=predict_chords(*asked))
        return score

    def encode_text(self, texts: Sequence[str]) -> Condition:
        """`text` (B, L, D) and `mask` (B, L)."""
        longest = min(LONGEST_TEXT, self.tokenizer.model_max_length)
        texts = [text.lower() if self.config.lower_case else text for text in texts]
        told = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        told = told.to(self.text_encoder.device)
        text = self.text_encoder(input_ids=told.input_ids, attention_mask=told.attention_mask)[0]
        return {"text": text, "mask": told.attention_mask}

    def encode_signs(self, scores: Sequence[Score]) -> Condition:
        """Of parts of scores `beats` (B, I) and `chords` (B, J, 3), ids, `beat_seconds` (B, I), `chord_seconds` (B, J).

        I beats and J chords are what the encoders take. Raises RequestError for beats or chords that they do not know.
        """
        beats = [self.beat_encoder.ids_of(score.beats or ()) for score in scores]
        chords = [self.chord_encoder.ids_of(score.timed_chords) for score in scores]
        return {
            "beats": torch.stack([ids for ids, _ in beats]),
            "beat_seconds": torch.stack([seconds for _, seconds in beats]),
            "chords": torch.stack([ids for ids, _ in chords]),
            "chord_seconds": torch.stack([seconds for _, seconds in chords]),
        }

    def encode_scores(self, scores: Sequence[Score]) -> Condition:
        """All that the network is told of parts of scores."""
        return self.encode_text([score.text for score in scores]) | self.encode_signs(scores)

    def predict(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's output for noisy latents (B, Z, t, f) at times (B,)."""
        device, dtype = self.unet.device, self.unet.dtype
        told = {name: value.to(device) for name, value in condition.items()}
        beats = self.beat_encoder(told["beats"], told["beat_seconds"])
        chords = self.chord_encoder(told["chords"], told["chord_seconds"])
        return self.unet(
            noisy.to(device, dtype),
            time.to(device),
            told["text"].to(dtype),
            told["mask"],
            beats.to(dtype),
            told["beats"] != 0,
            chords.to(dtype),
            told["chords"][..., 0] != 0,
        )

    # -- call ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        seconds: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE,
        negative_prompt: str = "",
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "wave",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> MustangoOutput | tuple[Tensor]:
        """Plays a clip for each prompt, all of one length. `output_type` is "wave", "mel" or "latent".

        A scale of 1 turns guidance off. Raises RequestError for beats or chords that make no sense.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seconds = self.clip_seconds if seconds is None else seconds
        scores = [self.complete(read_score(text).within(0.0, seconds)) for text in prompts]
        steps = num_inference_steps or self.config.steps
        guided = guidance_scale != 1.0
        if guided:  # the unguided half is told nothing of beats and chords
            scores = [Score(negative_prompt)] * len(prompts) + scores
        condition = self.encode_scores(scores)
        latents = self._noise(len(prompts), self.frames_in(seconds), generator)
        self.scheduler.set_timesteps(steps, device=latents.device)
        latents = latents * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=steps) as bar:
            for index, moment in enumerate(self.scheduler.timesteps):
                x = self.scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), moment)
                output = self.predict(x, moment.expand(len(x)), condition).to(latents.dtype)
                if guided:
                    without, told = output.chunk(2)
                    output = without + guidance_scale * (told - without)
                latents = self.scheduler.step(output, moment, latents, **options).prev_sample
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, index, moment, {"latents": latents}).get("latents", latents)
                bar.update()
        self.maybe_free_model_hooks()
        made = latents
        if output_type != "latent":
            made = self.decode_mel(latents)
        if output_type == "wave":
            made = self.heard(made)[:, : round(seconds * self.spectrogram.sample_rate_hz)]
        return MustangoOutput(audios=made) if return_dict else (made,)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def _noise(self, batch: int, frames: int, generator: Any) -> Tensor:
        factor = self.latent_factor
        shape = (batch, self.unet.config.in_channels, frames // factor, self.spectrogram.bands // factor)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
