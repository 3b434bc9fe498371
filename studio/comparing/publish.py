"""`results.json`, `results.md` and plots of a study, from whatever results there are so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from studio.comparing.jobs import Job
from studio.comparing.plots import Axis, Point, scatter
from studio.comparing.study import Study
from studio.comparing.table import (
    COLUMNS,
    KINDS,
    by_base,
    compared,
    leading,
    of_kind,
    one_each,
    summarised,
    tables,
    way_figure,
)
from studio.files import slugify, write_atomically
from studio.samples import save_png

Result = dict[str, Any]
#: file -> (what is on x, its column, is it logarithmic); how well the lesson was learned is on y
PLOTS = {
    "quality-parameters": ("trained parameters", "num_trainable_params", True),
    "quality-drift": ("drift on unrelated prompts", "drift", False),
    "quality-memory": ("peak memory", "accelerator_memory_max", False),
    "quality-seconds": ("seconds a step", "step_seconds", False),
}


def publish(study: Study, name: str, jobs: Sequence[Job], out: Path, command: str) -> dict[str, Any]:
    """Writes the three and returns the content of `results.json`. Raises DiskError."""
    results = [_without_folders(result) for result in (job.result() for job in jobs) if result is not None]
    content = {
        "format": 1,
        "study": name,
        "description": study.description,
        "command": command,
        "date": date.today().isoformat(),
        "machines": _machines(results),
        "complete": len(results) == len(jobs),
        "jobs": len(jobs),
        "settings": study.model_dump(mode="json"),
        "results": results,
    }
    write_atomically(out / "results.json", json.dumps(content, indent=1) + "\n")
    pictures = [*_plots(study, results, out), *_merge_plots(study, results, out), *_grids(jobs, out)]
    write_atomically(out / "results.md", _page(study, content, results, pictures))
    return content


def _without_folders(result: Result) -> Result:
    """Adapters by name: where the trainings lie on this machine is nobody's business."""
    card = result["card"]
    beside = [other | {"adapter": Path(other["adapter"]).name} for other in card.get("beside", ())]
    return result | {"card": card | {"adapter": Path(card.get("adapter", "")).name, "beside": beside}}


def _machines(results: Sequence[Result]) -> list[str]:
    told = [result["card"].get("machine", {}) for result in results]
    return list(dict.fromkeys(f"{m['device']}, {m['threads']} threads, torch {m['torch']}" for m in told if m))


def _page(study: Study, content: dict[str, Any], results: Sequence[Result], pictures: Sequence[Path]) -> str:
    done = f"{len(results)} of {content['jobs']} results" + ("" if content["complete"] else "; not complete yet")
    minutes = sum(result["seconds"] for result in results) / 60
    lines = [
        f"# Study: {content['study']}",
        "",
        study.description,
        "",
        f"`{content['command']}`, {content['date']}, {'; '.join(content['machines'])}. Base `{_base(results)}`, preset "
        f"`{study.preset}`, seeds {', '.join(map(str, study.seeds))}. {done}, {minutes:.0f} minutes of processes.",
        "",
        "Mean ± standard deviation over seeds and lessons; the difference from the baseline is paired, so lessons' own "
        "difficulty drops out. Memory is what the process held (on a GPU: what torch held), the libraries included.",
        "",
        *(table.markdown() for table in tables(study, results)),
        *(f"![{path.stem}]({path.name})\n" for path in pictures),
    ]
    return "\n".join(lines)


def _base(results: Sequence[Result]) -> str:
    return next((result["card"]["base"] for result in results if "base" in result["card"]), "")


def _plots(study: Study, results: Sequence[Result], out: Path) -> list[Path]:
    made = []
    for kind, heading in KINDS.items():
        trained = compared(study, results, kind)
        if not trained:
            continue
        lead = leading(trained)
        known = {f"{name} alone": summarised(found, "_base") for name, found in by_base(trained).items()}
        known["references"] = summarised(one_each(trained), "_references")
        levels = {label: found[lead].mean for label, found in known.items() if lead in found}
        for stem, (against, column, logarithmic) in PLOTS.items():
            points = []
            for cell in study.cells:
                found_here = summarised(of_kind(trained, "training", cell=cell.name))
                if column in found_here and lead in found_here:
                    points.append(Point(cell.name, found_here[column], found_here[lead]))
            if points:
                name = COLUMNS[lead][0]
                title = f"{name[0].upper()}{name[1:]} against {against} ({heading.lower()})"
                axes = Axis(COLUMNS[column][0], logarithmic), Axis(COLUMNS[lead][0])
                path = out / f"{stem}-{kind}s.png"
                save_png(scatter(title, *axes, points, levels), path, {"study": stem})
                made.append(path)
    return made


def _merge_plots(study: Study, results: Sequence[Result], out: Path) -> list[Path]:
    """For each cell, at its largest K: who is still recognised against what it does to the base."""
    made = []
    for cell in study.cells:
        found = of_kind(results, "concepts", cell=cell.name)
        largest = max((r["concepts"] for r in found), default=1)
        points = []
        for way in dict.fromkeys(way.title for group in study.merges for way in group.ways):
            own = of_kind(found, "concepts", concepts=largest)
            x, y = way_figure(own, way, "loss_rise"), way_figure(own, way, "identity")
            if x and y:
                points.append(Point(way, x, y))
        alone = way_figure(of_kind(found, "concepts", concepts=1), "alone", "identity")
        if points:
            title = f"{largest} concepts in one: recognised against base drift ({cell.name})"
            levels = {"one alone": alone.mean} if alone else {}
            path = out / f"merged-{slugify(cell.name)}.png"
            save_png(scatter(title, Axis("rise of the base's loss"), Axis("identity"), points, levels), path, {})
            made.append(path)
    return made


def _grids(jobs: Sequence[Job], out: Path) -> list[Path]:
    """The pictures behind the merges, for the first seed: a row for each way, a column for each concept or pair."""
    made = []
    for job in jobs:
        sheet = job.card_path.with_name("grid.png")
        first = job.kind in ("concepts", "pairs") and job.facts["seed"] == min(
            other.facts["seed"] for other in jobs if other.kind == job.kind
        )
        if first and job.result() is not None and sheet.exists():
            made.append(out / f"{job.name}.png")
            write_atomically(made[-1], sheet.read_bytes())
    return made
