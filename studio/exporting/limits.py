"""What the LoRA loaders of other programs cannot hold, and what they need beside it (all measured, peft 0.21.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from studio.errors import ExportRefused
from studio.exporting.approximation import Factors
from studio.exporting.job import Job
from studio.exporting.site_delta import SiteDelta


def refuse_for_peft(deltas: Mapping[str, SiteDelta]) -> None:
    """Raises ExportRefused for layers whose LoRA PEFT gets wrong, or that it has none for.

    Measured with peft 0.21.2: LoRA of a convolution drops the dilation, fails with groups and ignores the padding
    mode.
    """
    reasons = {name: reason for name, site in deltas.items() if (reason := _peft_fault(site))}
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise ExportRefused(
            f"'{name}' {reason}, which LoRA of other programs cannot hold ({len(reasons)} of {len(deltas)} layers)",
            "use --to checkpoint, or --to diff for the dense change",
        )


def _peft_fault(site: SiteDelta) -> str:
    shape = site.shape
    if shape is None or shape.kind in ("embedding", "norm"):
        return "is neither a linear layer nor a convolution"
    if shape.groups != 1:
        return f"is a convolution with {shape.groups} groups"
    if any(step != 1 for step in shape.dilation):
        return f"is a convolution with dilation {shape.dilation}"
    if shape.padding_mode != "zeros":
        return f"pads with '{shape.padding_mode}'"
    bias = site.dense_bias()
    return "has a bias that is changed too" if bias is not None and bias.any() else ""


def refuse_without_loader(job: Job) -> None:
    """Raises ExportRefused where plain diffusers cannot load a LoRA into this base, or not into a patched part."""
    pipe = type(job.base.pipe)
    parts = getattr(pipe, "_lora_loadable_modules", ())
    if not hasattr(pipe, "load_lora_weights") or not pipe.__module__.startswith("diffusers."):
        raise ExportRefused(f"no program reads LoRA files for a {pipe.__name__}", "use --to checkpoint")
    outside = [name for name, site in job.deltas.items() if site.component not in parts]
    if outside:
        raise ExportRefused(
            f"diffusers loads no LoRA into '{outside[0].split('.', 1)[0]}' of a {pipe.__name__} "
            f"({len(outside)} of {len(job.deltas)} layers)",
            "use --to checkpoint",
        )


def attention_output(job: Job, component: str) -> str | None:
    """An attention output layer of a text encoder that the adapter leaves alone, if its loaders need one.

    They recognise a text encoder's file only by its attention layers, and kohya's only by `out_proj`; without it
    diffusers raises or, worse, drops layers. So such a file also carries a LoRA of zeros on this layer.
    """
    own = [site.path for site in job.deltas.values() if site.component == component]
    if not own or any(path.endswith(".out_proj") for path in own):
        return None
    paths = (name for name in job.base.sites() if name.startswith(f"{component}.") and name.endswith(".out_proj"))
    return next(paths, None)


def silent_factors(job: Job) -> dict[str, Factors]:
    """The LoRAs of zeros (rank 1) that make text encoders' files recognisable, by site."""
    silent = {}
    sites = job.base.sites()
    for component in job.base.text_encoder_names:
        name = attention_output(job, component)
        if name is not None:
            shape = sites[name].shape
            silent[name] = Factors(torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1))
    return silent
