"""Comparing sounds by their spectra at several resolutions (Yamamoto et al. 2020, arXiv 1910.11480, section 2.2).

B batch, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOWS = (128, 256, 512, 1024, 2048)  # samples
FLOOR = 1e-2  # magnitudes below it count as silence


def spectral_distance(sound: Tensor, truth: Tensor) -> Tensor:
    """Of each pair (B, T): mean difference of log magnitudes + spectral convergence, averaged over windows; (B,)."""
    total = sound.new_zeros(len(sound))
    for window in WINDOWS:
        said, meant = magnitudes(sound, window), magnitudes(truth, window)
        logs = ((said + FLOOR).log() - (meant + FLOOR).log()).abs().mean((1, 2))
        error = (said - meant).square().sum((1, 2)).add(1e-8).sqrt()
        total = total + logs + error / meant.square().sum((1, 2)).add(1e-2).sqrt()
    return total / len(WINDOWS)


def magnitudes(sound: Tensor, window: int) -> Tensor:
    """Short-time spectra (B, bins, frames) of (B, T) with a Hann window; a full-scale sine is about one."""
    shape = torch.hann_window(window, device=sound.device)
    found = torch.stft(sound, window, window // 4, window=shape, center=True, pad_mode="constant", return_complex=True)
    return (found.real.square() + found.imag.square() + 1e-10).sqrt() * (4 / window)
