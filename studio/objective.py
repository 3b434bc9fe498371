"""How data is noised and what the network predicts. Pure functions; B batch, the other axes are the data's.

`Diffusion` is the variance-preserving process x_t = a_t x_0 + s_t e of DDPM (Ho et al. 2020), predicting the noise
(epsilon), the data (sample) or the velocity v = a_t e - s_t x_0 (Salimans and Ho 2022, appendix D).
`FlowMatching` is the straight path x_t = (1 - t) x_0 + t e predicting e - x_0 (Liu et al. 2022; Esser et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times in (0, 1) moved towards noise, as Stable Diffusion 3 does for large pictures (equation 23)."""
    return shift * time / (1 + (shift - 1) * time)


class Objective(Protocol):
    def draw_time(self, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        """A random time, moved towards noise by `shift`, a 0-d tensor on the CPU."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def network_time(self, time: Tensor) -> Tensor:
        """What the network is told of the time, (B,)."""
        ...

    def min_snr_weight(self, time: Tensor, gamma: float) -> Tensor:
        """The factor on the squared error of the prediction that weights the error in x_0 by min(SNR, gamma), (B,).

        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", equation 7 and section 3.4.
        """
        ...


@dataclass(frozen=True)
class Diffusion:
    """`alphas_cumprod` (T,) is the scheduler's; `prediction_type` is "epsilon", "v_prediction" or "sample"."""

    alphas_cumprod: Tensor
    prediction_type: str

    def draw_time(self, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        count = len(self.alphas_cumprod)
        drawn = torch.randint(count, (), generator=generator)
        return (shifted((drawn.double() + 0.5) / count, shift) * count).long()

    def _scales(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a_squared = self.alphas_cumprod.double()[time.cpu()]
        return _per_sample(a_squared.sqrt(), like), _per_sample((1 - a_squared).sqrt(), like)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        a, s = self._scales(time, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        a, s = self._scales(time, clean)
        return a * noise - s * clean

    def network_time(self, time: Tensor) -> Tensor:
        return time

    def snr(self, time: Tensor) -> Tensor:
        a_squared = self.alphas_cumprod.double()[time.cpu()]
        return a_squared / (1 - a_squared).clamp(min=1e-12)

    def min_snr_weight(self, time: Tensor, gamma: float) -> Tensor:
        snr = self.snr(time)
        wanted = snr.clamp(max=gamma)
        # |dx_0|^2 = |de|^2 / SNR = |dv|^2 / (SNR + 1), so the same weight on x_0 reads differently for each.
        divisor = {"epsilon": snr.clamp(min=1e-12), "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return (wanted / divisor[self.prediction_type]).float()


@dataclass(frozen=True)
class FlowMatching:
    """Times in (0, 1), logit-normal as in Stable Diffusion 3, shifted towards noise by `shift`."""

    shift: float = 1.0
    train_timesteps: int = 1000

    def draw_time(self, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        return shifted(torch.sigmoid(torch.randn((), generator=generator)), self.shift * shift)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        t = _per_sample(time, clean)
        return (1 - t) * clean + t * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise - clean

    def network_time(self, time: Tensor) -> Tensor:
        return time * self.train_timesteps

    def min_snr_weight(self, time: Tensor, gamma: float) -> Tensor:
        t = time.double()
        snr = ((1 - t) / t.clamp(min=1e-6)) ** 2
        # dx_0 = -t dv for a fixed x_t, so |dx_0|^2 = t^2 |dv|^2.
        return (snr.clamp(max=gamma) * t**2).float()
