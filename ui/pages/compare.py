"""Compare: the cards of several adapters side by side, and evaluations that are under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from studio import library
from studio.errors import RequestError
from studio.jobs import Job
from ui import live, pieces
from ui.errors import plain
from ui.evaluations import card_folder, card_of, evaluate, evaluated, evaluation_jobs
from ui.registry import Page, opened_page

COMPARED = 6
JOBS_SHOWN = 5
MEANINGS = {
    "drift": "how far pictures without the word moved", "num_trainable_params": "trained numbers",
    "file_size": "file", "step_seconds": "seconds a step", "train_time": "training",
    "accelerator_memory_max": "memory, peak", "num_total_params": "numbers of the base",
}  # fmt: skip
BYTES = ("file_size", "accelerator_memory_max", "accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th")


def side_by_side(names: list[str] | None) -> str:
    """The figures of the cards in one table: a column for each adapter, then the base alone and the references."""
    known = {entry.name: entry for entry in library.entries()}
    cards = {name: card for name in (names or [])[:COMPARED] if name in known and (card := card_of(known[name]))}
    if not cards:
        return pieces.empty("No card chosen", "Evaluate an adapter below: pictures are drawn with it and measured.")
    figures = list(dict.fromkeys(f for card in cards.values() for f in card["figures"]))
    plain_figures = [f for f in figures if not f.endswith(("_base", "_references"))]
    first = next(iter(cards.values()))
    rows = [[f"<b>{_name(f)}</b>", *(_figure(c["figures"], f) for c in cards.values()),
             _figure(first["figures"], f"{f}_base"), _figure(first["figures"], f"{f}_references")]
            for f in plain_figures]  # fmt: skip
    heads = ["figure", *cards, "base alone", "references"]
    facts = [
        ["method", *(pieces.text(c["method"].get("kind", "")) for c in cards.values())],
        ["drawn", *(f"{int(c['pictures'])} pictures" for c in cards.values())],
        ["sampling steps", *(pieces.text(c["num_inference_steps"]) for c in cards.values())],
        *_training_rows([card.get("training", {}) for card in cards.values()]),
    ]  # fmt: skip
    return (
        pieces.table(heads, rows)
        + _alike(list(cards.values()))
        + f"<h2 class='step'>What it cost</h2>{pieces.table(['', *cards], facts)}"
        + "".join(_sheet(name, card_folder(known[name])) for name in cards)
    )


def _name(figure: str) -> str:
    return pieces.text(MEANINGS.get(figure, figure.replace("_", " ")))


def _figure(figures: dict[str, Any], key: str) -> str:
    return f"{figures[key]:.3f}" if isinstance(figures.get(key), int | float) else "-"


def _training_rows(trainings: list[dict[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for training in trainings for key in training)
    return [[_name(key), *(_cost(key, training.get(key)) for training in trainings)] for key in keys]


def _cost(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in BYTES:
        return pieces.size(value)
    if key == "train_time":
        return pieces.duration(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else pieces.text(value)


def _alike(cards: list[dict[str, Any]]) -> str:
    """Says when figures are not of the same measurement."""
    ways = {(c["base"], c["protocol"], c["seed"], c["num_inference_steps"], c["references"]) for c in cards}
    if len(ways) < 2:
        return ""
    return pieces.say("These cards differ in base, protocol, seed, steps or references: compare them with care.", "bad")


def _sheet(name: str, folder: Path) -> str:
    url = pieces.own_pictures([folder / "sheet.png"])[folder / "sheet.png"]
    page = f"<a href='{pieces.file_url(pieces.served(folder / 'card.html'))}' download>the whole card</a>"
    page = page if (folder / "card.html").exists() else ""
    picture = f"<img class='sheet' alt='pictures drawn with {pieces.text(name)}' src='{url}'>" if url else ""
    return f"<details open><summary>{pieces.text(name)} {page}</summary>{picture}</details>"


# -- evaluations -------------------------------------------------------------------------------------------------


def under_way(seen: Any = None) -> tuple[Any, Any]:
    """The evaluations that wait, run or ended lately; skipped if nothing has changed."""
    found = [(job, job.state()) for job in evaluation_jobs()[:JOBS_SHOWN]]
    now = [[job.id, state, job.said_last() if state == "working" else ""] for job, state in found]
    if seen is not None and seen == now:
        return gr.skip(), seen
    rows = [[pieces.text(job.title), pieces.badge(state), pieces.text(_told(job, state))] for job, state in found]
    return pieces.table(["evaluation", "state", ""], rows) if rows else "", now


def _told(job: Job, state: str) -> str:
    if state == "failed":
        return job.fault()
    return job.said_last() if state == "working" else ""


@plain
def begin(name: str, steps: float) -> tuple[Any, Any]:
    if not name:
        raise RequestError("choose an adapter to evaluate")
    evaluate(name, int(steps or 25))
    return under_way()


def follow(seen: Any, names: list[str]) -> tuple[Any, ...]:
    """Every few seconds; a card that has come is offered, and shown beside the others."""
    table, now = under_way(seen)
    before = {job for job, state, *_ in seen or () if state == "finished"}
    new = [job for job, state, *_ in now if state == "finished" and job not in before]
    if seen is None or not new:
        return table, now, gr.skip(), gr.skip()
    known = evaluated()
    came = [job.title.removeprefix("evaluate ") for job in evaluation_jobs() if job.id in new]
    chosen = [*(names or []), *(name for name in came if name in known and name not in (names or []))][:COMPARED]
    return table, now, gr.update(choices=[*known], value=chosen), side_by_side(chosen)


def restore() -> list[Any]:
    known = [*evaluated()]
    names = [entry.name for entry in library.entries()]
    table, now = under_way()
    return [
        gr.update(choices=known, value=known[:3]), side_by_side(known[:3]),
        gr.update(choices=names, value=next((n for n in names if n not in known), None)), table, now,
    ]  # fmt: skip


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.HTML(pieces.heading("Compare", "How well adapters learned, what else they moved, what they cost."))
    seen = gr.State(None)
    with gr.Column(elem_classes="section"):
        chosen = gr.Dropdown([], label=f"Cards, {COMPARED} at most", multiselect=True, max_choices=COMPARED)
        table = gr.HTML()
    with gr.Column(elem_classes="section"):
        gr.HTML("<h2 class='step'>Evaluate an adapter</h2>")
        with gr.Row(equal_height=True):
            name = gr.Dropdown(
                [], label="Adapter", scale=3, info="Its training's own pictures, if they are there, are the references."
            )
            steps = gr.Number(25, label="Sampling steps", precision=0, minimum=1, maximum=1000, min_width=120)
            go = gr.Button("Evaluate", variant="primary", min_width=140)
        waiting = gr.HTML()
    chosen.change(side_by_side, chosen, table, **quiet)
    go.click(begin, [name, steps], [waiting, seen], show_progress="minimal", api_name="evaluate")
    gr.Timer(live.SECONDS).tick(follow, [seen, chosen], [waiting, seen, chosen, table], **quiet)
    gr.on(opened_page(), restore, None, [chosen, table, name, waiting, seen], **quiet)


PAGE = Page("Compare", "compare", 38, build)
