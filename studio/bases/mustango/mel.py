"""Sound as a mel spectrogram, and back by Griffin and Lim (1984), for bases that have no vocoder.

Slaney's mel scale, or HTK's, and filters of equal area; natural logarithms of magnitudes, from 1e-5 on. C channels,
T samples, L frames, M bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

QUIETEST = 1e-5
PEAK = 0.5  # of the waves that the published networks were trained on
UPDATES = 100  # towards magnitudes that have the bands
MOMENTUM = 0.99  # Perraudin et al. 2013, fast Griffin-Lim


@dataclass(frozen=True)
class Mel:
    """`fft` samples are looked at every `hop` samples. `scale`: "slaney", or "htk", whose low bands are narrower."""

    sample_rate_hz: int = 16000
    fft: int = 1024
    hop: int = 160
    bands: int = 64
    lowest_hz: float = 0.0
    highest_hz: float = 8000.0
    scale: str = "slaney"

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate_hz / self.hop

    def of(self, waves: Tensor) -> Tensor:
        """Log mel spectrograms (B, 1, L, M) of waves (B, T); L = T / hop, rounded down."""
        magnitudes = self._transform(waves).abs().transpose(1, 2)[:, : waves.shape[-1] // self.hop]
        return (magnitudes @ self._filters(waves.device)).clamp(min=QUIETEST).log()[:, None]

    @torch.no_grad()
    def heard(self, mel: Tensor, rounds: int = 64) -> Tensor:
        """Waves (B, L hop) of log mel spectrograms (B, 1, L, M), by Griffin-Lim. Deterministic."""
        wanted = self._magnitudes(mel[:, 0].float().exp()).transpose(1, 2)
        wanted = F.pad(wanted, (0, 1), mode="replicate")  # a centred transform has one frame more
        length = mel.shape[2] * self.hop
        phases = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0)).to(wanted) * (2 * torch.pi)
        guess, before = torch.polar(torch.ones_like(wanted), phases), torch.zeros((), device=mel.device)
        for _ in range(rounds):
            rebuilt = self._transform(self._invert(wanted * guess, length))
            guess = rebuilt - (MOMENTUM / (1 + MOMENTUM)) * before
            guess, before = guess / guess.abs().clamp(min=1e-12), rebuilt
        return self._invert(wanted * guess, length)

    def _magnitudes(self, bands: Tensor) -> Tensor:
        """Magnitudes (B, L, fft / 2 + 1), none negative, whose bands are nearest to these (B, L, M).

        By multiplicative updates (Lee and Seung 2001): the least squares alone, cut at 0, blur a pitch.
        """
        filters = self._filters(bands.device)
        found = (bands @ torch.linalg.pinv(filters)).clamp(min=0) + 1e-3 * bands.mean()
        towards, gram = bands @ filters.T, filters @ filters.T
        for _ in range(UPDATES):
            found = found * towards / (found @ gram + 1e-9)
        return found

    def _transform(self, waves: Tensor) -> Tensor:
        window = torch.hann_window(self.fft, device=waves.device)
        return torch.stft(waves.float(), self.fft, self.hop, window=window, center=True, return_complex=True)

    def _invert(self, spectrum: Tensor, length: int) -> Tensor:
        window = torch.hann_window(self.fft, device=spectrum.device)
        return torch.istft(spectrum, self.fft, self.hop, window=window, center=True, length=length)

    def _filters(self, device: torch.device) -> Tensor:
        return _filters(self).to(device)


@lru_cache(maxsize=8)
def _filters(mel: Mel) -> Tensor:
    """(fft / 2 + 1, M)."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        mel.fft // 2 + 1,
        mel.bands,
        mel.lowest_hz,
        mel.highest_hz,
        mel.sample_rate_hz,
        norm="slaney",
        mel_scale=mel.scale,
    )
    return torch.from_numpy(bank).float()


def levelled(waves: Tensor) -> Tensor:
    """Waves (B, T) without a constant part, at the peak that the networks know."""
    waves = waves - waves.mean(-1, keepdim=True)
    return waves * (PEAK / (waves.abs().amax(-1, keepdim=True) + 1e-8))
