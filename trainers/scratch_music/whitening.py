"""Latents of even spread, folded into the convolutions of width 1 that an autoencoder has around them.

What a pitch is made of may lie in latents of a twentieth of the variance of others: noise hides these first, and a
denoiser's squared error hardly counts them. Z latent channels, B batch, h, w places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FLOOR = 0.1  # of variance: directions that hold nothing stay faint


@contextmanager
def whitened(vae: Any, latents: Tensor) -> Iterator[None]:
    """Within, latents of an `AutoencoderKL` are ZCA-whitened and decode to the same (Bell and Sejnowski 1997).

    `latents` (B, Z, h, w) are means of its distributions, unscaled. Within, `scaling_factor` is 1.
    """
    kept = {name: value.clone() for name, value in vae.state_dict().items() if "quant_conv" in name}
    scale = vae.config.scaling_factor
    try:
        _fold(vae, latents)
        vae.register_to_config(scaling_factor=1.0)
        yield
    finally:
        vae.load_state_dict(kept, strict=False)
        vae.register_to_config(scaling_factor=scale)


@torch.no_grad()
def _fold(vae: Any, latents: Tensor) -> None:
    rows = latents.double().transpose(0, 1).flatten(1)  # (Z, places)
    mean, covariance = rows.mean(1), torch.cov(rows)
    variances, directions = torch.linalg.eigh(covariance)
    spread = (variances + FLOOR * variances.mean()).sqrt()
    white, back = (directions * factor @ directions.T for factor in (1 / spread, spread))
    into, out = vae.quant_conv, vae.post_quant_conv
    means, of_mean = into.weight[: len(mean), :, 0, 0].double(), into.bias[: len(mean)].double()
    into.weight[: len(mean), :, 0, 0] = (white @ means).float()
    into.bias[: len(mean)] = (white @ (of_mean - mean)).float()
    into.bias[len(mean) :] += 2 * white.diagonal().log().float()  # of log variances, as far as they are of one channel
    taken = out.weight[:, :, 0, 0].double()
    out.weight[:, :, 0, 0] = (taken @ back).float()
    out.bias += (taken @ mean).float()
