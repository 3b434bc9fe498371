"""A MusicGen from nothing: the codec on waves, then the decoder together with the text encoder on its codes.

The codec trains as a plain autoencoder first: quantised from the start it fell silent.
B batch, C channels, T samples, K codebooks, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studio.base import Request
from studio.bases.musicgen import MusicGen
from studio.data.melodies.modes import EVERY, TRADITIONS
from studio.data.melodies.source import score_of
from studio.data.sounds import Sound
from studio.errors import PresetError
from studio.keyed import numpy_generator, torch_generator
from studio.music.codebooks import Codebooks
from studio.music.emphasis import emphasis
from studio.music.listening import save_sample
from studio.music.spectra import spectral_distance
from studio.preset import Preset
from studio.run import Event, Run
from trainers.scratch_music.pieces import MusicTask

CODEBOOKS = "codebooks.safetensors"
PIECE_SECONDS = 4.0  # of what the codec's crops are taken from
FIRST_FRAMES = 64  # crops that codebooks begin with
VALIDATION_PIECES = 16


class CodecTask(MusicTask):
    """Reconstruction, later through codes: the wave's squared error relative to its power + the spectra's distance.

    Absolute errors in place of squared ones left a trial silent: at first only the loud fundamental can be learned.
    """

    networks = ("audio_encoder",)
    every_mode = EVERY
    piece_seconds = PIECE_SECONDS

    def __init__(self, method: Any, base: MusicGen, preset: Preset, run: Run) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise PresetError("a codec trains in one process: its codebooks are not shared", "start one process")
        super().__init__(method, base, preset, run)
        self.codec = self.modules["audio_encoder"]
        self.codebooks = Codebooks(self.codec)

    # -- the loop ------------------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        self.codebooks.load(folder / CODEBOOKS)

    def reselect(self, step: int) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Codes begin when the plain autoencoder has had its share of the steps."""
        if not self.codebooks.begun and step >= self.method.unquantised * self.preset.steps:
            with torch.no_grad():
                frames = self.codec.encoder(self._crops(step, -1, range(FIRST_FRAMES)))
            generator = torch_generator("codebooks", self.preset.seed, step)
            self.codebooks.begin(frames.transpose(1, 2).flatten(0, 1), generator)
        return {}

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        return self._loss(self._crops(step, micro, slots), learn=True)

    def _crops(self, step: int, micro: int, slots: range) -> Tensor:
        """Waves (B, 1, T) out of the pool, somewhat louder or softer than they are."""
        pieces, _ = self.pool.batch(step, micro, slots)
        length = min(round(self.preset.data.seconds * self.base.sample_rate_hz), pieces.shape[-1])
        crops = []
        for piece, slot in zip(pieces, slots, strict=True):
            rng = numpy_generator("crop", self.preset.seed, step, micro, slot)
            first = int(rng.integers(piece.shape[-1] - length + 1))
            crops.append(piece[:, first : first + length] * 10 ** (float(rng.uniform(-9, 2)) / 20))
        return torch.stack(crops).clamp(-1, 1).to(self.base.device)

    def _loss(self, waves: Tensor, learn: bool) -> Tensor:
        frames = self.codec.encoder(waves)
        commitment = frames.new_zeros(len(frames))
        if self.codebooks.begun:
            frames, commitment = self.codebooks.quantise(frames, learn)
        heard = self.codec.decoder(frames).float()[..., : waves.shape[-1]]
        distance = spectral_distance(heard[:, 0], waves[:, 0])
        error = (heard - waves).square().mean((1, 2)) / waves.square().mean((1, 2)).clamp_min(1e-4)
        return error + self.method.spectral_weight * distance + self.method.commitment * commitment

    def penalise(self, step: int) -> None:
        if self.codebooks.begun:
            self.codebooks.update(step, torch_generator("restart", self.preset.seed, step))

    # -- what it shows -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss on pieces whose combination of instrument and mode training never has."""
        waves = torch.stack([wave for wave, _ in self._held_out(VALIDATION_PIECES)]).to(self.base.device)
        return float(torch.cat([self._loss(wave[None], learn=False) for wave in waves]).mean())

    @torch.no_grad()
    def draw_samples(self, step: int) -> Iterator[Event]:
        """Each sample is a piece, a pause, and the same through the codec."""
        for column, (wave, caption) in enumerate(self._held_out(2)):
            frames = self.codec.encoder(wave[None].to(self.base.device))
            if self.codebooks.begun:
                frames, _ = self.codebooks.quantise(frames, learn=False)
            heard = self.codec.decoder(frames).float().cpu()[0]
            pause = torch.zeros(1, self.base.sample_rate_hz // 2)
            sound = Sound(torch.cat([wave, pause, heard], 1), self.base.sample_rate_hz)
            yield save_sample(self.run, sound, step, column, f"{caption}, then the same through the codec", column)

    def _write(self, folder: Path) -> None:
        save_musicgen(self.base, folder)

    def save(self, folder: Path, step: int) -> Path:
        if folder != self.run.folder:  # a checkpoint, not the end
            folder.mkdir(parents=True, exist_ok=True)
            self.codebooks.save(folder / CODEBOOKS)
        return super().save(folder, step)


class DecoderTask(MusicTask):
    """Cross-entropy of the codes of pieces under their captions, with the text encoder trained along.

    A batch is pieces' openings of one length: only before the first notes have sounded are the words needed to know the
    instrument and the mode, and of whole pieces that is too small a share to learn from.
    """

    networks = ("text_encoder", "enc_to_dec_proj", "decoder")

    def __init__(self, method: Any, base: MusicGen, preset: Preset, run: Run) -> None:
        self.piece_seconds = preset.data.seconds
        if self.piece_seconds > base.longest_seconds:
            raise PresetError(
                f"data.seconds: '{preset.base}' can hear {base.longest_seconds:.1f} s at once",
                f"set data.seconds={int(base.longest_seconds)} or less",
            )
        super().__init__(method, base, preset, run)

    def _encoder(self) -> Any:
        return self.base.denoiser.audio_encoder

    def _row(self, waves: Tensor) -> Tensor:
        return self.base.encode_sounds(waves).short()

    def _write(self, folder: Path) -> None:
        save_musicgen(self.base, folder)

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        codes, captions = self.pool.batch(step, micro, slots)
        shares = self.method.openings
        share = shares[int(numpy_generator("opening", self.preset.seed, step, micro).integers(len(shares)))]
        codes = codes[..., : max(1, round(share * codes.shape[-1]))]
        dropout = self.preset.data.caption_dropout
        keys = [("caption", self.preset.seed, step, micro, slot) for slot in slots]
        told = [
            "" if float(torch.rand((), generator=torch_generator(*k))) < dropout else c for k, c in zip(keys, captions)
        ]
        weights = self._weights(self.pool.keys(step, micro, slots), codes)
        return self.base.losses(codes.long(), self.base.encode_prompts(told), weights)

    def _weights(self, keys: list[tuple[object, ...]], codes: Tensor) -> Tensor:
        """How much each of the codes (B, K, F) of the pieces of these keys counts."""
        shape = codes.shape[1], codes.shape[2]
        if self.preset.note_beginnings == 1:  # the pieces' scores are not needed
            return emphasis(shape, (), self.preset).expand(len(keys), *shape)
        return torch.stack([emphasis(shape, self._beginnings(key), self.preset) for key in keys])

    def _beginnings(self, key: tuple[object, ...]) -> list[int]:
        """The frames in which notes of a piece begin."""
        score = score_of(
            key,
            self.piece_seconds,
            TRADITIONS,
            modes=self.modes,
            intonation=self.preset.data.intonation,
            fields=self._bass(key),
        )
        return [int(note.start * self.base.frame_rate_hz) for note in score.notes]

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Cross-entropy in nats per code on combinations that training never has."""
        self._train_mode(False)
        pieces = self._held_out(VALIDATION_PIECES)
        codes = self._row(torch.stack([wave for wave, _ in pieces])).long()
        value = self.base.losses(codes, self.base.encode_prompts([caption for _, caption in pieces])).mean()
        self._train_mode(True)
        return float(value)

    def draw_samples(self, step: int) -> Iterator[Event]:
        self._train_mode(False)
        for column, prompt in enumerate(self.preset.sample_prompts):
            sound = self.base.generate(Request([prompt], [column], seconds=self.preset.sample_seconds))[0]
            yield save_sample(self.run, sound, step, column, prompt, column)
        self._train_mode(True)


def save_musicgen(base: MusicGen, folder: Path) -> None:
    """Writes a folder that transformers loads, in fp16, and leaves the networks as they were."""
    network = base.denoiser
    own = {key: value.clone() for key, value in network.state_dict().items()}
    network.half()
    base.pipe.save_pretrained(folder)
    network.float().load_state_dict(own)
