"""A file of weight changes, opened: its header is known, its tensors are read site by site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from studio.adapter import BaseIdentity
from studio.deltas import WeightDelta
from studio.inputs import Sketch
from studio.patch import LayerShape

Weights = Callable[[str], Tensor]  # the base's own weight of a site


@dataclass
class Source(ABC):
    """One adapter or LoRA file. `shapes` tells the layers that it changes; `identity` is None where no card says it."""

    name: str
    path: Path
    kind: str = ""
    identity: BaseIdentity | None = None
    shapes: Mapping[str, LayerShape] = field(default_factory=dict)
    trigger: str = ""
    class_word: str = ""

    @property
    @abstractmethod
    def sha256(self) -> str: ...

    @property
    def needs_weights(self) -> bool:
        """Whether its changes depend on the base's weights."""
        return False

    @abstractmethod
    def read(self, site: str, weights: Weights | None) -> tuple[WeightDelta | None, Tensor | None]:
        """The change of a site's weight and that of its bias, scales folded in; None where there is none.

        Raises AdapterError for tensors that cannot be used, or for a change that needs a weight where none is given.
        """

    @abstractmethod
    def numbers(self, site: str) -> int:
        """How many numbers the file holds for a site."""

    def words(self) -> dict[str, dict[str, Tensor]]:
        """Learned words by text encoder."""
        return {}

    def sketch(self, site: str, term: str = "sketch") -> Sketch | None:
        """What the file knows of a site's inputs."""
        return None
