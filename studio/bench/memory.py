"""Memory of a training step without the memory: true-shape networks of fake tensors, whose live bytes are summed.

A fake tensor has a shape and a storage of a size, but no bytes behind it; so a step of SDXL runs on a laptop in
seconds. Counted is what a GPU's allocator would have to hold for tensors; its rounding, its cache and the workspaces
inside kernels are not. On a GPU, `gpu.py` measures what these leave out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from studio.attachment import Site
from studio.bench import trainee as trainees
from studio.bench.trainee import Trainee, tensor_bytes
from studio.bench.workload import Workload
from studio.method import PatchMethod
from studio.patch import Patch


class LiveBytes(TorchDispatchMode):
    """Inside, `now` is the sum of all storages that operations have seen and that still live; `peak` its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.allclose.default:
            return True  # asked of fake values by checks that a base is the right one
        result = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or size == 0:
            return

        def died(_: object) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Footprint:
    """Bytes: at the peak of a step; held between steps beside network and batch; the same with all gradients there."""

    trained: int
    peak: int
    kept: int
    kept_with_gradients: int


def footprint(
    mode: FakeTensorMode, make_workload: Callable[[], Workload], make_trainee: Callable[[Workload], Trainee]
) -> Footprint:
    """Runs two steps on fake tensors and looks at the second, when the optimizer's moments are there."""
    with mode:
        workload = make_workload()
        given = tensor_bytes([*workload.module.parameters(), *workload.module.buffers(), *workload.batch])
    with mode, LiveBytes() as live:
        one = make_trainee(workload)
        one.step()
        live.peak = live.now
        one.gradients()
        with_gradients = live.now
        one.update()
        return Footprint(one.trained, live.peak, live.now - given, with_gradients - given)


# -- patches -------------------------------------------------------------------------------------------------------


def fake_patches(mode: FakeTensorMode) -> Callable[[PatchMethod, Mapping[str, Site]], dict[str, Patch]]:
    """Makes patches as they are made in earnest, on real layers one at a time, and then takes their values away.

    The layers' values are uniform in (-1, 1), so that a threshold of s selects a share s of them.
    """

    def fresh(method: PatchMethod, sites: Mapping[str, Site]) -> dict[str, Patch]:
        share = getattr(method, "parameters", None)
        if share is not None:
            method = method.model_copy(update={"parameters": None, "threshold": share})
        with _disable_current_modes():
            return {name: _fake(_real_patch(method, name, site), mode) for name, site in sites.items()}

    return fresh


def _real_patch(method: PatchMethod, name: str, site: Site) -> Patch:
    layer = nn.Module()
    for part, parameter in site.module.named_parameters(recurse=False):
        values = _random(parameter.numel())[: parameter.numel()].view(parameter.shape)
        layer.register_parameter(part, nn.Parameter(values, requires_grad=False))
    return method.patches({name: site.shape}, trainees.ORIGIN, {name: layer})[name]


def _random(count: int) -> Tensor:
    return _uniform(1 << (count - 1).bit_length())


@lru_cache(maxsize=2)
def _uniform(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _fake(patch: Patch, mode: FakeTensorMode) -> Patch:
    for part in patch.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(_empty_like(parameter, mode), parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, _empty_like(buffer, mode))
    return patch


def _empty_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
