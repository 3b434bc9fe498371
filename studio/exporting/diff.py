"""`--to diff`: the dense change of every weight, `lora_unet_<path>.diff`, which ComfyUI and A1111 add as it is.

Changes of biases are `.diff_b`.

It holds any method and any kind of layer exactly, at the size of the patched weights. diffusers does not read it.
"""

from __future__ import annotations

from pathlib import Path

from studio.exporting.job import Job
from studio.exporting.kohya import kohya_name, metadata, refuse_without_names, write_model
from studio.exporting.proof import prove_by_formula, prove_in_diffusers
from studio.exporting.report import LayerRow
from studio.exporting.textual_inversion import write_words


def export_to_diff(job: Job, folder: Path) -> tuple[Path, list[LayerRow]]:
    """Writes `<name>.safetensors` and proves it by the formula."""
    refuse_without_names(job)
    tensors = {f"{kohya_name(job, name)}.diff": job.stored(site.dense(), name) for name, site in job.deltas.items()}
    biases = {name: bias for name, site in job.deltas.items() if (bias := site.dense_bias()) is not None}
    tensors |= {f"{kohya_name(job, name)}.diff_b": job.stored(bias, name) for name, bias in biases.items()}
    path = folder / f"{job.name}.safetensors"
    if tensors:
        write_model(path, tensors, metadata(job, "studio.diff", {}, None))
    words = write_words(job, folder)
    prove_in_diffusers(job, None, words, lambda site: job.deltas[site].dense())
    if not tensors:
        return folder, []
    stored = {name: tensors[f"{kohya_name(job, name)}.diff_b"].double() for name in biases}
    rows = prove_by_formula(job, path, lambda site: tensors[f"{kohya_name(job, site)}.diff"].double(), stored)
    return path, list(rows.values())
