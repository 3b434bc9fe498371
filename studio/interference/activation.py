"""How strongly changes of a weight act on given inputs:  |D C^(1/2)|^2 = tr(D C D^T) = mean |D x|^2.

C is a sketch V diag(e) V^T + r (1 - V V^T) of the inputs' second moments; D = U V_d is low-rank. For a convolution
whose sketch is over channels only, C acts at each place of the kernel.
K changes, R rank, I inputs of the sketch, P places, q width of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from studio.deltas import LowRank
from studio.inputs import Sketch


def energies(deltas: Sequence[LowRank], sketches: Sequence[Sketch]) -> Tensor:
    """(sketches, K) fp64: the mean energy that each change adds on inputs that are like each sketch."""
    basis = torch.cat([one.basis * (one.energies - one.residual).clamp(min=0).sqrt() for one in sketches], 1)
    widths = [one.basis.shape[1] for one in sketches]
    found = torch.zeros(len(sketches), len(deltas), dtype=torch.float64)
    for number, delta in enumerate(deltas):
        gram = (delta.up.T @ delta.up).double()
        places = delta.width // basis.shape[0]
        rows = delta.down.reshape(delta.rank, basis.shape[0], places).permute(2, 0, 1)  # (P, R, I)
        seen = (rows.to(basis.dtype) @ basis).double()
        per_direction = (seen * (gram @ seen)).sum((0, 1))
        everywhere = float((gram * (delta.down @ delta.down.T).double()).sum())
        for place, (part, one) in enumerate(zip(per_direction.split(widths), sketches, strict=True)):
            found[place, number] = part.sum() + float(one.residual) * everywhere
    return found


def weight_energy(weight: Tensor, sketch: Sketch) -> float:
    """tr(W C W^T): what the layer itself gives on such inputs."""
    rows = weight.float().flatten(1)
    rows = rows.reshape(rows.shape[0], sketch.basis.shape[0], -1).permute(2, 0, 1)
    seen = (rows @ sketch.basis).double().square().sum((0, 1))
    part = (seen * (sketch.energies - sketch.residual).clamp(min=0).double()).sum()
    return float(part + float(sketch.residual) * rows.double().square().sum())
