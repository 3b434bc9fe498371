"""`--to kohya`: one LoRA file as ComfyUI, A1111 and Forge read it.

Keys `lora_unet_<path_with_underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`; delta = up down alpha / rank.
All layers have the same alpha, because alphas that differ load wrongly in diffusers 0.42; where the rank differs, `up`
carries the rest. The names are diffusers' own, which those programs know for SD 1.x, 2.x and SDXL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from studio.errors import ExportRefused
from studio.exporting.approximation import Factors, product
from studio.exporting.job import Job
from studio.exporting.limits import refuse_for_peft, refuse_without_loader, silent_factors
from studio.exporting.proof import prove_by_formula, prove_in_diffusers
from studio.exporting.report import LayerRow
from studio.exporting.tensor_file import data_hash, write_tensors
from studio.exporting.textual_inversion import write_words

# Layers of SDXL that diffusers names otherwise than those who read such files.
RENAMED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
DENOISER = "UNet2DConditionModel"


def export_to_kohya(job: Job, folder: Path) -> tuple[Path, list[LayerRow]]:
    """Writes `<name>.safetensors` and proves it twice: in plain diffusers and by the formula."""
    refuse_without_names(job)
    refuse_without_loader(job)
    refuse_for_peft(job.deltas)
    factors = job.factors()
    alpha = float(Counter(pair.rank for pair in factors.values()).most_common(1)[0][0]) if factors else 1.0
    tensors = kohya_tensors(job, factors | silent_factors(job), alpha)
    path = folder / f"{job.name}.safetensors"
    if tensors:
        write_model(path, tensors, metadata(job, "networks.lora", factors, alpha))
    words = write_words(job, folder)

    def meant(site: str) -> Tensor:
        down, up = (tensors[f"{kohya_name(job, site)}.lora_{side}.weight"] for side in ("down", "up"))
        return product(down, up) * (alpha / factors[site].rank)

    loaded = prove_in_diffusers(job, path if tensors else None, words, meant)
    if not tensors:
        return folder, []
    formula = prove_by_formula(job, path, meant)
    worst = {site: max(row.error, formula[site].error) for site, row in loaded.items()}
    return path, [replace(row, rank=factors[site].rank, error=worst[site]) for site, row in loaded.items()]


def kohya_tensors(job: Job, factors: Mapping[str, Factors], alpha: float) -> dict[str, Tensor]:
    """The file's tensors: `up` is scaled so that up down alpha / rank is the delta at any rank."""
    tensors = {}
    for name, pair in factors.items():
        key = kohya_name(job, name)
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=job.dtype)
        tensors[f"{key}.lora_down.weight"] = job.stored(pair.down, name)
        tensors[f"{key}.lora_up.weight"] = job.stored(pair.up * (pair.rank / alpha), name)
    return tensors


def refuse_without_names(job: Job) -> None:
    """Raises ExportRefused for bases whose layers have other names in kohya's files, in ways we cannot check here."""
    denoiser = type(job.base.denoiser).__name__
    if denoiser != DENOISER:
        raise ExportRefused(
            f"kohya's names are known for the UNets of SD 1.x, 2.x and SDXL, and '{job.base.name}' has a {denoiser}",
            "use --to diffusers, which ComfyUI also reads for transformers",
        )
    outside = [name for name, site in job.deltas.items() if site.component not in _prefixes(job)]
    if outside:
        raise ExportRefused(f"kohya's format has no name for '{outside[0]}'", "use --to checkpoint")


def kohya_name(job: Job, name: str) -> str:
    """`lora_unet_mid_block_...`: the module of a site in kohya's spelling."""
    component, path = name.split(".", 1)
    if component.startswith("text_encoder") and path.startswith("encoder."):
        path = f"text_model.{path}"  # the level that transformers 5 dropped
    for ours, theirs in RENAMED.items():
        path = path.replace(ours, theirs)
    return f"{_prefixes(job)[component]}_{path}".replace(".", "_")


def _prefixes(job: Job) -> dict[str, str]:
    if "text_encoder_2" in job.base.components:
        return {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    return {"unet": "lora_unet", "text_encoder": "lora_te"}


def metadata(job: Job, module: str, factors: Mapping[str, Factors], alpha: float | None) -> dict[str, str]:
    """`ss_*` and `modelspec.*`: what programs show of a file. No times, so the same adapter gives the same bytes."""
    card = job.adapter.card
    version, architecture = _version(job)
    side = str(getattr(job.base, "resolution", 512))
    found = {
        "format": "pt",
        "ss_network_module": module,
        "ss_base_model_version": version,
        "ss_sd_model_name": card.base.name,
        "ss_output_name": job.name,
        "ss_seed": str(card.seed),
        "ss_steps": str(card.steps),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": job.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.description": f"method {card.method['kind']}",
    }
    if alpha is not None:
        ranks = {pair.rank for pair in factors.values()}
        found |= {"ss_network_dim": str(min(ranks)) if len(ranks) == 1 else "Dynamic", "ss_network_alpha": str(alpha)}
    if card.trigger:
        found["modelspec.trigger_phrase"] = card.trigger
    prediction = getattr(job.base.pipe.scheduler.config, "prediction_type", None)
    if prediction in ("epsilon", "v_prediction"):
        found["modelspec.prediction_type"] = prediction.removesuffix("_prediction")
    return found


def _version(job: Job) -> tuple[str, str]:
    """kohya's and modelspec's words for the base: by them Forge chooses where a file is offered."""
    if "text_encoder_2" in job.base.components:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if getattr(job.base.denoiser.config, "cross_attention_dim", 768) == 1024:
        return "sd_v2", "stable-diffusion-v2-512"
    return "sd_v1", "stable-diffusion-v1"


def write_model(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A file that names its own hash, as modelspec and the web UIs want it."""
    digest = data_hash(tensors)
    write_tensors(path, tensors, {**header, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest})
