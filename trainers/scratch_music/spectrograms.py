"""A small Mustango from nothing: the autoencoder on spectrograms, then the denoiser with all that tells it something.

Pieces are told as their captions, their beats and, of those in a key, the chord of the tonic.
B batch, T samples, L frames, M bands, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.base import Request
from studio.bases.halves import save_with_halves
from studio.bases.mustango.family import Mustango, without
from studio.bases.mustango.mel import levelled
from studio.data.melodies.modes import EVERY
from studio.data.melodies.pool import MelodyPool
from studio.data.melodies.source import Melody
from studio.data.sounds import Sound
from studio.keyed import torch_generator
from studio.music.listening import save_sample
from studio.music.score import read_score
from studio.preset import Preset
from studio.run import Event, Run
from trainers.scratch_music.pieces import MusicTask
from trainers.scratch_music.whitening import whitened

VALIDATION_PIECES = 16
KL_WEIGHT = 1e-4
KINDRED = 8  # pieces whose mean stands for what their words mean
UNSIGNED = 0.5  # share of pieces without their beats, and without their chords: else words need not tell tempo and key
BORNE = 0.5  # noise that latents must bear, up to this share of their spread: what is faint in them no denoiser finds
QUIET = 0.1  # what the quietest places count beside 1 of the loudest
LOUDNESS = 3.0  # the spread of log magnitudes, which brings their errors to about one


class SpectrogramTask(MusicTask):
    """What both stages share: pieces of the base's own length, and a pipeline folder."""

    def __init__(self, method: Any, base: Mustango, preset: Preset, run: Run) -> None:
        self.piece_seconds = base.longest_seconds
        super().__init__(method, base, preset, run)

    def _networks(self) -> dict[str, Any]:
        return {name: self.base.modules[name] for name in self.networks}

    def _told(self, piece: Melody) -> str:
        return piece.told

    def _write(self, folder: Path) -> None:
        save_with_halves(self.base.pipe, folder)


class AutoencoderTask(SpectrogramTask):
    """Reconstruction of log spectrograms, through noise: squared error + half the absolute, where loud most, + KL."""

    networks = ("vae",)
    every_mode = EVERY

    def _row(self, waves: Tensor) -> Tensor:
        return self.base.pipe.spectrogram.of(levelled(waves[:, 0]))

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        mels, _ = self.pool.batch(step, micro, slots)
        keys = [("latents", self.preset.seed, step, micro, slot) for slot in slots]
        return self._loss(mels.to(self.base.device), keys)

    def _loss(self, mels: Tensor, keys: Sequence[tuple[object, ...]]) -> Tensor:
        vae = self.base.pipe.vae
        latents = vae.encode(mels).latent_dist
        generators = [torch_generator(*key) for key in keys]
        noise = torch.stack([torch.randn(latents.mean.shape[1:], generator=g) for g in generators]).to(mels)
        share = torch.stack([BORNE * torch.rand(1, 1, 1, generator=g) for g in generators]).to(mels)
        spread = (latents.var + (share * latents.mean.std((1, 2, 3), keepdim=True)) ** 2).sqrt()
        heard = vae.decode(latents.mean + spread * noise).sample.float()
        error = (heard - mels) / LOUDNESS
        kl = 0.5 * (latents.mean.float() ** 2 + latents.var.float() - 1 - latents.logvar.float())
        lost = _loudness(mels) * (error**2 + 0.5 * error.abs())
        return lost.mean((1, 2, 3)) + KL_WEIGHT * kl.mean((1, 2, 3))

    def _held_out_mels(self) -> Tensor:
        return self._row(torch.stack([wave for wave, _ in self._held_out(VALIDATION_PIECES)])).to(self.base.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean absolute error in nats of log magnitudes, on combinations that training never has."""
        mels, vae = self._held_out_mels(), self.base.pipe.vae
        return float((vae.decode(vae.encode(mels).latent_dist.mode()).sample - mels).abs().mean())

    @torch.no_grad()
    def draw_samples(self, step: int) -> Iterator[Event]:
        """Each sample is a piece as its spectrogram sounds, a pause, and the same through the autoencoder."""
        pipe = self.base.pipe
        for column, (wave, _) in enumerate(self._held_out(2)):
            mel = self._row(wave[None]).to(self.base.device)
            both = [pipe.heard(mel), torch.zeros(1, self.base.sample_rate_hz // 2)]
            both.append(pipe.heard(pipe.vae.decode(pipe.vae.encode(mel).latent_dist.mode()).sample))
            sound = Sound(torch.cat([part.cpu() for part in both], 1), self.base.sample_rate_hz)
            yield save_sample(self.run, sound, step, column, "a piece, then the same through the autoencoder", column)

    def save(self, folder: Path, step: int) -> Path:
        """With latents of even spread, as the denoiser wants them."""
        vae = self.base.pipe.vae
        with torch.no_grad():
            latents = vae.encode(self._held_out_mels()).latent_dist.mode()
        with whitened(vae, latents):
            return super().save(folder, step)


def _loudness(mels: Tensor) -> Tensor:
    """How much each place of log spectrograms (B, 1, L, M) counts, 1 in the mean: pitch is in the loud ones."""
    weights = QUIET + (0.5 * (mels - mels.amax((1, 2, 3), keepdim=True))).exp()
    return weights / weights.mean((1, 2, 3), keepdim=True)


class DenoiserTask(SpectrogramTask):
    """Denoising of pieces' latents, told words, beats and chords, whose encoders are trained along."""

    networks = ("unet", "text_encoder", "beat_encoder", "chord_encoder")

    def __init__(self, method: Any, base: Mustango, preset: Preset, run: Run) -> None:
        super().__init__(method, base, preset, run)
        size, source = -(-preset.data.pool // KINDRED), f"{self._source(base.pipe.vae)}|{KINDRED}"
        self.kinds = MelodyPool(self._kind, self._mean_row, size, 0, preset.seed, self.pool.cache, source)

    def prepare(self) -> Iterator[Event]:
        yield from super().prepare()
        if self.method.words_first:
            for done in self.kinds.fill():
                yield Event("progress", 0, {"what": "playing kinds of pieces", "done": done, "total": self.kinds.size})

    def _encoder(self) -> Any:
        return self.base.pipe.vae

    def _row(self, waves: Tensor) -> Tensor:
        return self.base.encode_sounds(waves)

    def _kind(self, key: tuple[object, ...]) -> tuple[Tensor, str]:
        """Waves (KINDRED, T) of pieces of the same fields, and the caption of one."""
        first = self._drawn(("kind", *key), self._is_stem(key))
        more = [
            self._drawn(("kind", *key, i), self._is_stem(key), fields=first.score.fields) for i in range(1, KINDRED)
        ]
        return torch.cat([piece.wave for piece in (first, *more)]), first.caption

    def _mean_row(self, waves: Tensor) -> Tensor:
        """Mean latents of kindred waves (B, KINDRED, T)."""
        return torch.stack([self._row(kindred[:, None]).mean(0) for kindred in waves])

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        first = step < self.method.words_first
        latents, prompts = (self.kinds if first else self.pool).batch(step, micro, slots)
        return self._loss(latents, prompts, [("sample", self.preset.seed, step, micro, slot) for slot in slots], first)

    def _loss(
        self, latents: Tensor, prompts: list[str], keys: Sequence[tuple[object, ...]], at_last: bool = False
    ) -> Tensor:
        """`at_last`: at the last time, where all is noise."""
        objective, pipe = self.base.objective, self.base.pipe
        generators = [torch_generator(*key) for key in keys]
        scores = [self._dropped(p, g) for p, g in zip(prompts, generators, strict=True)]
        times = torch.stack([objective.draw_time(g, self.method.timestep_shift) for g in generators])
        if at_last:
            times = torch.full_like(times, len(objective.alphas_cumprod) - 1)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(self.base.device)
        clean = latents.to(self.base.device)
        noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
        condition = pipe.encode_scores(scores)
        error = self.base.predict(noisy, objective.network_time(times), condition).float() - target
        loss = error.square().mean((1, 2, 3))
        if self.preset.min_snr_gamma:
            loss = loss * objective.min_snr_weight(times, self.preset.min_snr_gamma).to(error.device)
        return loss

    def _dropped(self, prompt: str, generator: torch.Generator) -> Any:
        """The score, all of it or its words left out with the preset's share, beats and chords each half the time."""
        share = self.preset.data.caption_dropout
        drawn = torch.rand(4, generator=generator) < torch.tensor([share, share, UNSIGNED, UNSIGNED])
        parts = ("text", "beats", "chords")
        score = read_score(prompt).within(0.0, self.piece_seconds)
        return without(score, *(part for part, drop in zip(parts, drawn[1:], strict=True) if drop or drawn[0]))

    @torch.no_grad()
    def validation_loss(self) -> float:
        pieces = self._held_out(VALIDATION_PIECES)
        latents = self._row(torch.stack([wave for wave, _ in pieces]))
        keys: list[tuple[object, ...]] = [("validation", i) for i in range(len(pieces))]
        return float(self._loss(latents, [prompt for _, prompt in pieces], keys).mean())

    def draw_samples(self, step: int) -> Iterator[Event]:
        self._train_mode(False)
        for column, prompt in enumerate(self.preset.sample_prompts):
            request = Request([prompt], [column], steps=self.preset.sample_steps, seconds=self.preset.sample_seconds)
            yield save_sample(self.run, self.base.generate(request)[0], step, column, prompt, column)
        self._train_mode(True)
