"""LoRA files of other programs: kohya's, diffusers', PEFT's, LyCORIS's.

Every layer becomes a WeightDelta at a site of the base, with alpha and rsLoRA's scale folded in. What cannot be read
rightly is refused by name; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from studio.base import Base
from studio.deltas import Dense, LowRank, WeightDelta
from studio.errors import AdapterError, nearest, reason_of
from studio.importing.layers import hadamard_of, kronecker_of, low_rank_of, renormalised, rotated
from studio.importing.names import SiteNames
from studio.importing.peft import PeftScale, scales_in_header, scales_of_folder
from studio.importing.source import Source, Weights
from studio.importing.tensor_file import TensorFile
from studio.patch import LayerShape

# What may stand behind a layer's name -> what we call it. Longer endings first.
ENDINGS = {
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    **{
        f".{name}": name
        for name in (
            *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
# Which tensors a layer of each kind must have.
HALVES = (
    {"up", "down"},
    {"A", "B"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1_a", "lokr_w1_b"},
    {"lokr_w2_a", "lokr_w2_b"},
)
KINDS = (
    ("oft_blocks", "oft"),
    ("lokr_w1", "lokr"),
    ("lokr_w1_a", "lokr"),
    ("hada_w1_a", "loha"),
    ("diff", "diff"),
    ("up", "kohya"),
    ("A", "peft"),
)


class ForeignFile(Source):
    """A LoRA file of another program, seen on a base. Raises AdapterError, naming the first key that cannot be read."""

    def __init__(self, name: str, file: TensorFile, base: Base, config: Path | None = None) -> None:
        self.file, self.base_name = file, base.name
        sites = base.sites()
        self.layers, self.spelled = _by_site(file, SiteNames(sites, base.denoiser_name), base)
        self.scales = scales_of_folder(config) if config else scales_in_header(file.header, f"'{file.path}'")
        for site, keys in self.layers.items():
            _check_halves(keys, self.spelled[site], file.path)
        kind = next((kind for ending, kind in KINDS for keys in self.layers.values() if ending in keys), "lora")
        shapes: Mapping[str, LayerShape] = {site: sites[site].shape for site in self.layers}
        super().__init__(name, file.path, kind, None, shapes)

    @property
    def sha256(self) -> str:
        return self.file.sha256

    @property
    def needs_weights(self) -> bool:
        return any({"dora_scale", "magnitude", "oft_blocks"} & keys.keys() for keys in self.layers.values())

    def numbers(self, site: str) -> int:
        return sum(self.file.entries[key].numel for key in self.layers[site].values())

    def read(self, site: str, weights: Weights | None) -> tuple[WeightDelta | None, Tensor | None]:
        own = {name: self.file.floats(key) for name, key in self.layers[site].items()}
        shape = self.shapes[site].weight
        try:
            delta = _fitted(self._delta(site, own, shape, weights), shape)
        except (AdapterError, RuntimeError) as error:  # torch's own words for factors that do not go together
            reason = reason_of(error)
            raise AdapterError(f"'{self.file.path}', layer '{self.spelled[site]}': {reason}") from None
        bias = own.get("diff_b", own.get("b_norm"))
        return delta, bias

    def _delta(
        self, site: str, own: dict[str, Tensor], shape: tuple[int, ...], weights: Weights | None
    ) -> WeightDelta | None:
        full = own.get("diff", own.get("w_norm"))
        delta: WeightDelta | None = Dense(full) if full is not None else None
        if "oft_blocks" in own:
            return rotated(own, _weight(weights, site), float(own["alpha"]) if "alpha" in own else 0.0)
        if "up" in own or "A" in own:
            own |= {"down": own["A"], "up": own["B"]} if "A" in own else {}
            delta = low_rank_of(own, lambda rank: self._scale(site, own, rank))
        elif "hada_w1_a" in own:
            delta = hadamard_of(own, lambda rank: self._scale(site, own, rank), shape)
        elif "lokr_w2" in own or "lokr_w2_a" in own:
            delta = kronecker_of(own, lambda rank: self._scale(site, own, rank), shape)
        if "magnitude" in own:  # PEFT's, always one number for each output
            own["dora_scale"] = own["magnitude"].flatten()
        if "dora_scale" in own and delta is not None:
            weight = _weight(weights, site)
            delta = renormalised(_fitted(delta, shape) or delta, own["dora_scale"], weight)
        return delta

    def _scale(self, site: str, own: Mapping[str, Tensor], rank: int | None) -> float:
        if "alpha" in own:  # without a rank, LyCORIS's alpha means nothing
            return float(own["alpha"]) / rank if rank else 1.0
        component, path = site.split(".", 1)
        scale = self.scales.get(component) or self.scales.get("") or PeftScale()
        return scale.at(path, rank)


def _weight(weights: Weights | None, site: str) -> Tensor:
    if weights is None:
        raise AdapterError("its change depends on the base's weights, and there is no base")
    return weights(site).float()


def _by_site(file: TensorFile, names: SiteNames, base: Base) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys by site and by what they are, and each site's name in the file."""
    layers: dict[str, dict[str, str]] = {}
    spelled: dict[str, str] = {}
    lost: list[str] = []
    for key in file.entries:
        ending = next((end for end in ENDINGS if key.endswith(end)), None)
        if ending is None:
            raise AdapterError(f"'{file.path}' is of a format that the studio does not read: what is '{key}'?")
        layer = key.removesuffix(ending)
        site = names.find(layer)
        if site is None:
            lost.append(layer)
            continue
        if ENDINGS[ending] in layers.setdefault(site, {}):
            raise AdapterError(f"'{file.path}' names '{site}' twice, as '{spelled[site]}' and '{layer}'")
        layers[site][ENDINGS[ending]] = key
        spelled[site] = layer
    if lost or not layers:
        count = len(dict.fromkeys(lost))
        first = lost[0] if lost else "?"
        hint = nearest(first, list(spelled.values())[:200]) if spelled else "is it for another base? see --base"
        raise AdapterError(
            f"'{file.path}': {count} of {count + len(layers)} layers are not in '{base.name}', first '{first}'",
            "is it for another base? see --base" if count > len(layers) else hint,
        )
    return layers, spelled


def _check_halves(keys: Mapping[str, str], layer: str, path: Path) -> None:
    for needed in HALVES:
        missing = needed - keys.keys()
        if missing and missing != needed:
            raise AdapterError(f"'{path}': layer '{layer}' has no '{min(missing)}'", "the file is not complete")
    changes = keys.keys() - {"alpha", "dora_scale", "magnitude", "rescale"}
    pairs = any(name.startswith("lokr_w1") for name in keys) == any(name.startswith("lokr_w2") for name in keys)
    if not changes or not pairs or changes <= {"mid"}:
        raise AdapterError(
            f"'{path}': layer '{layer}' holds only {', '.join(sorted(keys))}", "the file is not complete"
        )


def _fitted(delta: WeightDelta | None, shape: tuple[int, ...]) -> WeightDelta | None:
    """The delta in the weight's shape; 1 x 1 kernels may be spelled out or left out. Raises AdapterError."""
    if delta is None or delta.shape == shape:
        return delta
    if _without_ones(delta.shape) != _without_ones(shape):
        raise AdapterError(f"it changes a weight of shape {delta.shape}, and the base's is {shape}")
    low = delta.low_rank()
    return LowRank(low.down, low.up, shape) if low is not None else Dense(delta.dense().reshape(shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
