"""The export itself: check, write beside the place, prove, move into place, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from studio.adapter import Adapter
from studio.base import Base
from studio.errors import AdapterError, RequestError, nearest
from studio.exporting.checkpoint import export_to_checkpoint
from studio.exporting.destination import REPORT_NAME, move_into_place, refuse_existing, workshop
from studio.exporting.diff import export_to_diff
from studio.exporting.diffusers import export_to_diffusers
from studio.exporting.job import Job
from studio.exporting.kohya import export_to_kohya
from studio.exporting.peft import export_to_peft
from studio.exporting.report import ExportReport, LayerRow
from studio.files import slugify, write_atomically

Format = Callable[[Job, Path], tuple[Path, list[LayerRow]]]
FORMATS: dict[str, Format] = {
    "diffusers": export_to_diffusers,
    "kohya": export_to_kohya,
    "peft": export_to_peft,
    "diff": export_to_diff,
    "checkpoint": export_to_checkpoint,
}
LORAS = ("diffusers", "kohya", "peft")  # formats of bounded rank
SINGLE_FILES = ("kohya", "diff")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def export_adapter(
    adapter: Adapter,
    base: Base,
    to: str,
    out: Path,
    rank: int | None = None,
    allow_approximate: bool = False,
    force: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExportReport:
    """Writes the adapter for another program and proves, in a fresh process, that it reads back as it was.

    `out` becomes a folder, or for "kohya" and "diff" one file if it is named so. `rank` bounds the rank of every layer
    of a LoRA; where that or the method makes it inexact, `allow_approximate` is needed.
    Raises RequestError (ExportRefused, AdapterError) before anything is written, WorkError if the proof fails; then
    nothing is left at `out`.
    """
    out = Path(out).expanduser().absolute()
    single = out.suffix == ".safetensors"
    _check_request(adapter, to, single, rank, dtype)
    refuse_existing(out, force)
    warning = base.check(adapter.card.base, _needs_values(adapter))
    job = Job(adapter, base, _name(adapter, to, out), rank, allow_approximate, dtype, [warning] if warning else [])
    with workshop(out) as room:
        folder = room / "export"
        folder.mkdir()
        path, rows = FORMATS[to](job, folder)
        if not any(row.norm for row in rows) and not adapter.words:
            job.warnings.append("the adapter changes nothing: every delta is zero")
        merged_exactly = to == "checkpoint" and dtype == torch.float32
        report = ExportReport(to, path, _files(to, folder), rows, DTYPES[dtype], merged_exactly, job.warnings)
        if not single:
            _write_report(report, folder)
        move_into_place(path if single else folder, out)
    moved = {made: out if single else out / made.relative_to(folder) for made in (report.path, *report.files)}
    return replace(report, path=moved[report.path], files=[moved[made] for made in report.files])


def _check_request(adapter: Adapter, to: str, single: bool, rank: int | None, dtype: torch.dtype) -> None:
    if to not in FORMATS:
        raise RequestError(f"unknown export format '{to}'", nearest(to, FORMATS))
    if dtype not in DTYPES:
        raise RequestError(f"cannot export in {dtype}", f"there are: {', '.join(DTYPES.values())}")
    if rank is not None and (rank < 1 or to not in LORAS):
        raise RequestError(f"rank {rank} makes no sense for '{to}'", f"--rank, 1 or more, is for {' and '.join(LORAS)}")
    if not adapter.patches and not adapter.words:
        raise AdapterError("the adapter is empty: it has neither patches nor learned words")
    if single and to not in SINGLE_FILES:
        raise RequestError(f"an export to '{to}' is a folder, not one file", "give --out a name without .safetensors")
    if single and adapter.words:
        raise RequestError("learned words need files of their own", "give --out a folder, without .safetensors")


def _needs_values(adapter: Adapter) -> bool:
    patches = (patch for terms in adapter.patches.values() for patch in terms.values())
    return any(getattr(patch, "depends_on_weight", False) for patch in patches)


def _name(adapter: Adapter, to: str, out: Path) -> str:
    """For the file in the folder: the folder's name, or the trigger word if the folder is named after the format."""
    name = out.name.removesuffix(".safetensors")
    return slugify(adapter.card.trigger or "adapter") if name == to else slugify(name)


def _files(to: str, folder: Path) -> list[Path]:
    return [folder] if to == "checkpoint" else sorted(folder.iterdir())


def _write_report(report: ExportReport, folder: Path) -> None:
    """The report beside the files, with names relative to the folder, so that the same export gives the same bytes."""
    facts = report.to_dict()
    facts |= {"path": str(report.path.relative_to(folder)), "files": [str(f.relative_to(folder)) for f in report.files]}
    write_atomically(folder / REPORT_NAME, json.dumps(facts, indent=1) + "\n")
