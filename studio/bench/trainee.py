"""Whoever trains on a workload: one of our methods here, peers in peers.py. All step alike, with the same AdamW."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from studio.attachment import Site, attach
from studio.bench.workload import Workload
from studio.method import Origin, PatchMethod, RankedMethod, method_from, methods
from studio.patch import Patch

ORIGIN = Origin("bench", 0)
FreshPatches = Callable[[PatchMethod, Mapping[str, Site]], dict[str, Patch]]


class Trainee(ABC):
    """`parameters` are what its optimizer updates."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.name, self.workload = name, workload
        self.parameters = self.prepare()
        # As fit does: fused on a GPU. Fake tensors have no values, and only the fused kernel looks at none.
        first = self.parameters[0]
        fused = first.is_cuda or isinstance(first.data, FakeTensor)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused or None)

    @property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def step(self) -> None:
        self.gradients()
        self.update()

    def gradients(self) -> None:
        self.workload.run()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updated()

    @abstractmethod
    def prepare(self) -> list[nn.Parameter]:
        """Puts itself on the workload's network and returns what is trained."""

    def updated(self) -> None:  # noqa: B027
        """Called when trained values have changed."""


class Ours(Trainee):
    """A method of the registry: fresh patches, attached for training."""

    def __init__(self, method: PatchMethod, workload: Workload, fresh: FreshPatches | None = None) -> None:
        self.method, self.fresh = method, fresh or fresh_patches
        super().__init__(method.kind, workload)

    def prepare(self) -> list[nn.Parameter]:
        sites = self.workload.sites(self.method.target_modules, self.method.kinds)
        self.patches = self.fresh(self.method, sites)
        self.attachment = attach(sites, {name: [patch] for name, patch in self.patches.items()}, train=True)
        return [parameter for patch in self.patches.values() for parameter in patch.parameters()]

    def updated(self) -> None:
        self.attachment.refresh()


def fresh_patches(method: PatchMethod, sites: Mapping[str, Site]) -> dict[str, Patch]:
    shapes = {name: site.shape for name, site in sites.items()}
    return method.patches(shapes, ORIGIN, {name: site.module for name, site in sites.items()})


def trainable_kinds() -> list[str]:
    """Every method of the registry that trains a change of weights, and so may go on any of the layers here."""
    patching = {kind: cls for kind, cls in methods().items() if issubclass(cls, PatchMethod)}
    return [kind for kind, cls in patching.items() if cls.trainable and cls.has_weight_form]


def equal_method(kind: str, targets: Sequence[str], rank: int, share: float, **settings: object) -> PatchMethod:
    """A method at the given rank, or, if it chooses entries of the weights, with this share of them."""
    own = {"rank": rank} if "rank" in methods()[kind].model_fields else {"parameters": share}
    method = method_from({"kind": kind, "target_modules": list(targets), **own, **settings})
    assert isinstance(method, PatchMethod)
    return method


def lora_share(workload: Workload, targets: Sequence[str], rank: int, kinds: Sequence[str]) -> float:
    """The share of all entries of the sites of these kinds that LoRA of this rank trains in numbers."""
    method = method_from({"kind": "lora", "rank": rank, "target_modules": list(targets)})
    assert isinstance(method, RankedMethod)
    count = 0
    for name, site in workload.sites(targets, method.kinds).items():
        fan_in = site.module.weight[0].numel()
        count += method.rank_at(name, site.shape) * (fan_in + site.shape.out_features)
    return count / sum(numel(site.module) for site in workload.sites(targets, kinds).values())


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
