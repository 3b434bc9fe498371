"""What a method adds to a layer.

A site is a layer of the base. The patches on it compose as

    y = layer(x + sum_i s_i u_i(x)) + sum_i s_i v_i(x, y)

with `u` the input term, `v` the output term and `s` the strength. The layer's own weight is never written to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """All that a patch must know of its layer: kind and geometry, no values.

    `kind` is "linear", "conv1d", "conv2d" or "conv3d". `weight` is the shape of the layer's weight: (O, I) for a
    linear layer, (O, I / groups, k, ...) for a convolution.
    """

    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

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
        """The shape of a linear or convolution layer; None for any other module."""
        if isinstance(module, nn.Linear):
            return cls("linear", (module.out_features, module.in_features))
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
            )
        return None


@dataclass
class LayerCall:
    """The call of the patched layer, beside its input: what region masks and causal state may need."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Patch(nn.Module):
    """One term at one site. Parameters are trained, buffers are stored with them but stay as they are."""

    def input_term(self, x: Tensor, call: LayerCall) -> Tensor | None:
        """u(x), of the shape of x, or None where the patch has no such term."""
        return None

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor | None:
        """v(x, y), of the shape of the layer's output y, or None where the patch has no such term."""
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
