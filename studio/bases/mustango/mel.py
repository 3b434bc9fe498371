"""Sound as a mel spectrogram, and back without a vocoder, by running phases (Beauregard et al. 2015).

Slaney's mel scale, or HTK's, and filters of equal area; natural logarithms of magnitudes, from 1e-5 on. C channels,
T samples, L frames, M bands, K = fft / 2 + 1 bins.
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
AROUND = 2  # bins on either side of a peak that tell its frequency
SAME_TONE = 1.5  # bins that a tone moves in a frame at most


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
    def heard(self, mel: Tensor) -> Tensor:
        """Waves (B, L hop) of log mel spectrograms (B, 1, L, M). Deterministic.

        Phases run, then one round of Griffin and Lim (1984). More of them come nearer to the magnitudes by letting bins
        of one tone beat, which is heard as onsets where none are.
        """
        wanted = self._magnitudes(mel[:, 0].float().exp()).transpose(1, 2)
        wanted = F.pad(wanted, (0, 1), mode="replicate")  # a centred transform has one frame more
        length = mel.shape[2] * self.hop
        rebuilt = self._transform(self._invert(torch.polar(wanted, self._running_phases(wanted)), length))
        return self._invert(torch.polar(wanted, rebuilt.angle()), length)

    def _running_phases(self, magnitudes: Tensor) -> Tensor:
        """Phases (B, K, L) for magnitudes (B, K, L), as of tones that go on from frame to frame.

        Single pass spectrogram inversion (Beauregard, Harish and Wyse 2015): a bin turns with the nearest peak. Whose
        frequency is the mean of the bins around it, and between two frames that of both: a parabola through three bins,
        as theirs, is for lobes of the window, which bands have blurred.
        """
        loud = magnitudes.transpose(1, 2)
        bins = torch.arange(loud.shape[2], device=loud.device).expand_as(loud)
        near = F.pad(loud, (AROUND, AROUND)).unfold(2, 2 * AROUND + 1, 1)
        offsets = torch.arange(-AROUND, AROUND + 1, device=loud.device)
        centres = bins + (near * offsets).sum(-1) / near.sum(-1).clamp(min=1e-12)
        peaks = _nearest_peaks(loud)
        tones = centres.gather(2, peaks)
        before = torch.cat([tones[:, :1], tones[:, :-1]], 1).gather(2, peaks)
        tones = torch.where((tones - before).abs() < SAME_TONE, (tones + before) / 2, tones)
        turned = 2 * torch.pi * self.hop / self.fft * tones + torch.pi * ((bins - peaks) % 2)
        phases = [torch.zeros_like(loud[:, 0])]
        for own, turn in zip(peaks.unbind(1), turned.unbind(1), strict=True):
            phases.append((phases[-1].gather(1, own) + turn) % (2 * torch.pi))
        return torch.stack(phases[1:], 2)

    def _magnitudes(self, bands: Tensor) -> Tensor:
        """Magnitudes (B, L, fft / 2 + 1), none negative, whose bands are nearest to these (B, L, M).

        By multiplicative updates (Lee and Seung 2001): the least squares alone, cut at 0, blur a pitch.
        """
        filters = self._filters(bands.device)
        found = (bands @ torch.linalg.pinv(filters)).clamp(min=0) + 1e-3 * bands.mean((1, 2), keepdim=True)
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


def _nearest_peaks(loud: Tensor) -> Tensor:
    """The bin of the peak nearest to each bin of (B, L, K); of a frame without one, the bins themselves."""
    size = loud.shape[2]
    bins = torch.arange(size, device=loud.device).expand_as(loud)
    edged = F.pad(loud, (1, 1), value=torch.inf)
    peak = (loud > edged[..., :-2]) & (loud >= edged[..., 2:])
    below = torch.where(peak, bins, -size).cummax(2).values
    above = torch.where(peak, bins, 2 * size).flip(2).cummin(2).values.flip(2)
    found = torch.where(bins - below <= above - bins, below, above)
    return torch.where((found < 0) | (found >= size), bins, found)


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
