"""SaRA: fine-tuning the base's own smallest weights (Hu et al. 2024, ICLR 2025).

    P = P0 + delta,   delta != 0 only where |P0| < theta          theta one magnitude for all layers

The paper's claim: the smallest weights of a trained model do nothing, so they can be given to something new. From half
of the steps on, only those that are still below theta are trained ("progressive parameter adjustment", section 4.3);
the others keep what they have learned. The nuclear norm of the trained entries may be penalised (section 4.2):

    L = L_task + lambda ||P_M||_*,   gradient lambda U V^T on the entries of M, with P_M = U S V^T

M the entries below theta, N all entries of the layers that are served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from studio.errors import PresetError
from studio.keyed import torch_generator
from studio.method import Origin, PatchMethod, register
from studio.patch import LayerShape, Patch
from trainers.sara.patch import PARTS, SparsePatch, fresh, stored
from trainers.sara.polar import polar_factor
from trainers.sara.selection import count_below, part_of, positions_of, threshold_for

DEFAULT_SHARE = 0.05
MATRICES = ("linear", "conv1d", "conv2d", "conv3d")  # kinds whose nuclear norm is penalised


@register
class Sara(PatchMethod):
    """SaRA: trains the entries of the base's own weights that are smallest, wherever they are."""

    kind: Literal["sara"] = "sara"
    paper = (
        "Hu et al. 2024, SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, "
        "arXiv 2409.06633"
    )
    kinds = (*MATRICES, "embedding", "norm")

    target_modules: tuple[str, ...] = Field(
        ("all",),
        description="Layers to choose entries from: groups of the base (attention, cross-attention, linear, conv, "
        "text-encoder, all) or names with * and ?, matched at the end of the site's name.",
    )
    threshold: float | None = Field(
        None, gt=0, description="Train the entries whose magnitude is below this. Instead of `parameters`."
    )
    parameters: float | None = Field(
        None,
        gt=0,
        description="Train this many of the smallest entries; below 1, this share of all. Sets the threshold. "
        f"Default: {DEFAULT_SHARE}.",
    )
    select: Literal["smallest", "largest", "random"] = Field(
        "smallest",
        description="Which entries to train: those below the threshold, or, to compare, as many of the largest or of "
        "all at random.",
    )
    biases: bool = Field(True, description="Choose entries of biases too, not only of weights.")
    support: tuple[int, int, int] | None = Field(
        None,
        description="(k, K, seed): of the chosen entries take part k, from 1, of K disjoint random parts. Concepts "
        "trained with different k and the same K and seed share no entry, so they can be summed.",
    )
    progressive: bool = Field(
        True,
        description="After half of the steps, go on only with entries still below the threshold (select: smallest).",
    )
    rank_weight: float = Field(
        0.0, ge=0, description="Weight lambda of the nuclear norm of the trained entries. 0 turns it off."
    )
    rank_every: int = Field(
        1, ge=1, description="Steps between its gradients, each of one layer and this many times stronger."
    )
    rank_target: Literal["values", "delta"] = Field(
        "values", description="What has the nuclear norm: the trained weights (paper), or their change."
    )
    rank_exact: bool = Field(False, description="By singular value decomposition instead of products: slow.")

    @field_validator("support", mode="before")
    @classmethod
    def _seed_zero(cls, value: Any) -> Any:
        return (*value, 0) if isinstance(value, list | tuple) and len(value) == 2 else value

    @field_validator("support")
    @classmethod
    def _part_of_parts(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError(f"part {value[0]} of {value[1]} does not exist; the first is 1")
        return value

    @field_validator("parameters")
    @classmethod
    def _whole(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("a count must be whole; a share must be below 1")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.threshold is not None and self.parameters is not None:
            raise ValueError("give threshold or parameters, not both")
        return self

    # -- what is trained ---------------------------------------------------------------------------------------

    def resolved(self, sites: Mapping[str, Any], identity: Any, origin: Origin) -> Self:
        """With the threshold that gives the wanted count. Raises PresetError if that is nothing or everything."""
        tensors = list(self._candidates({name: site.module for name, site in sites.items()}).values())
        return self.model_copy(update={"threshold": self._threshold(tensors), "parameters": None})

    @property
    def has_low_rank_form(self) -> bool:
        return False

    def peak_learning_rate(self) -> float:
        """The paper's eq. 12, fitted for thresholds up to 2e-3; above 6.6e-3 it would stop the learning."""
        return 1e-4 if self.threshold is None else max(1e-4, 1e-3 * math.exp(-350 * self.threshold))

    def patches(
        self, shapes: Mapping[str, LayerShape], origin: Origin, layers: Mapping[str, nn.Module]
    ) -> dict[str, Patch]:
        """One sparse patch per site, empty where nothing is chosen. Raises PresetError if nothing is, anywhere."""
        if missing := [name for name in shapes if name not in layers]:
            raise PresetError(f"sara needs the weights of the base, and those of '{missing[0]}' are not there")
        candidates = self._candidates({name: layers[name] for name in shapes})
        chosen = self._chosen(candidates, origin)
        return {
            name: fresh(
                shape, {part: (candidates[name, part], chosen[name, part]) for part in PARTS if (name, part) in chosen}
            )
            for name, shape in shapes.items()
        }

    def stored(self, name: str, shape: LayerShape, origin: Origin, tensors: Mapping[str, Tensor]) -> SparsePatch:
        return stored(name, shape, tensors)

    def _candidates(self, layers: Mapping[str, nn.Module]) -> dict[tuple[str, str], nn.Parameter]:
        """The parameters to choose from by site and part, each once, even where layers share it."""
        found: dict[tuple[str, str], nn.Parameter] = {}
        seen: set[int] = set()
        for name, layer in layers.items():
            for part in PARTS if self.biases else ("weight",):
                parameter = getattr(layer, part, None)
                if parameter is None or id(parameter) in seen:
                    continue
                if not parameter.is_floating_point():
                    raise PresetError(
                        f"sara trains weights themselves, and those of '{name}' are quantised",
                        "leave the layer out of method.target_modules, or load the base in bf16",
                    )
                seen.add(id(parameter))
                found[name, part] = parameter
        return found

    def _threshold(self, tensors: list[nn.Parameter]) -> float:
        total = sum(tensor.numel() for tensor in tensors)
        if self.threshold is None:
            wanted = DEFAULT_SHARE if self.parameters is None else self.parameters
            count = round(wanted * total) if wanted < 1 else int(wanted)
            if not 0 < count < total:
                raise PresetError(
                    f"method.parameters = {wanted:g} is {'nothing' if count <= 0 else 'everything or more'} of the "
                    f"{total:,} entries of these layers",
                    "give a count, or a share such as 0.05; to train everything, use scratch",
                )
            return threshold_for(tensors, count)
        count = count_below(tensors, self.threshold)
        if not 0 < count < total:
            raise PresetError(
                f"method.threshold = {self.threshold:g} selects {'nothing' if not count else 'everything'} of the "
                f"{total:,} entries of these layers",
                f"{threshold_for(tensors, max(1, total // 20)):.3g} selects a twentieth"
                if total > 1
                else "choose more layers",
            )
        return self.threshold

    def _chosen(self, candidates: Mapping[tuple[str, str], nn.Parameter], origin: Origin) -> dict[Any, Tensor]:
        tensors = list(candidates.values())
        total, threshold = sum(tensor.numel() for tensor in tensors), self._threshold(tensors)
        count = count_below(tensors, threshold) if self.select != "smallest" else 0
        cut = threshold_for(tensors, total - count) if self.select == "largest" else threshold
        found = {}
        for (name, part), parameter in candidates.items():
            if self.select == "random":
                generator = torch_generator("sara random", origin.seed, name, part)
                mask = torch.rand(parameter.shape, generator=generator) < count / total
            else:
                mask = (parameter.detach().float().abs() < cut) == (self.select == "smallest")
            index = positions_of(mask).to(parameter.device)
            if self.support is not None:
                number, parts, seed = self.support
                index = part_of(index, number - 1, parts, seed, name, part)
            found[name, part] = index
        if not any(len(index) for index in found.values()):
            raise PresetError(
                "nothing is left to train in these layers", "choose more layers, or a larger method.parameters"
            )
        return found

    # -- while training ----------------------------------------------------------------------------------------

    def penalise(self, patches: Mapping[str, Patch], step: int, seed: int) -> None:
        """Adds lambda U V^T of one layer, drawn by (seed, step), at its trained entries."""
        if not self.rank_weight or step % self.rank_every:
            return
        matrices = [patch for patch in patches.values() if isinstance(patch, SparsePatch) and _is_matrix(patch)]
        if not matrices:
            return
        generator = torch_generator("sara rank", seed, step)
        patch = matrices[int(torch.randint(len(matrices), (), generator=generator))]
        index = patch.trained_positions("weight").long()
        values = patch.trained_values("weight") if self.rank_target == "values" else patch.change_of("weight").detach()
        matrix = torch.zeros(patch.shape.weight[0], math.prod(patch.shape.weight[1:]), device=values.device)
        matrix.view(-1)[index] = values
        factor = polar_factor(matrix, self.rank_exact)
        patch.add_gradient("weight", self.rank_weight * self.rank_every * factor.reshape(-1)[index])

    def reselect(self, patches: Mapping[str, Patch], step: int, steps: int) -> dict[str, dict[str, Tensor]]:
        """At half of the steps, goes on with the entries still below the threshold, unless none is."""
        if not self.progressive or self.select != "smallest" or step != steps // 2 or not step:
            return {}
        assert self.threshold is not None  # a plan settles it
        live = {
            (name, part): torch.nonzero(patch.trained_values(part).abs() < self.threshold).squeeze(1)
            for name, patch in patches.items()
            if isinstance(patch, SparsePatch)
            for part in patch.parts
        }
        if not any(len(kept) for kept in live.values()):
            return {}
        changed: dict[str, dict[str, Tensor]] = {}
        for (name, part), kept in live.items():
            patch = patches[name]
            assert isinstance(patch, SparsePatch)
            patch.settle(part, kept)
            changed.setdefault(name, {})[f"{part}_change"] = kept
        return changed


def _is_matrix(patch: SparsePatch) -> bool:
    return patch.shape.kind in MATRICES and "weight" in patch.learning
