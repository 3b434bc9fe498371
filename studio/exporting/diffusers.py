"""`--to diffusers`: a LoRA folder that plain `pipe.load_lora_weights(folder)` reads at the right strength.

Keys `unet.<site>.lora_A.weight` (R, I, k...) and `.lora_B.weight` (O, R, 1...), every scale folded in, so that
alpha = rank; and in the header the exact arguments of PEFT's LoraConfig, without which mixed ranks load wrongly up to
diffusers 0.39. Only five of them: all of PEFT 0.21's make older ones raise TypeError.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.exporting.approximation import Factors
from studio.exporting.job import Job
from studio.exporting.limits import refuse_for_peft, refuse_without_loader, silent_factors
from studio.exporting.proof import prove_in_diffusers
from studio.exporting.report import LayerRow
from studio.exporting.tensor_file import write_tensors
from studio.exporting.textual_inversion import write_words

FILE_NAME = "pytorch_lora_weights.safetensors"
TEXT_MODEL = "text_model."  # a level of CLIP that transformers 5 dropped; every version loads keys that have it


def export_to_diffusers(job: Job, folder: Path) -> tuple[Path, list[LayerRow]]:
    """Writes the folder and proves it. Raises ExportRefused before, WorkError after writing."""
    refuse_without_loader(job)
    refuse_for_peft(job.deltas)
    factors = {name: _stored(job, name, f) for name, f in job.factors().items()}
    written = factors | silent_factors(job)
    tensors = {}
    for name, pair in written.items():
        tensors[f"{_key(job, name)}.lora_A.weight"] = job.stored(pair.down, name)
        tensors[f"{_key(job, name)}.lora_B.weight"] = job.stored(pair.up, name)
    if tensors:
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(lora_configs(written), sort_keys=True)}
        write_tensors(folder / FILE_NAME, tensors, header)
    words = write_words(job, folder)
    rows = prove_in_diffusers(job, folder if tensors else None, words, lambda site: factors[site].product())
    return folder, [replace(row, rank=factors[row.site].rank) for row in rows.values()]


def _stored(job: Job, name: str, factors: Factors) -> Factors:
    return Factors(job.stored(factors.down, name), job.stored(factors.up, name))


def _key(job: Job, name: str) -> str:
    component, path = name.split(".", 1)
    return f"{component}.{TEXT_MODEL if _lost_a_level(job, component) else ''}{path}"


def _lost_a_level(job: Job, component: str) -> bool:
    part: Any = job.base.components[component]
    return type(part).__name__ == "CLIPTextModel" and not hasattr(part, "text_model")


def lora_configs(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """LoraConfig arguments of each component, keyed `<component>.<argument>`.

    Patterns are anchored, because PEFT matches ends of names; module names cannot be, but a layer too many stays zero.
    """
    configs: dict[str, Any] = {}
    for component in dict.fromkeys(name.split(".", 1)[0] for name in factors):
        ranks = {
            name.split(".", 1)[1].removeprefix(TEXT_MODEL): pair.rank
            for name, pair in factors.items()
            if name.startswith(f"{component}.")
        }
        usual = Counter(ranks.values()).most_common(1)[0][0]
        level = r"(text_model\.)?" if component.startswith("text_encoder") else ""
        unusual = {f"^{level}{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
        configs |= {
            f"{component}.r": usual,
            f"{component}.lora_alpha": usual,
            f"{component}.target_modules": sorted(ranks),
            f"{component}.rank_pattern": unusual,
            f"{component}.alpha_pattern": unusual,
        }
    return configs
