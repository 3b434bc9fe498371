"""What a method adds to a layer.

A site is a layer of the base. The patches on it compose as

    y = layer(x + sum_i s_i u_i(x)) + sum_i s_i v_i(x, y)

with `u` the input term, `v` the output term and `s` the strength. The layer's own weight is never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class LayerShape:
    """All that a patch must know of its layer: kind and geometry, no values.

    `kind` is "linear", "conv1d", "conv2d", "conv3d", "embedding", "norm", "block" or "plane". `weight` is the shape of
    the layer's weight: (O, I) for a linear layer, (O, I / groups, k, ...) for a convolution, (N, D) for an embedding of
    N entries, (C,) for a norm over C channels. A block is a module of several layers that takes and returns hidden
    states of width C; it has no weight of its own, and `weight` is (C,). Families name their blocks. A plane is a block
    whose states lie on a grid, (B, C, height, width).
    """

    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False

    @property
    def out_features(self) -> int:
        return self.weight[0]

    @property
    def in_features(self) -> int:
        return self.weight[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight[2:]

    @classmethod
    def of(cls, module: nn.Module) -> LayerShape | None:
        """The shape of a layer of one of these kinds; None for any other module, and for a norm without a weight."""
        bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear):
            return cls("linear", (module.out_features, module.in_features), bias=bias)
        if isinstance(module, nn.Embedding):
            return cls("embedding", tuple(module.weight.shape))
        if isinstance(module, NORMS):
            return None if module.weight is None else cls("norm", tuple(module.weight.shape), bias=bias)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
            return cls(
                f"conv{len(module.kernel_size)}d",
                tuple(module.weight.shape),
                tuple(module.stride),
                padding,
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
                bias,
            )
        return None


@dataclass
class LayerCall:
    """The call of the patched layer, beside its input: what DoRA, region masks and causal state need.

    `layer` holds the pristine weight. `shifted` says that input terms were added, so that y is not layer(x). `around`
    is what the site's carrier was last called with: a module around or before the layer that is told more than it.
    """

    layer: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shifted: bool = False
    around: dict[str, Any] = field(default_factory=dict)

    def told(self, name: str) -> Any:
        """A keyword argument of the layer, or of its carrier; None where neither has it."""
        own = self.kwargs.get(name)
        return own if own is not None else self.around.get(name)


class Patch(nn.Module):
    """One term at one site. Parameters are trained, buffers are stored with them but stay as they are."""

    def input_term(self, x: Tensor, call: LayerCall) -> Tensor | None:
        """u(x), of the shape of x, or None where the patch has no such term."""
        return None

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor | None:
        """v(x, y), of the shape of the layer's output y, or None where the patch has no such term."""
        return None

    def whole(self, x: Tensor, call: LayerCall) -> Tensor | None:
        """y of a patch that is alone on its layer, at strength 1, by a faster way than its terms; None without one."""
        return None


class Delta(Patch):
    """A patch that lives in weight space, hence can be merged and exported."""

    #: True where `delta` needs the values of the weight and not only its shape.
    depends_on_weight = False

    def delta(self, weight: Tensor) -> Tensor:
        """The paper's formula: what is added to the weight, of its shape, in fp32 or finer."""
        raise TypeError(f"{type(self).__name__} does not say its delta")

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(down, up) with delta = up @ down exactly, every scale folded in, or None where there is no such form.

        Linear: down (R, I), up (O, R). Convolution: down (R, I, k, ...), up (O, R, 1, ...), as PEFT lays them out.
        """
        return None

    def low_rank_of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `low_rank`, for deltas that have such a form once the layer's pristine weight is known."""
        return self.low_rank()

    def bias_delta(self) -> Tensor | None:
        """What is added to the layer's bias, (O,), or None where it stays."""
        return None


class InPlace(Delta):
    """A delta that is written into the layer's own parameters while it is attached, few entries of each.

    The attachment keeps what it overwrites and puts it back bit for bit.
    """

    shape: LayerShape

    def writes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter of the layer: the flat positions, sorted, and what strength 1 adds there, in fp32."""
        raise TypeError(f"{type(self).__name__} does not say what it writes")

    def learn(self, layer: nn.Module) -> Callable[[], None]:
        """Makes the gradients of the layer's parameters reach the patch's own. Returns what undoes that."""
        raise TypeError(f"{type(self).__name__} cannot be trained")

    def check(self, name: str, original: Callable[[str, Tensor], Tensor]) -> None:
        """Raises AdapterError if the layer at site `name` is not the one that the patch was made for.

        `original` gives the layer's own values, by parameter and flat positions.
        """

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        return self._dense("weight", weight.shape, weight.device)

    @torch.no_grad()
    def bias_delta(self) -> Tensor | None:
        return self._dense("bias", (self.shape.weight[0],), None) if "bias" in self.writes() else None

    def _dense(self, name: str, shape: Any, device: torch.device | None) -> Tensor:
        dense = torch.zeros(shape, device=device)
        if name in self.writes():
            positions, values = self.writes()[name]
            dense.view(-1)[positions.long().to(dense.device)] = values.float().to(dense.device)
        return dense
