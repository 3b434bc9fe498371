"""Learning the codebooks of an EnCodec: transformers' class holds and uses them, and has no way to learn them.

Residual vector quantisation (Defossez et al. 2022, arXiv 2210.13438): codebook k holds centres of what the books before
it have left over. Centres follow the running mean of what falls to them; one to which hardly anything falls starts
again beside another. Gradients pass straight through.
B batch, D width of a frame, F frames, N frames of a batch, V centres of a book.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DECAY = 0.98  # of the running means, per step
DEAD = 0.1  # a centre is dead with less than this share of the mean number of frames
RESTART_EVERY = 10  # steps
STRIDE = 0.25  # of the way from a centre to a frame, where a dead one starts again
ROUNDS = 12  # of k-means


class Codebooks:
    """The codebooks of one codec while they are learned. `begun` is False until they have been given centres."""

    def __init__(self, codec: Any) -> None:
        self.books = [layer.codebook for layer in codec.quantizer.layers]
        self._heard: list[list[Tensor]] = [[] for _ in self.books]

    @property
    def begun(self) -> bool:
        return bool(self.books[0].cluster_size.sum() > 0)

    def quantise(self, frames: Tensor, learn: bool = True) -> tuple[Tensor, Tensor]:
        """(frames as the codes say them, commitment loss (B,)) of frames (B, D, F).

        The commitment is the squared error of each book against what it was given, relative to the frames' power.
        """
        flat = frames.float().transpose(1, 2)  # (B, F, D)
        power = flat.detach().square().mean().clamp_min(1e-8)
        left, said = flat, torch.zeros_like(flat)
        commitment = flat.new_zeros(len(flat))
        for book, heard in zip(self.books, self._heard, strict=True):
            found = left.detach().flatten(0, 1)
            centres = book.embed[nearest(found, book.embed)].view_as(flat)
            if learn:
                heard.append(found)
            commitment = commitment + (left - centres).square().mean((1, 2)) / power
            said, left = said + centres, left - centres
        straight = flat + (said - flat).detach()
        return straight.transpose(1, 2).to(frames.dtype), commitment / len(self.books)

    @torch.no_grad()
    def begin(self, frames: Tensor, generator: torch.Generator) -> None:
        """Gives all books centres by k-means on frames (N, D)."""
        left = frames.float()
        for book in self.books:
            centres = k_means(left, len(book.embed), generator)
            chosen = nearest(left, centres)
            counts = torch.bincount(chosen, minlength=len(centres)).to(left)
            book.embed.copy_(centres)
            book.cluster_size.copy_(counts.clamp_min(1e-3))
            book.embed_avg.copy_(centres * book.cluster_size[:, None])
            left = left - centres[chosen]

    @torch.no_grad()
    def update(self, step: int, generator: torch.Generator) -> None:
        """Moves the centres by what `quantise` has heard since, and starts dead ones again now and then."""
        for book, heard in zip(self.books, self._heard, strict=True):
            if not heard:
                continue
            frames = torch.cat(heard)
            heard.clear()
            chosen = nearest(frames, book.embed)
            counts = torch.bincount(chosen, minlength=len(book.embed)).to(frames)
            sums = torch.zeros_like(book.embed).index_add_(0, chosen, frames)
            book.cluster_size.lerp_(counts, 1 - DECAY)
            book.embed_avg.lerp_(sums, 1 - DECAY)
            if step % RESTART_EVERY == 0:
                _restart(book, frames, generator)
            book.embed.copy_(book.embed_avg / book.cluster_size.clamp_min(1e-5)[:, None])

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes centres and running means in fp32: the codec's own file is rounded."""
        tensors = {}
        for number, book in enumerate(self.books):
            for name in ("embed", "embed_avg", "cluster_size"):
                tensors[f"{number}.{name}"] = getattr(book, name).detach().cpu().contiguous()
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        for name, tensor in load_file(path).items():
            number, _, field = name.partition(".")
            getattr(self.books[int(number)], field).copy_(tensor)


def nearest(frames: Tensor, centres: Tensor) -> Tensor:
    """The number of the nearest centre (V, D) to each frame (N, D)."""
    return (centres.square().sum(1) - 2 * frames @ centres.T).argmin(1)


def k_means(frames: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (count, D) of frames (N, D); empty ones move to frames. N may be smaller than `count`."""
    picked = torch.randperm(len(frames), generator=generator)
    picked = picked.repeat(-(-count // len(frames)))[:count]
    jitter = torch.randn(count, frames.shape[1], generator=generator) * 1e-3 * frames.std().cpu()
    centres = frames[picked.to(frames.device)] + jitter.to(frames)
    for _ in range(ROUNDS):
        chosen = nearest(frames, centres)
        counts = torch.bincount(chosen, minlength=count).to(frames)
        sums = torch.zeros_like(centres).index_add_(0, chosen, frames)
        lonely = torch.randint(len(frames), (count,), generator=generator).to(frames.device)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], frames[lonely])
    return centres


def _restart(book: Any, frames: Tensor, generator: torch.Generator) -> None:
    """Dead centres go to where frames are: a little way from a frame's own centre towards the frame.

    Not to the frame itself: of frames of many dimensions each is far from all others, and little falls to it.
    On noise of 32 dimensions, 200 of 256 centres dead: after 120 steps of 400 frames 232 were in use (perplexity 194),
    this way 256 (245).
    """
    mean = book.cluster_size.mean()
    dead = book.cluster_size < DEAD * mean
    places = torch.randint(len(frames), (len(dead),), generator=generator).to(frames.device)
    near = book.embed[nearest(frames[places], book.embed)]
    book.cluster_size[dead] = mean
    book.embed_avg[dead] = (near + STRIDE * (frames[places] - near))[dead] * mean
