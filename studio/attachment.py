"""Putting patches on a model and taking them off again.

The layer object stays the same and keeps its weight, its name and its hooks; only its `forward` is covered by one
that adds the terms. Hence the base's `state_dict` is the same before, during and after, and attention processors,
gradient checkpointing and `torch.compile` see ordinary modules. The exception are patches that write in place: they
change few entries of the weight while they are attached (overwrite.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.errors import AdapterError, nearest
from studio.overwrite import Journal
from studio.patch import InPlace, LayerCall, LayerShape, Patch


@dataclass(frozen=True)
class Site:
    """A layer that a method may patch. `name` begins with the component: `unet.mid_block...to_q`."""

    name: str
    module: Any  # a layer of one of LayerShape's kinds
    shape: LayerShape
    carrier: Any = None  # a module whose call tells what patches here need and the layer is not told: LayerCall.around

    @property
    def component(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def path(self) -> str:
        return self.name.split(".", 1)[1]


def find_sites(components: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Every layer of the components that has a LayerShape, in the order of the modules."""
    sites = {}
    for component, root in components.items():
        for path, module in root.named_modules():
            shape = LayerShape.of(module)
            if shape is not None and path:
                name = f"{component}.{path}"
                sites[name] = Site(name, module, shape)
    return sites


class _PatchedForward:
    """Covers the `forward` of one layer. Lives in the layer's `__dict__` until the last patch is taken off.

    Of a layer that returns several things the first is y; the others pass through.
    """

    def __init__(self, layer: nn.Module, carrier: nn.Module | None = None) -> None:
        self.layer = layer
        self.around: dict[str, Any] = {}
        self.watch = (
            carrier.register_forward_pre_hook(self._remember, with_kwargs=True) if carrier is not None else None
        )
        self.covered = layer.__dict__.get("forward")  # an instance attribute of somebody else, kept
        self.inner = layer.forward
        self.journal = Journal(layer)
        self.terms: list[tuple[Patch, Attachment]] = []
        self.fired = False
        layer.forward = self

    def _remember(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.around = kwargs

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.fired = True
        call = LayerCall(self.layer, args, kwargs, around=self.around)
        terms = [
            (patch, attachment.weight)
            for patch, attachment in self.terms
            if not isinstance(patch, InPlace) and not _is(attachment.weight, 0.0)
        ]
        if len(terms) == 1 and _is(terms[0][1], 1.0) and self.covered is None:
            whole = terms[0][0].whole(x, call)
            if whole is not None:
                return whole
        shifted = x
        for patch, weight in terms:
            u = patch.input_term(_as_patch_dtype(x, patch), call)
            if u is not None:
                shifted, call.shifted = shifted + (weight * u).to(x.dtype), True
        result = self.inner(shifted, *args, **kwargs)
        y = out = result[0] if isinstance(result, tuple) else result
        for patch, weight in terms:
            v = patch.output_term(_as_patch_dtype(x, patch), y, call)
            if v is not None:
                out = out + (v if _is(weight, 1.0) else weight * v).to(y.dtype)
        return (out, *result[1:]) if isinstance(result, tuple) else out

    def remove(self, attachment: Attachment) -> None:
        self.terms = [term for term in self.terms if term[1] is not attachment]
        self.rewrite()
        if not self.terms:
            if self.watch is not None:
                self.watch.remove()
            if self.covered is None:
                del self.layer.__dict__["forward"]
            else:
                self.layer.forward = self.covered

    def rewrite(self) -> None:
        """Brings the layer's own entries up to date with its in-place patches."""
        terms = [(patch, attachment.weight) for patch, attachment in self.terms if isinstance(patch, InPlace)]
        if terms or self.journal.stashes:
            self.journal.rewrite(terms)


def _journal(layer: nn.Module) -> Journal:
    forward = layer.__dict__.get("forward")
    return forward.journal if isinstance(forward, _PatchedForward) else Journal(layer)


def _is(weight: float | Tensor, value: float) -> bool:
    return not isinstance(weight, Tensor) and weight == value


def _on(patch: Patch, device: torch.device) -> Patch:
    """Fake tensors cannot be moved, and `Module.to` looks at every tensor at length."""
    there = all(tensor.device == device for tensor in (*patch.parameters(), *patch.buffers()))
    return patch if there else patch.to(device)


def _as_patch_dtype(x: Tensor, patch: Patch) -> Tensor:
    """Autocast chooses dtypes itself; elsewhere the patch computes in its own."""
    if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
        return x
    parameter = next(iter(patch.parameters()), None)
    return x if parameter is None or parameter.dtype == x.dtype else x.to(parameter.dtype)


class Attachment:
    """Patches while they are on a model. `weight` is the strength and may be changed at any time.

    Use it as a context manager, or call `detach`, which restores every layer bit for bit.
    """

    def __init__(self, forwards: list[_PatchedForward], weight: float | Tensor) -> None:
        self._forwards = forwards
        self._weight = weight
        self._undo: list[Callable[[], None]] = []

    @property
    def weight(self) -> float | Tensor:
        return self._weight

    @weight.setter
    def weight(self, value: float | Tensor) -> None:
        self._weight = value
        self.refresh()

    def refresh(self) -> None:
        """Call it when in-place patches have new values: brings the layers up to date."""
        for forward in self._forwards:
            forward.rewrite()

    def learn(self) -> None:
        """Lets gradients of the layers' own parameters reach in-place patches, until `detach`."""
        for forward in self._forwards:
            own = [patch for patch, attachment in forward.terms if attachment is self and isinstance(patch, InPlace)]
            self._undo += [patch.learn(forward.layer) for patch in own]

    def silent_sites(self, names: Mapping[nn.Module, str]) -> list[str]:
        """The patched layers that no forward pass has reached so far."""
        return [names.get(forward.layer, "?") for forward in self._forwards if not forward.fired]

    def detach(self) -> None:
        """Takes the patches off. A second call does nothing."""
        for undo in self._undo:
            undo()
        self._undo = []
        for forward in self._forwards:
            forward.remove(self)
        self._forwards = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    sites: Mapping[str, Site],
    patches: Mapping[str, Iterable[Patch]],
    weight: float | Tensor = 1.0,
    train: bool = False,
) -> Attachment:
    """Puts patches, keyed by site name, on a model's layers; with `train`, so that in-place patches learn too.

    Raises AdapterError if a site does not exist, has another shape, or other values than an in-place patch was made
    for; then nothing is attached.
    """
    for name, site_patches in patches.items():
        if name not in sites:
            raise AdapterError(f"site '{name}' is not in this base", hint=nearest(name, sites))
        for patch in site_patches:
            shape = getattr(patch, "shape", None)
            if shape is not None and shape.weight != sites[name].shape.weight:
                raise AdapterError(
                    f"site '{name}' has a weight of shape {sites[name].shape.weight} in this base, "
                    f"and the adapter was made for {shape.weight}"
                )
            if isinstance(patch, InPlace):
                patch.check(name, _journal(sites[name].module).original)
    forwards: list[_PatchedForward] = []
    attachment = Attachment(forwards, weight)
    for name, site_patches in patches.items():
        layer = sites[name].module
        forward = layer.__dict__.get("forward")
        if not isinstance(forward, _PatchedForward):
            forward = _PatchedForward(layer, sites[name].carrier)
        device = next(layer.parameters()).device
        forward.terms.extend((_on(patch, device), attachment) for patch in site_patches)
        forwards.append(forward)
    attachment.refresh()
    if train:
        attachment.learn()
    return attachment
