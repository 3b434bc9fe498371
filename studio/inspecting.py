"""What an adapter or a run is, as plain facts for tables and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio import library
from studio.adapter import Adapter, load_adapter
from studio.deltas.patches import change_of
from studio.method import PatchMethod
from studio.patch import Delta, InPlace
from studio.run import Run


def describe_adapter(name: str) -> dict[str, Any]:
    """The card of an adapter, and per component its layers, ranks, numbers and the norm of its change."""
    path = library.find(name)
    adapter = load_adapter(path)
    card = adapter.card
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "method": card.method["kind"],
        "base": f"{card.base.name} ({card.base.family})",
        "trigger": card.trigger,
        "words": sorted({word for words in adapter.words.values() for word in words}),
        "data": f"{card.data_count} pictures, fingerprint {card.data_fingerprint[:12]}",
        "steps": card.steps,
        "seed": card.seed,
        "licence": card.base.licence,
        "library": card.library_version,
        "exports": _exports(adapter),
        "components": _components(adapter),
    }


def _components(adapter: Adapter) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for component in dict.fromkeys(site.split(".", 1)[0] for site in adapter.patches):
        patches: list[Any] = [
            p for site, terms in adapter.patches.items() if site.startswith(f"{component}.") for p in terms.values()
        ]
        ranks = sorted({patch.rank for patch in patches if hasattr(patch, "rank")})
        rows.append(
            {
                "part": component,
                "layers": len(patches),
                "ranks": "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "",
                "trained_numbers": sum(p.numel() for patch in patches for p in patch.parameters()),
                "norm": _norm(patches),
            }
        )
    return rows


def _norm(patches: list[Any]) -> float | None:
    """The Frobenius norm of the whole change; 0 means that it does nothing, None that only the base could tell."""
    if any(
        not isinstance(patch, Delta) or (patch.depends_on_weight and not isinstance(patch, InPlace))
        for patch in patches
    ):
        return None
    changes = [change_of(patch) for patch in patches]
    return round(sum(change.norm() ** 2 for change in changes if change is not None) ** 0.5, 6)


def _exports(adapter: Adapter) -> str:
    """How exactly each format holds the adapter; `studio export` proves it."""
    patches = [patch for terms in adapter.patches.values() for patch in terms.values()]
    if not all(isinstance(patch, Delta) for patch in patches):
        return "none: it adds modules"
    method = adapter.method
    thin = isinstance(method, PatchMethod) and method.has_low_rank_form
    thin = thin and all(isinstance(p, Delta) and (p.depends_on_weight or p.low_rank() is not None) for p in patches)
    lora = "exact" if thin else "approximate on request"
    return f"diffusers, kohya: {lora}; diff, checkpoint: exact"


def describe_run(folder: Path) -> dict[str, Any]:
    """Where a run stands: its last event, step and loss."""
    history = Run(folder).history()
    steps = [event for event in history if event["kind"] == "step"]
    ended = next((e["kind"] for e in reversed(history) if e["kind"] in ("finished", "stopped", "failed")), "unfinished")
    total = next((e.get("steps") for e in history if e["kind"] == "started"), None)
    return {
        "run": str(folder),
        "state": ended,
        "step": f"{steps[-1]['step'] if steps else 0}/{total or '?'}",
        "loss": round(steps[-1]["loss"], 4) if steps else None,
    }
