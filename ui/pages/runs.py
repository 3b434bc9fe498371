"""Runs: every training, one of them in full, and the curves of several over each other."""

from __future__ import annotations

from typing import Any

import gradio as gr

from studio.curves import Curve, loss_curves
from studio.trace import trace_of
from ui import live, pieces
from ui.registry import Page, opened_page

SHOWN = 200
COMPARED = 6


def runs_table(chosen: str | None) -> str:
    rows, at = [], None
    for number, (name, folder) in enumerate(list(live.known_runs().items())[:SHOWN]):
        trace, state = trace_of(folder), live.state_of(folder)
        at = number if name == chosen else at
        loss = f"{trace.steps[-1]['loss']:.4f}" if trace.steps else "-"
        title, when = live.title_of(folder)
        link = (
            f"<button type='button' class='link' data-click='{pieces.text(name)}'>{pieces.text(title)}</button>"
            f"<br><small>{pieces.text(when)}</small>"
        )
        rows.append([link, pieces.badge(state), f"{trace.step} / {trace.total or '?'}", loss])
    if not rows:
        return pieces.empty("No runs yet", "Every training leaves one here, those from a terminal too.")
    return pieces.table(["run", "state", "step", "loss"], rows, at)


def choose(event: gr.EventData) -> Any:
    name = str(event._data.get("name", ""))
    return gr.update(choices=live.run_choices(), value=name) if name in live.known_runs() else gr.skip()


def compare(names: list[str], weight: float, logarithmic: bool) -> str:
    """The smoothed losses of several runs."""
    known = live.known_runs()
    traces = [trace_of(known[name]) for name in names[:COMPARED] if name in known]
    curves = [Curve(t.steps, t.validations, live.title_of(t.folder)[0]) for t in traces]
    drawn = loss_curves(curves, weight, logarithmic) if curves else "<p>Choose runs to see their curves.</p>"
    return f"<div class='curve'>{drawn}</div>"


def restore() -> list[Any]:
    active, choices = live.active_run(), live.run_choices()
    first = [name for _, name in choices[:3]]
    return [
        runs_table(active), gr.update(choices=choices, value=active or None),
        gr.update(choices=choices, value=first), compare(first, 0.9, False),
    ]  # fmt: skip


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.HTML(pieces.heading("Runs", "Everything that was trained or is being trained on this machine."))
    with gr.Row():
        with gr.Column(scale=2, min_width=320, elem_classes="section"):
            table = gr.HTML(js_on_load=pieces.TELL)
        with gr.Column(scale=3, min_width=320, elem_classes="section"):
            chosen = gr.Dropdown([], label="Run", allow_custom_value=True, visible="hidden")
            live.build_panel(chosen)
    with gr.Column(elem_classes="section"):
        gr.HTML("<h2 class='step'>Curves over each other</h2>")
        with gr.Row():
            several = gr.Dropdown(
                [], label=f"Runs, {COMPARED} at most", multiselect=True, max_choices=COMPARED, scale=3
            )
            weight = gr.Slider(0, 0.99, 0.9, step=0.01, label="Smoothing", min_width=160)
            logarithmic = gr.Checkbox(label="Logarithmic", min_width=120)
        curves = gr.HTML()
    table.click(choose, None, chosen, **quiet)
    chosen.change(runs_table, chosen, table, **quiet)
    gr.Timer(10).tick(runs_table, chosen, table, **quiet)
    gr.on([several.change, weight.release, logarithmic.input], compare, [several, weight, logarithmic], curves, **quiet)
    gr.on(opened_page(), restore, None, [table, chosen, several, curves], **quiet)


PAGE = Page("Runs", "runs", 20, build)
