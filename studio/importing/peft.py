"""The scales that PEFT's configuration gives to A and B: alpha / r or alpha / sqrt(r), by pattern.

Found beside a PEFT folder's weights as `adapter_config.json`, or in the header of a file that diffusers wrote, under
`lora_adapter_metadata`, each argument there with its component in front: `unet.r`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from studio.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
METADATA_KEY = "lora_adapter_metadata"
# Arguments that change what the tensors mean, in ways that are not read here.
FOREIGN = ("lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "target_parameters")
TYPES = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class PeftScale:
    """alpha and r by layer; `alpha` None means alpha = rank, `rank` None that of the tensors."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    rslora: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> PeftScale:
        """From the arguments of PEFT's LoraConfig. Raises AdapterError for what cannot be read rightly."""
        kind = str(config.get("peft_type", "LORA")).rsplit(".", 1)[-1].upper()
        if kind not in TYPES:
            raise AdapterError(f"{where} is a PEFT adapter of type {kind}", f"the studio reads {', '.join(TYPES)}")
        strange = next((name for name in FOREIGN if config.get(name)), None)
        if strange:
            raise AdapterError(f"{where} was trained with PEFT's '{strange}', which the studio does not read")
        alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
        return cls(
            None if alpha is None else float(alpha),
            {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            None if rank is None else int(rank),
            {str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            bool(config.get("use_rslora")),
        )

    def at(self, layer: str, rank: int | None) -> float:
        """The scale of a layer. `rank` is that of its tensors, None where they have none (a full LoKr)."""
        alpha = _matching(self.alphas, layer, self.alpha)
        rank = rank or _matching(self.ranks, layer, self.rank)
        return 1.0 if alpha is None or rank is None else alpha / (rank**0.5 if self.rslora else rank)


T = TypeVar("T")


def _matching(patterns: Mapping[str, T], layer: str, default: T | None) -> T | None:
    """PEFT's patterns are regular expressions for the end of a layer's name."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)), default)


def scales_of_folder(config: Path) -> dict[str, PeftScale]:
    """Of a PEFT folder: one configuration for all components."""
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"'{config}' cannot be read: {error}") from None
    return {"": PeftScale.of(content, f"'{config}'")}


def scales_in_header(header: Mapping[str, str], where: str) -> dict[str, PeftScale]:
    """Of a file by diffusers: a configuration for each component; none where the header has none."""
    if METADATA_KEY not in header:
        return {}
    try:
        content = json.loads(header[METADATA_KEY])
        by_component: dict[str, dict[str, Any]] = {}
        for name, value in content.items():
            component, _, argument = name.partition(".")
            by_component.setdefault(component, {})[argument] = value
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"the metadata in {where} is damaged: {error}") from None
    return {component: PeftScale.of(config, where) for component, config in by_component.items()}
