"""The sparse patch: flat positions in a layer's parameters, and what is added there.

Tensors of the file, for `weight` and for `bias` as far as entries of them are trained:

    weight_index    (M,) int32, sorted flat positions
    weight_change   (M,) fp32, what is added there, zero at the start
    weight_base     (up to 16,) fp32, values of the base at some of the positions, by which a wrong base is noticed
    weight_live     (M',) int32, after a reselection: which of the M are still trained

In memory the parameter `weight_change` then is (M',), and `weight_settled` (M,) holds the changes of the others.

A gradient reaches the changes through a hook on the layer's own parameter: the dense gradient of one layer is gathered
and freed before that of the next exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from studio.errors import AdapterError
from studio.patch import InPlace, LayerShape

PARTS = ("weight", "bias")
WITNESSES = 16


class SparsePatch(InPlace):
    """Entries of one layer. `tensors` are those of a file; changes are trained."""

    depends_on_weight = True

    def __init__(self, shape: LayerShape, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        for name in sorted(tensors, reverse=True):  # one order, fresh or from a file: sums over parameters depend on it
            if name.endswith("_change"):
                self.register_parameter(name, nn.Parameter(tensors[name]))
            else:
                self.register_buffer(name, tensors[name])
        for part in self.parts:
            if (live := self._buffers.get(f"{part}_live")) is not None:
                self._divide(part, live)
        self.learning: dict[str, nn.Parameter] = {}  # the layer's own parameters, while they are learned from

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if f"{part}_index" in self._buffers)

    def change_of(self, part: str) -> nn.Parameter:
        change: nn.Parameter = getattr(self, f"{part}_change")  # get_parameter takes several times as long
        return change

    def trained_positions(self, part: str) -> Tensor:
        """Where the entries of the part's changes stand in the layer's parameter."""
        index: Tensor = getattr(self, f"{part}_index")
        live = self._buffers.get(f"{part}_live")
        return index if live is None else index.index_select(0, live)

    def trained_values(self, part: str) -> Tensor:
        """The layer's present values there, in fp32. Only while learning."""
        return self.learning[part].detach().reshape(-1).index_select(0, self.trained_positions(part)).float()

    # -- what is written ---------------------------------------------------------------------------------------

    def writes(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {part: (getattr(self, f"{part}_index"), self._all_changes(part)) for part in self.parts}

    def _all_changes(self, part: str) -> Tensor:
        change, live = self.change_of(part).detach(), self._buffers.get(f"{part}_live")
        return change if live is None else self.get_buffer(f"{part}_settled").index_copy(0, live.long(), change)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As `Module` does, with all changes of a part in one tensor."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part in self.parts:
            if destination.pop(f"{prefix}{part}_settled", None) is not None:
                destination[f"{prefix}{part}_change"] = self._all_changes(part)

    def check(self, name: str, original: Callable[[str, Tensor], Tensor]) -> None:
        for part in self.parts:
            witnesses = self.get_buffer(f"{part}_base")
            index = self.get_buffer(f"{part}_index")
            own = original(part, index[spread(len(index)).to(index.device)]).float().cpu()
            if not torch.allclose(own, witnesses.cpu(), rtol=2.0**-7, atol=1e-7):  # rounding to bf16 is allowed
                raise AdapterError(
                    f"the {part} of '{name}' has other values in this base than where the adapter was trained",
                    "use the adapter with the base that its card names",
                )

    # -- learning ----------------------------------------------------------------------------------------------

    def learn(self, layer: nn.Module) -> Callable[[], None]:
        self.learning = {part: layer.get_parameter(part) for part in self.parts if self.change_of(part).numel()}
        flags = {part: parameter.requires_grad for part, parameter in self.learning.items()}
        handles = []
        for part, parameter in self.learning.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(self._gatherer(part)))

        def undo() -> None:
            for handle in handles:
                handle.remove()
            for part, flag in flags.items():
                layer.get_parameter(part).requires_grad_(flag)
            self.learning = {}

        return undo

    def _gatherer(self, part: str) -> Callable[[Tensor], None]:
        def gather(parameter: Tensor) -> None:
            dense, parameter.grad = parameter.grad, None
            assert dense is not None
            self.add_gradient(part, dense.reshape(-1).index_select(0, self.trained_positions(part)))

        return gather

    @torch.no_grad()
    def add_gradient(self, part: str, gradient: Tensor) -> None:
        """Adds to the gradient of the part's changes, (M,) or (M',), in fp32."""
        change = self.change_of(part)
        change.grad = gradient.float() if change.grad is None else change.grad.add_(gradient)

    @torch.no_grad()
    def settle(self, part: str, live: Tensor) -> None:
        """Goes on with the entries at `live`, (M',) sorted positions in them; the others stay as they are."""
        self.register_buffer(f"{part}_live", live.to(self.get_buffer(f"{part}_index").dtype))
        self._divide(part, live)
        if not len(live):
            self.learning.pop(part).requires_grad_(False)  # its dense gradient is never made again

    def _divide(self, part: str, live: Tensor) -> None:
        changes = self.change_of(part).detach()
        self.register_buffer(f"{part}_settled", changes)
        setattr(self, f"{part}_change", nn.Parameter(changes.index_select(0, live)))


def fresh(shape: LayerShape, chosen: Mapping[str, tuple[Tensor, Tensor]]) -> SparsePatch:
    """A patch that changes nothing yet, from the base's parameter and the positions to train, by part."""
    tensors: dict[str, Tensor] = {}
    for part, (parameter, index) in chosen.items():
        if len(index):
            witnesses = index[spread(len(index)).to(index.device)]
            tensors |= {
                f"{part}_index": index,
                f"{part}_change": torch.zeros(len(index), device=index.device),
                f"{part}_base": parameter.detach().reshape(-1).index_select(0, witnesses).float(),
            }
    return SparsePatch(shape, tensors)


def spread(count: int) -> Tensor:
    """Up to 16 of `count` places, evenly spread."""
    kept = min(count, WITNESSES)
    return torch.arange(kept) * count // max(kept, 1)


def stored(name: str, shape: LayerShape, tensors: Mapping[str, Tensor]) -> SparsePatch:
    """The patch of a file's tensors. Raises AdapterError for tensors that cannot be of this layer."""
    sizes = {"weight": int(torch.Size(shape.weight).numel()), "bias": shape.weight[0] if shape.bias else 0}
    known = {f"{part}_{what}" for part in PARTS for what in ("index", "change", "base", "live")}
    if unknown := sorted(set(tensors) - known):
        raise AdapterError(f"site '{name}': a sparse patch has no tensor '{unknown[0]}'")
    for part in PARTS:
        own = {key.removeprefix(f"{part}_"): value for key, value in tensors.items() if key.startswith(f"{part}_")}
        if own and (fault := _fault(own, sizes[part])):
            raise AdapterError(f"site '{name}': the {part}'s {fault}", "the file is damaged; copy or download it again")
    return SparsePatch(shape, tensors)


def _fault(own: Mapping[str, Tensor], size: int) -> str:
    """What is wrong with the tensors of a part that has `size` entries, or ""."""
    if set(own) | {"live"} != {"index", "change", "base", "live"}:
        return f"tensors are incomplete: {', '.join(sorted(own))}"
    index, live = own["index"], own.get("live")
    if not _increasing(index, size):
        return f"positions are not sorted places of {size}"
    if live is not None and not _increasing(live, len(index)):
        return "trained positions are not among the others"
    if own["change"].shape != index.shape:
        return "values are not as many as its positions"
    return "" if own["base"].shape == spread(len(index)).shape else "values of the base are not as many as expected"


def _increasing(positions: Tensor, size: int) -> bool:
    if positions.ndim != 1 or positions.dtype not in (torch.int32, torch.int64):
        return False
    if not len(positions):
        return True
    return bool(positions[0] >= 0 and positions[-1] < size and (positions[1:] > positions[:-1]).all())
