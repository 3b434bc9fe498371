"""The delay pattern of MusicGen (Copet et al. 2023, arXiv 2306.05284, section 2.2): codebook k lags k steps behind.

The network reads S = F + K - 1 steps and at each predicts the next token of every codebook: at step t the token of
codebook k is that of frame t - k. All F frames of all K codebooks are predicted; where a codebook has no frame (its
first k and last K - 1 - k steps) it reads `pad` and its prediction does not count.
B batch, K codebooks, F frames, S steps, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def delayed(codes: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels), each (B, K, S), of codes (B, K, F): the input at a step is the label of the step before."""
    batch, codebooks, frames = codes.shape
    labels = codes.new_full((batch, codebooks, frames + codebooks - 1), IGNORED)
    for k in range(codebooks):
        labels[:, k, k : k + frames] = codes[:, k]
    inputs = F.pad(labels[..., :-1], (1, 0), value=IGNORED)
    return inputs.masked_fill(inputs == IGNORED, pad), labels


def token_losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each sample in nats, (B,), over frames and codebooks; logits (B, K, S, V).

    `weights`: how much each of the codes counts, (B, K, F), before they were delayed. Default: all the same.
    """
    losses = F.cross_entropy(logits.flatten(0, 2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counts = (labels != IGNORED).float()
    if weights is not None:
        counts = counts * delayed(weights.to(counts), 0)[1]
    return (losses.view(labels.shape) * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)
