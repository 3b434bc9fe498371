"""Encoded clips as a batch, with RDTF's dual mask: which frames are given, and which count in the loss.

n frames of a clip, F frames of the batch, B clips, Z latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from studio.bases.sticker_video.conditioning import ClipCondition, clip_noise
from studio.bases.sticker_video.family import StickerVideo
from studio.data.clip_pool import EncodedClip


def batch_of(clips: Sequence[EncodedClip], given: Sequence[Sequence[bool]]) -> tuple[Tensor, ClipCondition]:
    """Clean latents (B, Z, F, h, w), zero in padding, and what the network is told.

    `given` says of each frame of a clip whether it is; where it says nothing of a clip, none is.
    """
    most = max(clip.count for clip in clips)
    clean = torch.zeros(len(clips), clips[0].latents.shape[0], most, *clips[0].latents.shape[2:])
    is_given = torch.zeros(len(clips), most, dtype=torch.bool)
    valid = torch.zeros(len(clips), most, dtype=torch.bool)
    for row, (clip, known) in enumerate(zip(clips, given, strict=True)):
        clean[row, :, : clip.count] = clip.latents
        valid[row, : clip.count] = True
        is_given[row, : len(known)] = torch.tensor(known, dtype=torch.bool)
    fps = torch.tensor([clip.fps for clip in clips])
    loop = torch.tensor([clip.loop and clip.count > 1 for clip in clips])
    return clean, ClipCondition(clean, is_given, valid, fps, loop)


def denoising_losses(
    base: StickerVideo,
    clips: Sequence[EncodedClip],
    given: Sequence[Sequence[bool]],
    captions: Sequence[str],
    generators: Sequence[torch.Generator],
    paper_compat: bool = False,
    shift: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each clip and the time it was noised to, (B,) each; a clip's noise is a function of its generator.

    `shift` moves times towards noise.
    """
    objective, device = base.objective, base.device
    clean, condition = batch_of(clips, given)
    clean = clean.to(device)
    times = torch.stack([objective.draw_time(g, shift) for g in generators])
    # Noise frame by frame, so that a clip's own frames get the same however far it is padded.
    frames, shape = clean.shape[2], (clean.shape[1], *clean.shape[3:])
    noises = [clip_noise(frames, shape, base.pipe.config.noise_share, g) for g in generators]
    noise = torch.stack(noises).transpose(1, 2).to(device)
    side = clean.shape[-1] * base.latent_factor
    told = base.encode_prompts(captions, (side, side)) | condition.tensors()
    noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
    error = base.predict(noisy, objective.network_time(times), told).float() - target
    valid, known = condition.valid.to(device), condition.is_given.to(device)
    return masked_loss(error.square(), valid, known, paper_compat=paper_compat), times


def masked_loss(
    squared: Tensor, valid: Tensor, given: Tensor, given_weight: float = 0.0, paper_compat: bool = False
) -> Tensor:
    """The loss of each clip, (B,), from squared errors (B, Z, F, h, w) and masks (B, F) of real and of given frames.

    Each clip is the mean over its own frames, those that are given counting `given_weight`. With `paper_compat`, as
    the published code has it: given frames count in full, and all clips are divided by F, so short ones weigh less.
    Padding may hold NaN.
    """
    by_frame = squared.masked_fill(~valid[:, None, :, None, None], 0).mean((1, 3, 4))
    if paper_compat:
        return by_frame.sum(1) / valid.shape[1]
    weight = valid.float() * torch.where(given, given_weight, 1.0)
    return (by_frame * weight).sum(1) / weight.sum(1).clamp(min=1e-12)
