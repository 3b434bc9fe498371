"""Bases: the models that are customised, and the contract of a family of them.

A family is one file in `studio/bases/`: how such a model is loaded, which layers a method may touch, how a batch is
encoded, what the network predicts and how it samples. B batch, H and W height and width in pixels, C channels.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from studio.adapter import Adapter, BaseIdentity
from studio.attachment import Site, find_sites
from studio.errors import AdapterError, PresetError, nearest, reason_of
from studio.method import PatchMethod, matches
from studio.patch import Patch

Condition = dict[str, Tensor]  # per sample: every tensor has B in front


@dataclass(frozen=True)
class Request:
    """What is asked of a base at generation. `seeds` has one seed per picture or sound; sizes are in pixels."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    on_step: Callable[[int, int], None] | None = None
    on_preview: Callable[[Any], None] | None = None  # gets `previews` intermediate pictures
    previews: int = 5
    # Clips: how many frames, how many a second, whether they play in a circle, and pictures of frames that are given.
    frames: int | None = None
    fps: float | None = None
    loop: bool = False
    given: Mapping[int, Any] = field(default_factory=dict)
    image_guidance: float | None = None


@dataclass
class Base(ABC):
    """A loaded base. `modules` holds every network by its diffusers name; `name` is what the user asked for."""

    name: str
    pipe: Any
    licence: str = ""
    attention: str = "sdpa"
    notes: list[str] = field(default_factory=list)
    prompts: tuple[str, ...] = ()  # things that it is known to draw
    guidance: float | None = None  # the scale that suits it, where that is not the pipeline's own default

    family: ClassVar[str]
    medium: ClassVar[str] = "image"
    pipeline_class: ClassVar[str]  # what a pipeline folder calls itself in model_index.json
    denoiser_name: ClassVar[str]
    text_encoder_names: ClassVar[tuple[str, ...]]
    groups: ClassVar[Mapping[str, tuple[str, ...]]]  # target_modules groups -> targets, as `select` takes them

    # -- what a family says ------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Base:
        """A random pico version of the real classes, for tests; built in about a second."""

    @classmethod
    @abstractmethod
    def from_folder(
        cls, folder: Path, name: str, dtype: torch.dtype, licence: str = "", variant: str | None = None
    ) -> Self:
        """The base in a pipeline folder, ready for inference. Raises what the libraries raise: see registry.py."""

    @abstractmethod
    def generate(self, request: Request) -> list[Any]:
        """One work of the base's medium per prompt, PIL pictures or sounds, each a function of its own seed."""

    # -- what follows from it ----------------------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, Any]:
        """Every network of the pipeline by name."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def components(self) -> dict[str, Any]:
        """The networks that methods may touch: the denoiser, then the text encoders."""
        modules = self.modules
        return {name: modules[name] for name in (self.denoiser_name, *self.text_encoder_names) if name in modules}

    @property
    def denoiser(self) -> Any:
        return self.components[self.denoiser_name]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def sites(self) -> dict[str, Site]:
        return find_sites(self.components)

    def enable_gradient_checkpointing(self) -> None:
        """Makes the denoiser compute activations again in the backward pass instead of keeping them."""
        self.denoiser.enable_gradient_checkpointing()

    def select(self, targets: Sequence[str], kinds: Sequence[str] = PatchMethod.kinds) -> dict[str, Site]:
        """The sites of these kinds that match the targets: groups of this family, or patterns of names.

        `PATTERN:KIND` narrows a pattern to a kind of layer: `unet.*:linear`, `unet.down_blocks.*:conv*`.
        Raises PresetError for a target that matches nothing, naming the nearest.
        """
        sites = {name: site for name, site in self.sites().items() if site.shape.kind in kinds}
        chosen: set[str] = set()
        for target in targets:
            patterns = self.groups.get(target, (target,))
            found = {name for name, site in sites.items() if any(_fits(site, pattern) for pattern in patterns)}
            if not found:
                endings = {name.rsplit(".", 1)[-1] for name in sites} | set(self.groups)
                raise PresetError(
                    f"target_modules: nothing in '{self.name}' matches '{target}'", nearest(target, endings)
                )
            chosen |= found
        return {name: site for name, site in sites.items() if name in chosen}

    def identity(self) -> BaseIdentity:
        return BaseIdentity(
            name=Path(self.name).name if Path(self.name).exists() else self.name,  # no folders of the user's
            family=self.family,
            architecture=_architecture(self.components),
            values=_value_sketch(self.components),
            licence=self.licence,
        )

    def check(self, identity: BaseIdentity, needs_values: bool = False) -> str:
        """Whether an adapter made for `identity` fits this base. Returns a warning, or "".

        Raises AdapterError for another architecture, and for other values where the method depends on them.
        """
        own = self.identity()
        unknown = not own.values or not identity.values
        if own.architecture != identity.architecture:
            raise AdapterError(
                f"the adapter was made for '{identity.name}' ({identity.family}), which is built otherwise than "
                f"'{self.name}' ({self.family})",
                hint=f"use --base {identity.name}",
            )
        if same_values(own.values, identity.values) and not (needs_values and unknown):
            return ""
        if needs_values:
            raise AdapterError(
                f"the adapter depends on the weights of '{identity.name}', and '{self.name}' has others",
                hint=f"use --base {identity.name}",
            )
        return f"the adapter was trained on '{identity.name}'; '{self.name}' is built alike but has other weights"

    def worn(self, adapter: Adapter) -> tuple[dict[str, list[Patch]], list[str]]:
        """The adapter's patches by site of this base, and warnings. Raises AdapterError for one that does not fit."""
        patches = adapter.by_site()
        warning = self.check(adapter.card.base, depends_on_values(patches))
        return patches, [warning] if warning else []

    def to(self, device: torch.device | str) -> Base:
        self.pipe.to(device)
        return self

    def choose_attention(self) -> str:
        """Turns on xformers where it works, else keeps torch's SDPA. Returns a line that says which and why."""
        if not torch.cuda.is_available():
            return "attention: sdpa (xformers needs a CUDA device)"
        logging.getLogger("xformers").setLevel(logging.ERROR)
        try:
            self._enable_xformers()
        except (ModuleNotFoundError, ValueError, NotImplementedError, RuntimeError) as error:
            return f"attention: sdpa (no xformers: {reason_of(error)})"
        self.attention = "xformers"
        return "attention: xformers"

    def _enable_xformers(self) -> None:
        self.denoiser.enable_xformers_memory_efficient_attention()


def depends_on_values(patches: Mapping[str, Sequence[Patch]]) -> bool:
    """Whether any of the patches means something on the very weights alone that it was trained on."""
    return any(getattr(patch, "depends_on_weight", False) for own in patches.values() for patch in own)


def _fits(site: Site, target: str) -> bool:
    pattern, _, kind = target.partition(":")
    return matches(site.name, pattern) and fnmatchcase(site.shape.kind, kind or "*")


def _architecture(components: Mapping[str, nn.Module]) -> str:
    """A hash over the names and shapes of all weights."""
    lines = [
        f"{component}.{name} {tuple(parameter.shape)}"
        for component, module in components.items()
        for name, parameter in module.named_parameters()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


SKETCH_SIZE = 256


def _value_sketch(components: Mapping[str, nn.Module]) -> str:
    """256 weights at fixed places, in fp32, as base64: equal up to rounding in every dtype of the same weights.

    Empty for an outline, which has none.
    """
    tensors = [p for module in components.values() for p in module.parameters()]
    if any(tensor.is_meta for tensor in tensors):
        return ""
    picked = []
    for i in range(SKETCH_SIZE):
        flat = tensors[(i * 7919) % len(tensors)].detach().reshape(-1)
        picked.append(flat[(i * 104729) % flat.numel()].float().cpu())
    return base64.b64encode(torch.stack(picked).numpy().astype("<f4").tobytes()).decode()


def same_values(one: str, other: str) -> bool:
    """Whether two sketches are of the same weights, allowing for rounding to bf16 (8 bits of mantissa).

    What is not known of one is not held against it.
    """
    if not one or not other:
        return True
    a, b = (np.frombuffer(base64.b64decode(text), "<f4") for text in (one, other))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 2.0**-7 * np.maximum(np.abs(a), np.abs(b)) + 1e-7))
