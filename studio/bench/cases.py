"""Who is compared with whom, on what: the same sites, the same rank, the same number of trained entries."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from studio.bases.latent_diffusion import LatentDiffusion
from studio.bases.registry import load_base
from studio.bench.peers import FullFineTuning, PeftLora, SaraReference
from studio.bench.trainee import FreshPatches, Ours, Trainee, equal_method, lora_share, numel, trainable_kinds
from studio.bench.workload import Workload, convolution, linear, sd15, sdxl, training
from studio.method import PatchMethod, methods

PEERS = ("peft-lora", "full", "sara-reference")


@dataclass(frozen=True)
class Case:
    """`peers` and the methods `who` take part; None: all methods. `make` builds a network of its own for each."""

    name: str
    make: Callable[[], Workload]
    targets: tuple[str, ...]
    rank: int
    peers: tuple[str, ...] = ("peft-lora",)
    who: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Peers first: the others are compared with them."""
        return (*self.peers, *(self.who if self.who is not None else trainable_kinds()))

    def trainee(self, name: str, workload: Workload, fresh: FreshPatches | None = None) -> Trainee:
        """Puts a method or a peer on the workload. Raises StudioError for a method that does not serve it."""
        if name == "peft-lora":
            return PeftLora(workload, self.targets, self.rank)
        if name == "full":
            return FullFineTuning(workload)
        sara = cast(type[PatchMethod], methods()["sara"])
        if name == "sara-reference":
            sites = workload.sites(self.targets, sara.kinds).values()
            chosen = self.share(workload, sara) * sum(numel(site.module) for site in sites)
            return SaraReference(workload, chosen / numel(workload.module))
        cls = cast(type[PatchMethod], methods()[name])
        return Ours(equal_method(name, self.targets, self.rank, self.share(workload, cls)), workload, fresh)

    def share(self, workload: Workload, cls: type[PatchMethod]) -> float:
        return lora_share(workload, self.targets, self.rank, cls.kinds)


def compared_with(name: str, there: Collection[str]) -> list[str]:
    """With whom a row is compared, as far as they are there: the peers, and our LoRA."""
    return [peer for peer in (*PEERS, "lora") if peer in there and peer != name]


def _network(build: Callable[[], LatentDiffusion], batch: int, checkpointing: bool = False) -> Workload:
    return training(build(), batch, checkpointing)


def _sdxl_bf16() -> Workload:
    return training(sdxl(torch.bfloat16), 1, checkpointing=True, autocast=True)


def _sticker(batch: int) -> Workload:
    device = torch.get_default_device()
    return training(cast(LatentDiffusion, load_base("sticker", dtype=torch.float32, device=device)), batch)


EVERYWHERE = ("peft-lora", "full", "sara-reference")
MEMORY = (
    Case("sd15 fp32 batch 1, all layers", partial(_network, sd15, 1), ("all",), 36, EVERYWHERE),
    Case("sd15 fp32 batch 4 checkpointing, all layers", partial(_network, sd15, 4, True), ("all",), 36, EVERYWHERE),
    Case(  # the paper's largest budget
        "sd15 fp32 batch 1, all layers, 50 M",
        partial(_network, sd15, 1),
        ("all",),
        48,
        ("sara-reference",),
        ("lora", "sara"),
    ),
    Case("sd15 fp32 batch 4, attention", partial(_network, sd15, 4), ("attention",), 16),
    Case("sdxl bf16 batch 1 checkpointing, attention", _sdxl_bf16, ("attention",), 16),
)
SPEED = (
    Case("sticker batch 8, attention", partial(_sticker, 8), ("attention",), 16, ("peft-lora", "full")),
    Case("sticker batch 8, all layers", partial(_sticker, 8), ("all",), 16, EVERYWHERE, ("lora", "sara")),
    Case("linear 640, 4096 tokens", partial(linear, 640, 4096), ("all",), 4),
    Case("linear 1280, 1024 tokens", partial(linear, 1280, 1024), ("all",), 4),
    Case("conv 640, 64 px", partial(convolution, 640, 64), ("all",), 16),
    Case("conv 1280, 32 px", partial(convolution, 1280, 32), ("all",), 16),
)
