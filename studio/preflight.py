"""`studio check`: data, settings, memory and the export, looked at before anything is trained."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from studio.adapting import AdapterTraining
from studio.data.cache import Cache
from studio.errors import PresetError, StudioError
from studio.fit import fit, peak_memory_gib
from studio.method import PatchMethod
from studio.run import Run
from studio.training import Order, adapter_training, plan

PROBE_STEPS = 2


def preflight(order: Order) -> dict[str, Any]:
    """The report of a request: what would be trained on what, for how long, and whether the export works.

    Trains two steps in a temporary folder to measure them, and rehearses the exports. Raises RequestError.
    """
    training = plan(order)
    preset, pictures = training.preset, training.pictures
    if pictures is None or training.card is None or not isinstance(preset.method, PatchMethod):
        raise PresetError("check looks at presets that learn from pictures")
    report: dict[str, Any] = {
        "base": preset.base,
        "method": preset.method.kind,
        "changed": training.changes,
        "note": training.base.notes[:-1],
        "attention": training.base.notes[-1] if training.base.notes else "",
        pictures.noun: pictures.count,
        "held out": len(pictures.held_out),
        "left out": [f"'{name}' {reason}" for name, reason in pictures.report.dropped],
        "warning": list(pictures.report.warnings),
        "bucket": [f"{size}: {count}" for size, count in pictures.report.to_dict()["buckets"].items()],
        "trigger": training.card.trigger,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probe = preset.model_copy(
            update={
                "steps": PROBE_STEPS,
                "sample_every": 0,
                "validate_every": 0,
                "data": preset.data.model_copy(update={"prior": preset.data.prior.model_copy(update={"pictures": 0})}),
            }
        )
        run = Run(folder / "run")
        run.prepare()
        cache = Cache(folder / "cache")
        task = adapter_training(preset.method, training.base, probe, run, pictures, training.card, cache)
        for _ in task.prepare():
            pass
        stamps = [
            (event, time.monotonic()) for event in fit(task, probe, run, training.accelerator) if event.kind == "step"
        ]
        task.close()
        (_, first), (_, second) = stamps
        report["layers"] = len(task.adapter.patches)
        report["trained numbers"] = sum(p.numel() for p in task.adapter.parameters())
        report["seconds per step"] = round(second - first, 3)
        report["minutes in all, about"] = round((second - first) * preset.steps / 60, 1)
        report["peak memory GiB"] = round(peak_memory_gib(), 2)
        report["export"] = [_rehearse(task, training.base, target, folder / target) for target in preset.export]
    return report


def _rehearse(task: AdapterTraining, base: Any, target: str, out: Path) -> str:
    from studio.exporting import export_adapter

    try:
        return f"{target}: {export_adapter(task.adapter, base, target, out).to_dict()['status']}"
    except StudioError as error:
        return f"{target}: {error.message}"
