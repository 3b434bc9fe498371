"""How long a training will take and what memory it needs, as far as earlier ones on this machine tell; no model is
loaded. Runs and checks of the same base, method, size and precision count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from studio import library
from studio.files import write_atomically
from studio.paths import studio_home
from studio.trace import trace_of

LOOKED_AT = 40  # runs, the newest
KEPT = 200  # measurements of checks
FEWEST_STEPS = 5


@dataclass(frozen=True)
class Measured:
    """What a step took. `samples` a step; `exact` if the settings are the same that are asked about."""

    seconds_per_step: float
    samples: int
    memory_gib: float | None
    source: str
    exact: bool = True


def estimate(content: dict[str, Any]) -> str:
    """A sentence on time and memory, or on how to learn them."""
    found = _nearest(content)
    if found is None:
        return "How long it takes is not known yet: no such training was made here. 'Check first' measures it."
    scale = 1.0 if found.exact else _samples(content) / found.samples
    minutes = found.seconds_per_step * scale * content["steps"] / 60
    time = f"{minutes:.0f} min" if minutes >= 1.5 else f"{60 * minutes:.0f} s"
    memory = f" and {found.memory_gib:.1f} GiB" if found.exact and found.memory_gib else ""
    roughly = "about" if found.exact else "very roughly"
    return f"{roughly.capitalize()} {time} of steps{memory}, by {found.source}; sample pictures come on top."


def remember_check(content: dict[str, Any], report: dict[str, Any]) -> None:
    """Keeps what `studio check` measured of a preset."""
    seconds, memory = report["seconds per step"], report["peak memory GiB"]
    facts = {"seconds": seconds, "memory": memory, "samples": _samples(content)}
    known = {**_checks(), _key(content): facts}
    write_atomically(_checks_path(), json.dumps(dict(list(known.items())[-KEPT:])))


def _nearest(content: dict[str, Any]) -> Measured | None:
    key, loose = _key(content), _loose(content)
    rough: Measured | None = None
    for known, measured in _measurements():
        if known == key:
            return measured
        if rough is None and json.loads(known)[: len(loose)] == loose:
            rough = measured
    return None if rough is None else Measured(rough.seconds_per_step, rough.samples, None, rough.source, exact=False)


def _measurements() -> Iterator[tuple[str, Measured]]:
    """Of runs, the newest first, then of checks."""
    for folder in library.run_folders()[:LOOKED_AT]:
        path = folder / "preset.yaml"
        key = _key_of_file(path, path.stat().st_mtime_ns) if path.exists() else ""
        trace = trace_of(folder)
        each = trace.seconds_per_step()
        if key and each is not None and len(trace.steps) >= FEWEST_STEPS:
            memory = trace.steps[-1].get("peak_memory_gib")
            yield key, Measured(each, json.loads(key)[-1], memory, f"the run '{folder.name}'")
    for key, facts in reversed(_checks().items()):
        yield key, Measured(facts["seconds"], facts["samples"], facts["memory"], "the last check of such a one")


@lru_cache(maxsize=256)
def _key_of_file(path: Path, _changed: int) -> str:
    try:
        return _key(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""


def _loose(content: dict[str, Any]) -> list[Any]:
    """What the time of a sample depends on most."""
    data = content.get("data", {})
    return [content["base"], content["method"]["kind"], data.get("resolution"), content.get("mixed_precision")]


def _key(content: dict[str, Any]) -> str:
    """All that time and memory of a step depend on; the samples of a step come last."""
    method, prior = content["method"], content.get("data", {}).get("prior", {}).get("pictures", 0)
    rest = [method.get("rank"), method.get("target_modules"), content.get("gradient_checkpointing"), bool(prior)]
    rest += [content.get("batch_size", 1), content.get("gradient_accumulation_steps", 1)]
    return json.dumps([*_loose(content), *rest, _samples(content)])


def _samples(content: dict[str, Any]) -> int:
    return int(content.get("batch_size", 1)) * int(content.get("gradient_accumulation_steps", 1))


def _checks_path() -> Path:
    return studio_home() / "cache" / "checked.json"


def _checks() -> dict[str, Any]:
    try:
        found = json.loads(_checks_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
