"""`--to peft`: a LoRA folder that plain `PeftModel.from_pretrained(network, folder)` reads at the right strength.

For networks that have no diffusers pipeline, such as MusicGen; the adapter must sit in one network. Keys
`base_model.model.<path>.lora_A.weight`, every scale folded in, so that alpha = rank; of PEFT's configuration only what
decides about shapes is written, so that versions on both sides of ours take it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from studio.errors import ExportRefused
from studio.exporting.approximation import Factors
from studio.exporting.job import Job
from studio.exporting.limits import refuse_for_peft
from studio.exporting.proof import ask_fresh_process, compare, write_configuration
from studio.exporting.report import LayerRow
from studio.exporting.tensor_file import write_tensors
from studio.files import write_atomically

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def export_to_peft(job: Job, folder: Path) -> tuple[Path, list[LayerRow]]:
    """Writes the folder and proves it. Raises ExportRefused before, WorkError after writing."""
    component = _only_component(job)
    refuse_for_peft(job.deltas)
    factors = {name: Factors(job.stored(f.down, name), job.stored(f.up, name)) for name, f in job.factors().items()}
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        key = f"base_model.model.{job.deltas[name].path}"
        tensors |= {f"{key}.lora_A.weight": pair.down, f"{key}.lora_B.weight": pair.up}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    ranks = {job.deltas[name].path: pair.rank for name, pair in factors.items()}
    config = peft_config(ranks, job.adapter.card.base.name)
    write_atomically(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        module, name = write_configuration(job.base.components[component], Path(scratch))
        answers = ask_fresh_process("peft", scratch, module, name, component, str(folder))
        rows = compare(job, answers, lambda site: factors[site].product(), "PEFT")
    return folder, [replace(row, rank=factors[row.site].rank) for row in rows.values()]


def _only_component(job: Job) -> str:
    components = sorted({site.component for site in job.deltas.values()})
    if job.adapter.words:
        raise ExportRefused("a PEFT folder holds no learned words", "use --to diffusers")
    if len(components) != 1:
        raise ExportRefused(
            f"a PEFT folder is for one network, and the adapter is in {len(components)}: {', '.join(components)}",
            "use --to diffusers",
        )
    return components[0]


def peft_config(ranks: Mapping[str, int], base_name: str) -> dict[str, Any]:
    """LoraConfig arguments for these ranks by path. Module names match ends of paths, patterns are anchored."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
    }
