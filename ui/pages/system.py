"""System: what this machine has, what is missing, what takes space, under which licences the bases come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import studio
from studio import jobs
from studio.paths import studio_home
from studio.schemas import schemas
from ui import pieces
from ui.commands import ask
from ui.errors import plain
from ui.registry import Page, opened_page

PLACES = {
    "runs": "trainings: settings, events, samples, checkpoints", "library": "finished adapters",
    "pictures": "everything drawn", "data": "the pictures of trainings begun here", "drafts": "what is being prepared",
    "merges": "merges that were tried", "evaluations": "cards of adapters without a run",
    "cache": "encoded pictures and thumbnails; may be deleted", "removed": "adapters that undo can bring back",
}  # fmt: skip
MARKS = {"ok": ("good", "&#10003; fine"), "note": ("", "note"), "missing": ("bad", "&#9888; missing")}


@plain
def doctor() -> Iterator[str]:
    yield pieces.say("Looking at this machine.")
    rows = []
    for row in ask("doctor"):
        kind, word = MARKS.get(row["state"], ("", row["state"]))
        cells = [pieces.text(row["part"]), f"<span class='badge {kind}'>{word}</span>"]
        rows.append([*cells, pieces.text(row["found"]), pieces.text(row["fix"])])
    yield pieces.table(["part", "state", "found", "what to do"], rows)


def storage() -> str:
    rows = []
    for name, what in PLACES.items():
        used, files = _size(studio_home() / name)
        rows.append([pieces.text(name), pieces.size(used) if files else "-", str(files), pieces.text(what)])
    return pieces.say(f"Everything lies in {studio_home()}") + pieces.table(["folder", "size", "files", "what"], rows)


def _size(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files below a folder."""
    used = files = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                used += (Path(place) / name).lstat().st_size
                files += 1
            except OSError:
                continue
    return used, files


def licences() -> str:
    rows = [
        [
            pieces.text(b["name"]), pieces.text(b["licence"] or "see its own page"), "yes" if b["offline"] else "no",
            pieces.text(b["repo"]),
        ]
        for b in schemas()["bases"]
    ]  # fmt: skip
    return pieces.table(["base", "licence", "on this machine", "from"], rows) + (
        f"<p class='lead'>The studio {pieces.text(studio.__version__)} itself: Apache-2.0. An adapter inherits the "
        "terms of the base that it was trained on, and of the pictures.</p>"
    )


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    devices = ", ".join(jobs.devices())
    gr.HTML(pieces.heading("System", f"This machine trains on: {devices}, one training at a time on each."))
    with gr.Column(elem_classes="section"):
        gr.HTML("<h2 class='step'>Parts</h2>")
        parts = gr.HTML()
        again = gr.Button("Look again", scale=0)
    with gr.Column(elem_classes="section"):
        gr.HTML("<h2 class='step'>Storage</h2>")
        space = gr.HTML()
    with gr.Column(elem_classes="section"):
        gr.HTML("<h2 class='step'>Licences</h2>")
        terms = gr.HTML()
    gr.on(opened_page(), lambda: [storage(), licences()], None, [space, terms], **quiet)
    gr.on(opened_page(), doctor, None, parts, **quiet)
    again.click(doctor, None, parts, **quiet)


PAGE = Page("System", "system", 50, build)
