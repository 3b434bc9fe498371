"""Merge: several concepts made one, looked at beside its parents before it is kept."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio import library
from studio.errors import PresetError, RequestError
from studio.files import slugify
from studio.paths import studio_home
from studio.schemas import schemas
from ui import examples, fields, form, pieces
from ui.adapters import adapter_choices, checked, make_sliders, sliders
from ui.blend import Blend, Trial, trial_of, trigger_of
from ui.commands import ask
from ui.errors import plain
from ui.form import Field
from ui.pages import generate
from ui.registry import Page, opened_page

MOST_CONCEPTS = 6
MOST_PROMPTS = 6
RANK = Field(
    "rank", "text", "Highest rank of a layer: a number, or auto. Empty: what the strategy gives.", optional=True
)
TOLERANCE = Field(
    "tolerance", "float", "Relative error that a lower rank may cost.", optional=True, minimum=0, below=1
)  # fmt: skip
PROMPT_SEEDS = Field("seeds", "int", "Each prompt is drawn with so many.", default=1, minimum=1, maximum=4)
STEPS = Field("steps", "int", "Sampling steps. Empty: the base's own.", optional=True, minimum=1, maximum=1000)
SEED = Field("seed", "int", "Of dare and della, which drop numbers at random.", default=0, minimum=0)


def strategy_fields() -> dict[str, list[Field]]:
    return {name: form.fields_of(entry["schema"]) for name, entry in schemas()["strategies"].items()}


def strategy_choices() -> list[tuple[str, str]]:
    found = [(f"{name} - {entry['summary']}", name) for name, entry in schemas()["strategies"].items()]
    return [("auto - gram where the files tell what the layers see, else the exact sum", "auto"), *found]


# -- what is asked for -------------------------------------------------------------------------------------------


def blend_of(names: list[str] | None, weights: Sequence[float], strategy: str, values: Sequence[Any]) -> Blend:
    """`values`: rank, tolerance, seed, then the settings of every strategy. Raises RequestError, PresetError."""
    chosen = checked(names)
    if len(chosen) < 2:
        raise RequestError("a merge needs two concepts or more", "choose them above")
    fields = strategy_fields()
    if strategy not in ("auto", *fields):
        raise RequestError(f"there is no strategy '{strategy}'", "reload the page")
    rank, tolerance, seed = (
        form.value_of(f, value) for f, value in zip((RANK, TOLERANCE, SEED), values[:3], strict=True)
    )
    if rank and rank != "auto" and not (rank.isdigit() and int(rank)):
        raise PresetError(f"'Rank' cannot be '{rank}'", "a number of 1 or more, or auto")
    own = [(name, field) for name, mine in fields.items() for field in mine]
    pairs = zip(own, values[3:], strict=True)
    options = tuple((field.key, form.value_of(field, value)) for (name, field), value in pairs if name == strategy)
    strengths = tuple(float(weight) for weight in weights[: len(chosen)])
    return Blend(tuple(chosen), strengths, strategy, options, rank, tolerance, seed)


def prompts_for(names: list[str] | None) -> str:
    """A prompt for each concept, and one for none of them, which should look as if nothing had been merged."""
    words = [word for name in names or () for word in trigger_of(name).split(", ") if word]
    return "\n".join([*(f"a {word}" for word in dict.fromkeys(words)), "a dog"]) if words else ""


# -- merging -----------------------------------------------------------------------------------------------------


def merged(blend: Blend) -> Trial:
    """The trial of a blend, merged now if it was not before. Raises StudioError."""
    trial = Trial(blend.folder)
    if not trial.report():
        trial.folder.mkdir(parents=True, exist_ok=True)
        trial.keep_report(ask(*blend.arguments(trial.file)), blend.names)
    return trial


@plain
def run(names: list[str] | None, prompts: str, seeds: Any, steps: Any, strategy: str, *rest: Any) -> Any:
    """Merges, then draws each prompt with the base alone, each concept alone, and the merge: (report, sheet, trial)."""
    blend = blend_of(names, rest[:MOST_CONCEPTS], strategy, rest[MOST_CONCEPTS:])
    count, sampling = form.value_of(PROMPT_SEEDS, seeds), form.value_of(STEPS, steps)
    yield pieces.say("Merging. This looks at every layer and takes some seconds."), "", gr.skip(), gr.skip()
    trial = merged(blend)
    kept = gr.update(value=_free_name(blend.names)), trial.folder.name
    yield report_of(trial.report()), pieces.say("Drawing the comparison."), *kept
    lines = [line.strip() for line in str(prompts or "").splitlines() if line.strip()][:MOST_PROMPTS]
    if not lines:
        yield gr.skip(), pieces.say("No prompts, so nothing is drawn."), gr.skip(), gr.skip()
        return
    for sheet in draw_sheet(blend, trial, lines, count, sampling):
        yield gr.skip(), sheet, gr.skip(), gr.skip()


def cells_for(
    blend: Blend, trial: Trial, prompts: Sequence[str], seeds: int, steps: int | None
) -> list[dict[str, Any]]:
    """One picture for each column, prompt and seed: column by column, so that adapters are put on once."""
    alone = [[f"{name}:{weight:g}"] for name, weight in zip(blend.names, blend.weights, strict=True)]
    worn = [[], *alone, [f"{trial.file}:1"]]
    return [
        {"adapters": adapters, "prompt": prompt, "seed": seed, "steps": steps}
        for adapters, prompt, seed in itertools.product(worn, prompts, range(seeds))
    ]


def draw_sheet(
    blend: Blend, trial: Trial, prompts: Sequence[str], seeds: int, steps: int | None
) -> Iterator[str]:  # fmt: skip
    """The comparison as it comes, as HTML. The pictures stay in the trial's folder. Raises RequestError."""
    columns = ["base alone", *(f"{n} alone" for n in blend.names), "merged"]
    labels = [f"{prompt}, seed {seed}" if seeds > 1 else prompt for prompt in prompts for seed in range(seeds)]
    cells = cells_for(blend, trial, prompts, seeds, steps)
    found: list[Path | None] = [None] * len(cells)

    def rows() -> list[tuple[str, list[Path | None]]]:
        return [(label, found[i :: len(labels)]) for i, label in enumerate(labels)]

    base = library.facts_of(library.find(blend.names[0])).get("base")
    folder = trial.folder / f"pictures-{time.time_ns():x}"
    request = {"prompt": prompts[0], "base": base, "cells": cells, "folder": str(folder)}
    note = ""
    for answer in generate.ENGINE.draw(request):
        if "error" in answer:
            raise RequestError(answer["error"], answer.get("hint", ""))
        if "note" in answer:
            note = pieces.say(answer["note"])
            yield note + pieces.picture_grid(columns, rows())
        elif "picture" in answer:
            found[answer["number"]] = Path(answer["picture"])
            done = sum(path is not None for path in found)
            bar = f"<progress max='{len(found)}' value='{done}' aria-label='{done} of {len(found)} drawn'></progress>"
            yield f"<div class='run'>{bar}</div>{note}{pieces.picture_grid(columns, rows())}"
    trial.keep_sheet(columns, rows())
    yield sheet_of(trial)


def sheet_of(trial: Trial) -> str:
    sheet = trial.sheet()
    rows = [(label, [Path(path) if path else None for path in row]) for label, row in sheet.get("rows", ())]
    return pieces.picture_grid(sheet.get("columns", ()), rows, large=True)


def report_of(report: dict[str, Any]) -> str:
    """What `studio merge` says, in words first."""
    if not report:
        return pieces.empty("Nothing is merged yet", "Choose two concepts above, then try them together.")
    reason = report.get("reason", "")
    why = f" {reason[:1].upper()}{reason[1:]}." if reason not in ("", "asked for") else ""
    parents = ", ".join(f"{p['name']} x {p['weight']:g}" for p in report["parents"])
    layers = report["layers"]
    facts = [
        ("result", report["result"]), ("layers", len(layers)),
        ("in both", sum(row["adapters"] > 1 for row in layers)), ("size", pieces.size(report["bytes"])),
        ("took", f"{report['seconds']:.1f} s"), ("memory, peak", pieces.size(report["peak_memory_bytes"])),
    ]  # fmt: skip
    boxes = "".join(f"<div><dt>{name}</dt><dd>{pieces.text(value)}</dd></div>" for name, value in facts)
    warnings = "".join(pieces.say(f"Note: {line}.", "") for line in report.get("warnings", ()))
    worst = sorted(layers, key=lambda row: row["norm"], reverse=True)[:12]
    cells = [
        [pieces.text(r["site"]), str(r["adapters"]), pieces.text(r["form"]), str(r["rank"] or "-"), f"{r['norm']:.3g}"]
        for r in worst
    ]
    table = pieces.table(["layer", "concepts", "form", "rank", "size of the change"], cells)
    told = pieces.say(f"{parents}: {report['result']}.{why}", "good")
    return (
        f"{told}{warnings}<dl class='facts'>{boxes}</dl>"
        f"<details><summary>The layers that change most</summary>{table}</details>"
    )


def _free_name(names: Sequence[str]) -> str:
    return library.free_name(slugify("-and-".join(names)))


@plain
def save(name: str, trial_name: str) -> str:
    """Puts the merge that is shown into the library."""
    trial = trial_of(trial_name)
    if trial is None:
        raise RequestError("nothing is merged yet", "try the merge first")
    wanted = slugify(name) if str(name or "").strip() else _free_name(trial.report()["names"])
    free = library.free_name(wanted)
    report = trial.report()
    facts = library.facts_of(library.find(report["names"][0])) if _known(report["names"][0]) else {}
    base = {"base": facts["base"]} if facts.get("base") else {}
    library.add(free, trial.file, {**base, "merge": report["result"]}, trial.preview())
    return pieces.say(f"It is in the library as '{free}'.", "good")


def _known(name: str) -> bool:
    return any(entry.name == name for entry in library.entries())


# -- interference before anything is merged ----------------------------------------------------------------------


@plain
def interference(names: list[str] | None) -> Iterator[str]:
    """How far the concepts meet, as `studio inspect A B` says it."""
    chosen = checked(names)
    if len(chosen) < 2:
        raise RequestError("choose two concepts or more")
    yield pieces.say("Looking at every layer of the concepts. This takes some seconds.")
    stamps = [(path.name, path.stat().st_mtime_ns) for path in map(library.find, chosen)]
    name = f"interference-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]}.html"
    page = studio_home() / "cache" / "served" / name
    yield interference_of(ask("inspect", *chosen, "--html", str(page), "--force"), page)


MEASURES = {
    "input_overlap": "Do they read the same inputs?",
    "output_overlap": "Do they write the same outputs?",
    "weight_cosine": "Do they change the same weights alike?",
    "crosstalk": "How much does the column disturb the row's pictures?",
}


def interference_of(facts: dict[str, Any], page: Path) -> str:
    """The verdict in words, a heat map for each measure, the parts of the model, and the whole report."""
    names = [adapter["name"] for adapter in facts["adapters"]]
    verdict = "".join(
        pieces.say(line, "bad" if line.startswith("They disturb") else "good" if n == 0 else "")
        for n, line in enumerate(facts["verdict"])
    )
    findings = "".join(f"<li>{pieces.text(line)}</li>" for line in facts["findings"])
    maps = "".join(
        _heat_map(words, names, facts["total"][key]) for key, words in MEASURES.items() if facts["total"].get(key)
    )
    rows = [
        [pieces.text(g["where"]), str(g["layers"]), *(_largest(g.get(key)) for key in MEASURES)]
        for g in facts["groups"]
    ]
    parts = pieces.table(["part of the model", "layers", *(key.replace("_", " ") for key in MEASURES)], rows)
    link = f"<p><a href='{pieces.file_url(page)}' download>Download the whole report</a></p>"
    listed = f"<ul>{findings}</ul>" if findings else ""
    more = f"<details><summary>By part of the model</summary>{parts}</details>"
    return f"{verdict}{listed}{expected(names, facts['total'])}<div class='heats'>{maps}</div>{more}{link}"


def expected(names: Sequence[str], total: dict[str, Any]) -> str:
    """What each strategy would do to these concepts, as far as their crosstalk tells."""
    crosstalk = total.get("crosstalk")
    if not crosstalk:
        return ""
    worst = [max(v for j, v in enumerate(row) if j != i) for i, row in enumerate(crosstalk)]
    told = ", ".join(f"{name}: {100 * value:.0f} %" for name, value in zip(names, worst, strict=True))
    known = {name: entry["summary"] for name, entry in schemas()["strategies"].items()}
    rows = [
        ["sum", f"Adds the changes. Beside each concept's own effect there will be this much of another's: {told}."],
        ["gram", f"{known.get('gram', '').rstrip('.')}. Made for concepts that disturb each other."],
        ["auto", "Takes gram where the files tell what the layers see, else the exact sum."],
    ]
    return pieces.table(["strategy", "what to expect"], [[pieces.text(cell) for cell in row] for row in rows])


def _heat_map(words: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A matrix from 0 (pale) to 1 (full), with the numbers in it."""
    head = "".join(f"<th scope='col'>{pieces.text(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th scope='row'>{pieces.text(name)}</th>{''.join(_heat_box(v, i == j) for j, v in enumerate(row))}</tr>"
        for i, (name, row) in enumerate(zip(names, values, strict=True))
    )
    return (
        f"<figure class='heat'><figcaption>{pieces.text(words)}</figcaption><table><thead><tr><td></td>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table></figure>"
    )


def _heat_box(value: float, itself: bool) -> str:
    if itself:
        return "<td class='itself'>-</td>"
    part = min(1.0, abs(value))
    return f"<td style='--part:{100 * part:.0f}%' class='{'full' if part > 0.55 else ''}'>{value:.2f}</td>"


def _largest(matrix: Any) -> str:
    """The largest number off the diagonal."""
    if not isinstance(matrix, list):
        return "-"
    return f"{max(abs(v) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j):.2f}"


# -- for those who have no concepts yet --------------------------------------------------------------------------


def lacking() -> str:
    """What to do with fewer than two concepts."""
    if len(adapter_choices()) >= 2 or len(examples.folders()) < 2:
        return ""
    teach = fields.button("teach", "Teach the base both examples", "primary")
    return (
        "<div class='empty'><b>A merge needs two concepts</b>The library has fewer. The studio brings two examples: a "
        f"mascot and a printing style.<p>{teach}</p></div>"
    )


@plain
def teach_examples() -> str:
    for folder in examples.folders():
        examples.teach(folder)
    return pieces.say("Both are in the queue. Runs shows how far they are; come back when they are finished.", "good")


# -- the page ----------------------------------------------------------------------------------------------------


def restore(name: str | None) -> list[Any]:
    trial = trial_of(name)
    if trial is None:
        return [
            gr.update(choices=adapter_choices()),
            report_of({}),
            "",
            gr.skip(),
            gr.skip(),
            *[gr.skip()] * MOST_CONCEPTS,
        ]
    report = trial.report()
    names = [n for n in report["names"] if _known(n)]
    weights = [float(p["weight"]) for p in report["parents"]] + [1.0] * MOST_CONCEPTS
    return [
        gr.update(choices=adapter_choices(), value=names), report_of(report), sheet_of(trial), _free_name(names),
        prompts_for(names), *sliders(names, *weights[:MOST_CONCEPTS]),
    ]  # fmt: skip


def choose(names: list[str] | None, *weights: float) -> list[Any]:
    return [prompts_for(names), *sliders(names, *weights)]


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.HTML(pieces.heading("Merge", "Make several concepts one file, and see what it keeps of each."))
    kept = gr.BrowserState("", storage_key="studio-merge", secret="studio")
    without = gr.HTML(js_on_load=pieces.TELL)
    with gr.Column(elem_classes="section"):
        gr.HTML(pieces.step(1, "Concepts"))
        names = gr.Dropdown(
            [], label="Adapters", multiselect=True, max_choices=MOST_CONCEPTS, elem_id="concepts",
            info="Of the same base. Those of the method 'orthogonal' get out of each other's way by design.",
        )  # fmt: skip
        with gr.Row():
            weights = make_sliders(MOST_CONCEPTS, -1.0)
        ask_first = gr.Button("Will they get on?", scale=0, min_width=180, elem_id="interference")
        overlap = gr.HTML()
    with gr.Column(elem_classes="section"):
        gr.HTML(pieces.step(2, "How"))
        strategy = gr.Dropdown(strategy_choices(), value="auto", label="Strategy", filterable=False)
        groups, widgets = {}, []
        for known, fields in strategy_fields().items():
            with gr.Row(visible=False) as groups[known]:
                widgets += [form.widget(field, min_width=200) for field in fields]
        with gr.Accordion("Advanced", open=False), gr.Row():
            common = [form.widget(field, min_width=200) for field in (RANK, TOLERANCE, SEED)]
    with gr.Column(elem_classes="section"):
        gr.HTML(pieces.step(3, "Look at it"))
        with gr.Row():
            prompts = gr.Textbox(
                label="Prompts", lines=3, max_lines=6, scale=3, info=f"One a line, {MOST_PROMPTS} at most.",
                placeholder="a zovuki\na dog",
            )  # fmt: skip
            seeds, steps = (form.widget(field, min_width=120) for field in (PROMPT_SEEDS, STEPS))
        with gr.Row():
            go = gr.Button("Try the merge", variant="primary", size="lg", elem_id="merge")
            stop = gr.Button("Stop", size="lg", scale=0, min_width=120)
        report = gr.HTML()
        sheet = gr.HTML()
    with gr.Column(elem_classes="section"):
        gr.HTML(pieces.step(4, "Keep it"))
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Name in the library", max_length=60, scale=3)
            save_button = gr.Button("Save to the library", min_width=160)
        saved = gr.HTML()
    own = [*weights, *common, *widgets]
    running = go.click(
        run, [names, prompts, seeds, steps, strategy, *own], [report, sheet, name, kept], show_progress="hidden",
        api_name="merge",
    )  # fmt: skip
    stop.click(lambda: generate.ENGINE.cancel(), None, None, cancels=[running], **quiet)
    ask_first.click(interference, names, overlap, show_progress="hidden", api_name="interference")
    names.input(choose, [names, *weights], [prompts, *weights], **quiet)
    strategy.input(lambda s: [gr.update(visible=known == s) for known in groups], strategy, [*groups.values()], **quiet)
    save_button.click(save, [name, kept], saved, api_name="save_merge", show_progress="minimal")
    without.click(teach_examples, None, without, **quiet)
    gr.on(opened_page(), lacking, None, without, **quiet)
    gr.on(opened_page(), restore, kept, [names, report, sheet, name, prompts, *weights], **quiet)


PAGE = Page("Merge", "merge", 35, build)
