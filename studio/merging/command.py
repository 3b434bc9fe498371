"""`studio merge` behind the command line: from words to a file, an entry of the library, or an export."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from studio import library
from studio.errors import RequestError
from studio.files import slug, write_atomically
from studio.merging.memory import parse_bytes
from studio.merging.merger import Merger, Progress
from studio.merging.plan import make_plan
from studio.merging.recipe import Recipe, make_recipe, parse_parts, read_recipe
from studio.merging.report import MergeReport
from studio.merging.unmerging import Unmerger


@dataclass(frozen=True)
class MergeOrder:
    """What the command line asks for. `changes` are fields of the recipe that it gives; None stands for not given."""

    adapters: tuple[str, ...] = ()
    recipe: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    out: Path | None = None
    name: str | None = None
    to: str | None = None
    max_ram: str | None = None
    force: bool = False
    without: str | None = None


def merge_to_order(order: MergeOrder, progress: Progress | None = None) -> tuple[MergeReport, Any]:
    """Merges and writes. Returns the report, and the export's where one was asked for. Raises StudioError."""
    target = _target(order)
    if order.without is not None:
        return _taken_out(order, target), None
    plan = make_plan(recipe_of(order), max_bytes=parse_bytes(order.max_ram) if order.max_ram else None)
    merger = Merger(plan)
    if order.to:
        return _exported(merger, order, target)
    report = merger.save(target, progress)
    if order.name:
        facts = {"added": round(time.time()), "base": plan.base_name, "merge": report.label}
        write_atomically(target.with_suffix(".json"), json.dumps(facts))
    return report, None


def _taken_out(order: MergeOrder, target: Path) -> MergeReport:
    """A merge with one parent's share taken out again: `--without`. Raises StudioError."""
    if len(order.adapters) != 1 or order.recipe or order.to or any(order.changes.values()):
        raise RequestError("--without takes a parent out of one merge", "name that merge alone, with --out or --name")
    began = time.monotonic()
    unmerger = Unmerger(order.adapters[0], order.without or "")
    card = unmerger.save(target)
    report = MergeReport(
        strategy=str(card.method.get("strategy")),
        options=dict(card.method.get("options", {})),
        reason=f"without '{order.without}'",
        rows=[],
        parents=card.parents,
    )
    report.path, report.bytes, report.seconds = target, target.stat().st_size, time.monotonic() - began
    if order.name:
        facts = {"added": round(time.time()), "base": unmerger.source.trained_on, "merge": report.label}
        write_atomically(target.with_suffix(".json"), json.dumps(facts))
    return report


def recipe_of(order: MergeOrder) -> Recipe:
    """The recipe in the file, if any, with what the command line changes. Raises RequestError."""
    content = read_recipe(order.recipe).model_dump(exclude_unset=True) if order.recipe else {}
    if order.adapters:
        if order.recipe:
            raise RequestError(
                "adapters are named twice, on the command line and in the recipe", "leave one of them out"
            )
        content["adapters"] = parse_parts(order.adapters)
    if not content.get("adapters"):
        raise RequestError("merge needs adapters", "for example: studio merge my-cat:0.8 my-dog:0.6 --name both")
    content |= {name: value for name, value in order.changes.items() if value is not None}
    if order.options:
        content["options"] = {**content.get("options", {}), **dict(_option(text) for text in order.options)}
    return make_recipe(content)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--option '{text}' is not of the form KEY=VALUE", "for example --option density=0.3")
    return key, yaml.safe_load(value)


def parse_rank(text: str | None) -> int | str | None:
    """`--rank`: a number or `auto`. Raises RequestError."""
    if text is None or text == "auto":
        return text
    if not text.isdigit() or not int(text):
        raise RequestError(f"--rank '{text}' is neither a number nor auto", "for example --rank 16")
    return int(text)


def _target(order: MergeOrder) -> Path:
    """Where the result goes. Raises RequestError if that is not clear, or taken."""
    if (order.out is None) == (order.name is None):
        raise RequestError("merge needs one place for the result", "add --out FILE, or --name NAME for the library")
    target = order.out or library.library_dir() / f"{slug(order.name or '')}.safetensors"
    target = target.expanduser()
    if order.to:
        return target  # the export looks after it
    if order.out is not None and target.suffix != ".safetensors":
        raise RequestError(f"--out '{target}' is no .safetensors file", f"for example --out {target.name}.safetensors")
    if target.exists() and not order.force:
        raise RequestError(
            f"'{target.stem if order.name else target}' exists already", "choose another, or add --force"
        )
    own = {library.find(text.rpartition(":")[0] or text).resolve() for text in order.adapters if _is_file(text)}
    if target.resolve() in own:
        raise RequestError(f"'{target}' is one of the adapters to merge", "write the result elsewhere")
    return target


def _is_file(text: str) -> bool:
    return Path(text.rpartition(":")[0] or text).is_file()


def _exported(merger: Merger, order: MergeOrder, target: Path) -> tuple[MergeReport, Any]:
    """Bakes the merge into another program's format: `--to checkpoint` and the others of `studio export`."""
    from studio.bases.registry import load_base
    from studio.exporting import export_adapter

    if order.name:
        raise RequestError("an export is a folder or file, and none of the library", "use --out with --to")
    adapter = merger.adapter()
    base = merger.plan.base or load_base(merger.plan.base_name)
    report = export_adapter(adapter, base, str(order.to), target, force=order.force)
    merger.report.path = report.path
    return merger.report, report
