"""Methods: how a model is changed. One paper, one file in `trainers/`, one class registered here.

A method's configuration is its class: fields with descriptions, which are validation, `--help` and tooltip at once.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from studio.errors import PresetError, nearest
from studio.patch import LayerShape, Patch


@dataclass(frozen=True)
class Origin:
    """What a fresh patch may depend on beside its layer.

    `concept` names what is taught (data fingerprint and trigger word), `seed` the run. `inputs` holds the second
    moments (I, I) of the layers' inputs on the base by site, for methods that ask for them with `needs_inputs`.
    """

    concept: str
    seed: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Method(BaseModel):
    """Base of all methods. `kind` is its name in presets, files and on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-4  # where the preset gives none

    def peak_learning_rate(self) -> float:
        """The learning rate where the preset gives none."""
        return type(self).learning_rate

    def base(self, preset: Any) -> Any:
        """The base that a preset's training starts from."""
        from studio.bases.registry import load_base

        return load_base(preset.base)

    def task(self, base: Any, preset: Any, run: Any) -> Any:
        """What `fit` trains, for methods that draw their own data. Raises PresetError for settings that do not fit."""
        raise TypeError(f"{type(self).__name__} learns from a user's data")


class PatchMethod(Method):
    """A method that adds patches to layers and leaves the base alone."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d", "conv3d")  # of layers that it serves
    trainable: ClassVar[bool] = True  # False for a kind that only holds finished changes
    has_weight_form: ClassVar[bool] = True  # False where patches are inserted modules, no change of weights

    target_modules: tuple[str, ...] = Field(
        ("attention",),
        description="Layers to patch: groups of the base (attention, cross-attention, linear, conv, text-encoder, "
        "all) or names with * and ?, matched at the end of the site's name.",
    )

    @field_validator("target_modules", mode="before", check_fields=False)
    @classmethod
    def _one_word_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def sites(self, base: Any) -> dict[str, Any]:
        """The sites of a base that are patched, by name. Raises PresetError where there are none."""
        sites: dict[str, Any] = base.select(self.target_modules, self.kinds)
        return sites

    def patch(self, name: str, shape: LayerShape, origin: Origin, weight: Tensor | None = None) -> Patch:
        """A fresh patch for the site `name`, the same bits for the same arguments. It changes nothing yet.

        `weight` is the layer's pristine weight, for methods that need its values.
        Raises PresetError where the method is not defined on a layer of this shape.
        """
        raise TypeError(f"{type(self).__name__} makes no patches")

    def patches(
        self, shapes: Mapping[str, LayerShape], origin: Origin, layers: Mapping[str, nn.Module]
    ) -> dict[str, Patch]:
        """Fresh patches for all sites. `layers` holds the pristine layers by site; it may be empty."""
        weights = {name: layer.get_parameter("weight").detach() for name, layer in layers.items()}
        return {name: self.patch(name, shape, origin, weights.get(name)) for name, shape in shapes.items()}

    def stored(self, name: str, shape: LayerShape, origin: Origin, tensors: Mapping[str, Tensor]) -> Patch:
        """A patch with room for the tensors of a file, named as in its state_dict."""
        return self.patch(name, shape, origin)

    # -- a training, from plan to step -------------------------------------------------------------------------

    @property
    def has_low_rank_form(self) -> bool:
        """Whether its change is exactly a LoRA, so that other programs can load it as one."""
        return True

    @property
    def needs_inputs(self) -> bool:
        """Whether fresh patches look at `Origin.inputs`."""
        return False

    def resolved(self, sites: Mapping[str, Any], identity: Any, origin: Origin) -> Self:
        """The method with everything settled that the run must record. `sites` are Sites. Writes nothing.

        Raises PresetError for settings that do not fit the base.
        """
        return self

    def begin(self, card: Any) -> None:
        """Called once when a training starts, by one process: the place to take what `resolved` found free."""

    def penalise(self, patches: Mapping[str, Patch], step: int, seed: int) -> None:
        """Adds the gradients of the method's own penalties. Called after clipping, before the optimizer's step."""

    def reselect(self, patches: Mapping[str, Patch], step: int, steps: int) -> dict[str, dict[str, Tensor]]:
        """Gives up trained entries before step `step` (from 0) of `steps`: by site and parameter, the positions kept.

        The method has then already replaced the patch's parameter by one of the kept entries.
        """
        return {}


class RankedMethod(PatchMethod):
    """What all low-rank methods share: rank and alpha, for all sites and by pattern."""

    rank: int = Field(8, ge=1, le=4096, description="Rank of the update, limited by the layer's own width.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank. Default: alpha = rank.")
    rank_pattern: dict[str, int] = Field(
        {}, description="Rank for the sites whose name matches a pattern with * and ?."
    )
    alpha_pattern: dict[str, float] = Field({}, description="Alpha for the sites whose name matches a pattern.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, rsLoRA).")

    def rank_at(self, name: str, shape: LayerShape) -> int:
        """The rank at a site: the first matching pattern, never above what the weight can have."""
        wanted = next((rank for pattern, rank in self.rank_pattern.items() if matches(name, pattern)), self.rank)
        fan_in = shape.in_features
        for size in shape.kernel:
            fan_in *= size
        return min(wanted, fan_in, shape.out_features)

    def scale_at(self, name: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(name, pattern)), self.alpha)
        return (alpha if alpha is not None else rank) / (rank**0.5 if self.rslora else rank)


def matches(name: str, pattern: str) -> bool:
    """Whether a site's name is the pattern or ends with it after a dot; `*` and `?` are wild."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Class decorator: makes a method known by the default of its field `kind`."""
    _registry[cls.model_fields["kind"].default] = cls
    return cls


@lru_cache(maxsize=1)
def _discover() -> None:
    package = importlib.import_module("trainers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"trainers.{module.name}")


def methods() -> dict[str, type[Method]]:
    """All methods by kind; finds the files in `trainers/` on first use."""
    _discover()
    return dict(sorted(_registry.items()))


def method_from(config: Any) -> Method:
    """A method from its configuration, `{"kind": "lora", "rank": 8}`. Raises PresetError with the nearest name."""
    if isinstance(config, Method):
        return config
    if isinstance(config, str):
        config = {"kind": config}
    if not isinstance(config, dict) or "kind" not in config:
        raise PresetError("a method needs a 'kind'", hint=f"there are: {', '.join(methods())}")
    known = methods()
    kind = str(config["kind"])
    if kind not in known:
        raise PresetError(f"unknown method '{kind}'", hint=nearest(kind, known))
    try:
        return known[kind].model_validate(config)
    except ValidationError as error:
        raise PresetError(*describe(error, known[kind], prefix="method.")) from None


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> tuple[str, str]:
    """The first fault of a validation as (message, hint), with the nearest key for an unknown one."""
    fault = error.errors()[0]
    where = prefix + ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        owner: Any = model
        for part in fault["loc"][:-1]:
            owner = _field_model(owner, str(part)) or owner
        return f"unknown key '{where}'", nearest(str(fault["loc"][-1]), owner.model_fields)
    given = fault.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"'{where}': {fault['msg'][0].lower()}{fault['msg'][1:]}{shown}", ""


def _field_model(model: Any, name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation if name in getattr(model, "model_fields", {}) else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
