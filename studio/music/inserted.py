"""Bottlenecks inserted into a network's stream of hidden states, for models of sounds.

    y + s f(y),   f(y) = W_up g(gelu(W_down y + b_down)) + b_up

after a block of the network, a part of it, or on the text that it is told. W_up and b_up are zero at the start, so a
fresh adapter changes nothing, to the bit. What g is, the method says (`trainers/music_*.py`).
B batch, T steps, D width of the hidden states, R width of the bottleneck, s strength. On a plane, a spectrogram's
grid of T steps by F bands, states are (B, D, T, F) outside and (B, T, F, R) within; there nothing is causal.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from studio.attachment import Site
from studio.errors import PresetError
from studio.keyed import key_of
from studio.method import Origin, PatchMethod
from studio.music.streaming import Memory
from studio.patch import LayerCall, LayerShape, Patch

Placement = Literal[
    "after_layer", "after_block", "after_self_attn", "after_cross_attn", "after_ffn", "after_final_norm", "text_states"
]
SHARES = {"all": (0, 3), "early": (0, 1), "late": (2, 3)}  # in thirds of the depth
TOLERANCE = 0.02  # of a target of parameters


class Inserted(Patch):
    """One bottleneck of width R, `bottleneck`; `shape` tells D. Parameters' names have no dots, as files want it."""

    def __init__(self, shape: LayerShape, bottleneck: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.shape, self.bottleneck, self.causal = shape, bottleneck, causal
        self.planar = shape.kind == "plane"
        width = shape.weight[0]
        self.down = linear_weight(bottleneck, width)
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.build(bottleneck)
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        self.memory = Memory()

    def build(self, bottleneck: int) -> None:
        """Registers the parameters of g."""

    def inner(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """g, (B, T, R) to the same, or (B, T, F, R); `hidden` is what the state of the generation follows on."""
        return hidden

    def output_term(self, x: Tensor, y: Tensor, call: LayerCall) -> Tensor:
        if not torch.is_autocast_enabled(y.device.type):
            y = y.to(self.down.dtype)
        if self.planar:
            y = y.movedim(1, -1)
        hidden = self.inner(F.gelu(F.linear(y, self.down, self.down_bias)), call)
        added = self.dropout(F.linear(hidden, self.up, self.up_bias))
        return added.movedim(-1, 1) if self.planar else added


def linear_weight(out: int, width: int, *kernel: int) -> nn.Parameter:
    """torch's own start of a linear layer or convolution: uniform within 1 / sqrt(fan in)."""
    weight = torch.empty(out, width, *kernel)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


def text_mask(call: LayerCall, steps: int) -> Tensor | None:
    """(B, T), true where a text of T steps has words and no padding; None where nothing says."""
    mask = call.told("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == steps else None


class MusicMethod(PatchMethod):
    """What the inserted bottlenecks share: where they go and how large they are."""

    kinds: ClassVar[tuple[str, ...]] = ("block", "plane", "linear", "norm")
    has_weight_form: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    target_modules: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]  # `placement` and `layers` say where

    placement: Placement = Field(
        "after_layer",
        description="Where: after each layer of the decoder (each attention of a UNet), the last of each block of a "
        "UNet, a part of each layer, all layers, or on the text's states.",
    )
    layers: Literal["all", "early", "late"] | tuple[int, ...] = Field(
        "all", description="Which decoder layers: all, the first third, the last third, or a list of numbers from 0."
    )
    bottleneck: int = Field(64, ge=1, le=8192, description="Width of the bottleneck.")
    target_parameters: int | None = Field(
        None, ge=1, description="Size of the whole adapter in numbers; chooses the bottlenecks, to 2 %."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on what the bottleneck adds.")

    @field_validator("layers", mode="before")
    @classmethod
    def _a_number_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    # -- what a method says ------------------------------------------------------------------------------------

    @abstractmethod
    def insert(self, shape: LayerShape, bottleneck: int, causal: bool) -> Inserted:
        """A fresh bottleneck from torch's global stream."""

    @abstractmethod
    def size(self, width: int, bottleneck: int, planar: bool = False) -> int:
        """How many numbers one bottleneck has."""

    # -- where -------------------------------------------------------------------------------------------------

    def sites(self, base: Any) -> dict[str, Site]:
        """The sites of the placement in the chosen layers. Raises PresetError where the base has none."""
        if self.placement not in base.groups:
            raise PresetError(
                f"method.placement: '{base.name}' ({base.family}) has no place '{self.placement}'",
                _places_of(base) or "the music methods are for bases of music; 'studio bases' lists them",
            )
        found = base.select([self.placement], self.kinds)
        names = list(found)
        return {names[number]: found[names[number]] for number in self._numbers(len(names))}

    def _numbers(self, depth: int) -> list[int]:
        if depth == 1 and isinstance(self.layers, str):
            return [0]
        if isinstance(self.layers, str):
            first, last = SHARES[self.layers]
            return list(range(round(first * depth / 3), round(last * depth / 3)))
        wrong = [number for number in self.layers if not 0 <= number < depth]
        if wrong or not self.layers:
            raise PresetError(
                f"method.layers: there is no layer {wrong[0]}" if wrong else "method.layers: none are listed",
                f"'{self.placement}' has the layers 0 to {depth - 1} here",
            )
        return sorted(set(self.layers))

    # -- how large ---------------------------------------------------------------------------------------------

    def bottlenecks(self, shapes: Mapping[str, LayerShape]) -> dict[str, int]:
        """The width of each site's bottleneck: `bottleneck`, or what comes nearest to `target_parameters`.

        One width nearly never hits a target, so some sites, spread evenly, are one wider than the others.
        Raises PresetError for a target that cannot be met to 2 %.
        """
        if self.target_parameters is None:
            return dict.fromkeys(shapes, self.bottleneck)
        widths = [(shape.weight[0], shape.kind == "plane") for shape in shapes.values()]
        target = self.target_parameters

        def total(narrow: int, wider: int) -> int:
            return sum(self.size(w, narrow + _is_wider(i, wider, len(widths)), p) for i, (w, p) in enumerate(widths))

        narrow = 1
        while total(narrow + 1, 0) <= target:
            narrow += max(1, narrow // 8) if total(narrow + 1 + narrow // 8, 0) <= target else 1
        wider = min(range(len(widths) + 1), key=lambda count: abs(total(narrow, count) - target))
        reached = total(narrow, wider)
        if abs(reached - target) > TOLERANCE * target:
            raise PresetError(
                f"method.target_parameters: {target:,} in {len(widths)} places cannot be met: {reached:,} is nearest",
                "choose fewer layers, or a larger target",
            )
        return {name: narrow + _is_wider(i, wider, len(widths)) for i, name in enumerate(shapes)}

    # -- patches -----------------------------------------------------------------------------------------------

    @property
    def has_low_rank_form(self) -> bool:
        return False

    def patches(
        self, shapes: Mapping[str, LayerShape], origin: Origin, layers: Mapping[str, nn.Module]
    ) -> dict[str, Patch]:
        widths = self.bottlenecks(shapes)
        return {name: self._fresh(name, shape, widths[name], origin) for name, shape in shapes.items()}

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> Patch:
        return self._fresh(name, shape, self.bottlenecks({name: shape})[name], origin)

    def stored(self, name: str, shape: LayerShape, origin: Origin, tensors: Mapping[str, Tensor]) -> Patch:
        down = tensors.get("down")
        return self._fresh(name, shape, self.bottleneck if down is None else down.shape[0], origin)

    def _fresh(self, name: str, shape: LayerShape, bottleneck: int, origin: Origin) -> Inserted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_of(self.kind, origin.seed, name))
            causal = self.placement != "text_states" and shape.kind != "plane"
            return self.insert(shape, bottleneck, causal)


def _places_of(base: Any) -> str:
    """A hint that names the places of a base; "" where there are none."""
    places = [place for place in get_args(Placement) if place in base.groups]
    return f"it has {', '.join(places)}" if places else ""


def _is_wider(place: int, wider: int, places: int) -> int:
    """1 for `wider` of the places, spread evenly over them, else 0."""
    return int((place + 1) * wider // places > place * wider // places)
