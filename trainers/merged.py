"""Merged: the kind of a finished change that no training made: a merge, or a LoRA file of another program.

Its patches are whatever the file holds at a site: low-rank, dense, sparse, a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import Field
from torch import Tensor

from studio.deltas.patches import fixed_patch
from studio.errors import PresetError
from studio.method import Origin, PatchMethod, register
from studio.patch import LayerShape, Patch


@register
class Merged(PatchMethod):
    """What `studio merge` writes: adapters made into one. It is not trained."""

    kind: Literal["merged"] = "merged"
    trainable: ClassVar[bool] = False
    kinds = ("linear", "conv1d", "conv2d", "conv3d", "embedding", "norm")
    strategy: str = Field("sum", description="How the parents were made one.")
    options: dict[str, Any] = Field({}, description="The strategy's own settings.")
    rank: int | Literal["auto"] | None = Field(None, description="Rank that each layer was brought down to.")
    tolerance: float | None = Field(None, description="Relative error that a lower rank was allowed.")
    seed: int = Field(0, description="Seed of strategies that drop numbers at random.")
    compress: str | None = Field(None, description="Code that low-rank layers are kept in: int8, ternary:DENSITY.")
    error: float | None = Field(None, description="What a lower rank and the code cost, relative to the whole change.")

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> NoReturn:
        raise PresetError(
            "method 'merged' is not trained: it holds what 'studio merge' made",
            "choose a method of 'studio methods', for example --method lora",
        )

    def resolved(self, sites: Mapping[str, Any], identity: Any, origin: Origin) -> NoReturn:
        self.patch("", LayerShape("linear", (1, 1)), origin)

    def stored(self, name: str, shape: LayerShape, origin: Origin, tensors: Mapping[str, Tensor]) -> Patch:
        return fixed_patch(name, shape, tensors)
