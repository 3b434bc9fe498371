"""Who we are measured against: PEFT's LoRA, full fine-tuning, and SaRA the hook-free way.

The last one emulates in our own words the order of events in the authors' published optimizer: it holds a mask of one
byte per entry of every parameter, and since the nodes that gather the gradient are made before the forward pass, the
autograd engine runs them last: all dense gradients are alive together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from studio.bench.trainee import Trainee
from studio.bench.workload import Workload
from studio.method import RankedMethod, method_from


class PeftLora(Trainee):
    """LoRA by the PEFT library, at our LoRA's sites and ranks."""

    def __init__(self, workload: Workload, targets: Sequence[str], rank: int) -> None:
        self.ranks = _lora_ranks(workload, targets, rank)
        super().__init__("peft-lora", workload)

    def prepare(self) -> list[nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        exact = {f"^{re.escape(path)}$": rank for path, rank in self.ranks.items()}
        most = max(self.ranks.values())
        config = LoraConfig(
            r=most, lora_alpha=most, target_modules=list(self.ranks), rank_pattern=exact, alpha_pattern=exact
        )
        module = self.workload.module
        with _unmoved(isinstance(next(module.parameters()).data, FakeTensor)):
            inject_adapter_in_model(config, module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for p in trained.values():
            p.data = p.data.float()  # as PEFT's own front door does, and diffusers' training scripts
        return list(trained.values())


@contextmanager
def _unmoved(wanted: bool) -> Iterator[None]:
    """Inside, modules stay where they are: PEFT moves them even to where they are, which fake tensors refuse."""
    move = nn.Module.to
    if wanted:
        nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def _lora_ranks(workload: Workload, targets: Sequence[str], rank: int) -> dict[str, int]:
    """The rank of our LoRA by path in the module."""
    method = method_from({"kind": "lora", "rank": rank, "target_modules": list(targets)})
    assert isinstance(method, RankedMethod)
    sites = workload.sites(targets, method.kinds)
    return {site.path: method.rank_at(name, site.shape) for name, site in sites.items()}


class FullFineTuning(Trainee):
    def __init__(self, workload: Workload) -> None:
        super().__init__("full", workload)

    def prepare(self) -> list[nn.Parameter]:
        return list(self.workload.module.requires_grad_(True).parameters())


class SaraReference(Trainee):
    """SaRA with masks and dense gradients, on every parameter of the module; `share` of each is trained."""

    def __init__(self, workload: Workload, share: float) -> None:
        self.share = share
        super().__init__("sara-reference", workload)

    def prepare(self) -> list[nn.Parameter]:
        self.entries = [
            _Entries(owner, name, parameter, self.share)
            for owner in self.workload.module.modules()
            for name, parameter in list(owner.named_parameters(recurse=False))
        ]
        return [entry.values for entry in self.entries]

    def gradients(self) -> None:
        for entry in self.entries:
            entry.write()
        self.workload.run()


class _Entries:
    """The trained entries of one parameter, which gives its place in the module to what they are scattered into."""

    def __init__(self, owner: nn.Module, name: str, parameter: nn.Parameter, share: float) -> None:
        self.owner, self.name, self.dense = owner, name, parameter.detach()
        count = max(1, round(share * self.dense.numel()))
        if isinstance(self.dense, FakeTensor):  # no values to compare, so the count is set
            self.mask, values = torch.ones_like(self.dense, dtype=torch.bool), self.dense.new_empty(count)
        else:
            smallest = self.dense.abs().flatten().topk(count, largest=False).indices
            self.mask = torch.zeros_like(self.dense, dtype=torch.bool)
            self.mask.view(-1)[smallest] = True
            values = self.dense[self.mask]
        del owner._parameters[name]
        self.values = nn.Parameter(values)
        owner.register_parameter(f"{name}_values", self.values)  # a network without any has no dtype

    def write(self) -> None:
        setattr(self.owner, self.name, _Scatter.apply(self.values, self.dense, self.mask))


class _Scatter(torch.autograd.Function):
    """Values into the masked entries of a tensor, in place; backwards, the dense gradient at these entries."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
        ctx.mask, ctx.count = mask, values.numel()
        return dense.masked_scatter_(mask, values).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dense,) = gradients
        # What a mask selects has no size without values.
        found = dense.new_empty(ctx.count) if isinstance(dense, FakeTensor) else dense[ctx.mask]
        return found, None, None
