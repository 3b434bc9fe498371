"""A run as it goes: where it stands, its loss, its samples, and what can be asked of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs, library
from studio.curves import loss_curve
from studio.run import Run
from studio.trace import Trace, trace_of
from ui import pieces
from ui.errors import plain

SECONDS = 2.0
BUSY = ("queued", "starting", "preparing", "training", "stopping", "paused")


def known_runs() -> dict[str, Path]:
    """Every run and every job's run by its folder's name in full; nothing else on the disk can be asked for."""
    folders = [Path(job.run) for job in jobs.jobs() if job.is_training and job.phase in ("queued", "started")]
    return {str(folder): folder for folder in (*folders, *(f.resolve() for f in library.run_folders()))}


def state_of(folder: Path) -> str:
    """A job knows more than its events while it waits, starts or pauses."""
    job = jobs.job_of_run(folder)
    own = job.state() if job is not None else ""
    return own if own in BUSY or (own and not Run(folder).events_path.exists()) else trace_of(folder).state()


def active_run() -> str:
    """The run that a page shows first: at work, else waiting, else the newest."""
    found = known_runs()
    for wanted in (("training", "paused", "preparing", "starting", "stopping"), ("queued",)):
        for name, folder in list(found.items())[:20]:
            if state_of(folder) in wanted:
                return name
    newest = library.run_folders()[:1]
    return str(newest[0].resolve()) if newest else ""


STAMPED = re.compile(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)\d\d-(.+)")


def title_of(folder: Path) -> tuple[str, str]:
    """A run's own name, and when it was begun, as far as its folder says so."""
    found = STAMPED.fullmatch(folder.name)
    if found is None:
        return folder.name, ""
    year, month, day, hour, minute, name = found.groups()
    return name, f"{year}-{month}-{day} {hour}:{minute}"


def run_choices() -> list[tuple[str, str]]:
    return [
        (" - ".join(filter(None, title_of(folder))), name)  # no state: it would stay while the run goes on
        for name, folder in list(known_runs().items())[:60]
    ]


# -- what is shown -----------------------------------------------------------------------------------------------


def head(folder: Path, trace: Trace, state: str) -> str:
    total, done = trace.total, trace.step
    name, when = title_of(folder)
    part = f"<progress max='{max(total, 1)}' value='{done}' aria-label='step {done} of {total}'></progress>"
    return (
        f"<div class='run'><div class='run-head'><h2>{pieces.text(name)}</h2>{pieces.badge(state)}"
        f"<small>{pieces.text(when)}</small></div>"
        f"{part if total else ''}<dl class='facts'>{''.join(_fact(*pair) for pair in _facts(trace, state))}</dl>"
        f"{_sentence(folder, trace, state)}{_warnings(trace)}</div>"
    )


def _fact(name: str, value: str) -> str:
    return f"<div><dt>{name}</dt><dd>{pieces.text(value)}</dd></div>"


def _facts(trace: Trace, state: str) -> list[tuple[str, str]]:
    if not trace.steps:
        return []
    last, each = trace.steps[-1], trace.seconds_per_step()
    facts = [("step", f"{trace.step} / {trace.total or '?'}"), ("loss", f"{last['loss']:.4f}")]
    if state in ("training", "paused", "stopping"):
        facts.append(("time left", pieces.duration(trace.seconds_left())))
    if trace.ending is not None and "seconds" in trace.ending:
        facts.append(("took", pieces.duration(trace.ending["seconds"])))
    if each:
        facts.append(("speed", f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s/step"))
    facts += [("memory, peak", f"{last['peak_memory_gib']:.2f} GiB"), ("learning rate", f"{last['lr']:.2g}")]
    if trace.validations:
        facts.append(("held-out loss", f"{trace.validations[-1]['loss']:.4f}"))
    return facts


SENTENCES = {
    "queued": "Waits until the trainings before it are over.",
    "starting": "Starting: the base is being loaded.",
    "preparing": "Preparing: all that it learns from is encoded, and first samples are made. The first step follows.",
    "paused": "Pauses while something is generated, and goes on by itself.",
    "stopping": "Stopping: a checkpoint is being saved.",
    "stopped": "Stopped. Everything is saved; it can be resumed.",
    "broken off": "Its process ended without a word, perhaps for lack of memory. Resume it from its last checkpoint.",
    "cancelled": "Taken out of the queue before it began.",
}


def _sentence(folder: Path, trace: Trace, state: str) -> str:
    if state == "failed":
        job = jobs.job_of_run(folder)
        fault = (job.fault() if job else "") or str((trace.ending or {}).get("error", "no reason was given"))
        return pieces.say(f"It failed: {fault}", "bad")
    if state == "finished":
        return pieces.say("Finished. The adapter is in the library.", "good")
    return pieces.say(SENTENCES.get(state, ""), "bad" if state == "broken off" else "")


def _warnings(trace: Trace) -> str:
    if not trace.warnings:
        return ""
    items = "".join(f"<li>{pieces.text(line)}</li>" for line in trace.warnings[:20])
    return f"<details><summary>Remarks on the data: {len(trace.warnings)}</summary><ul>{items}</ul></details>"


# -- the panel ---------------------------------------------------------------------------------------------------


def show(name: str | None, seen: Any) -> list[Any]:
    """Everything the panel shows of a run; parts that have not changed since `seen` are skipped."""
    folder = known_runs().get(name or "")
    if folder is None:
        nothing = pieces.empty("Nothing is training", "Start one, or begin one in a terminal: it will show up here.")
        return [nothing, "", "", *[gr.update(visible=False)] * 4, None]
    trace, state = trace_of(folder), state_of(folder)
    now: list[Any] = [name, state, trace.version, len(trace.samples), (folder / "report.html").exists()]
    if now == seen:
        return [gr.skip()] * 7 + [seen]
    same_run = bool(seen) and seen[0] == name
    grid = gr.skip() if same_run and seen[3] == now[3] else pieces.sample_grid(folder, trace.samples)
    curve = f"<div class='curve'>{loss_curve(trace.steps, trace.validations)}</div>" if trace.steps else ""
    resumable = state in ("stopped", "broken off", "failed") and bool(Run(folder).checkpoint_folders())
    return [
        head(folder, trace, state),
        curve,
        grid,
        gr.update(visible=state in BUSY, value="Take out of the queue" if state == "queued" else "Stop and keep"),
        gr.update(visible=resumable),
        gr.update(visible=state == "training"),
        gr.update(visible=now[4], value=str(pieces.served(folder / "report.html")) if now[4] else None),
        now,
    ]


@plain
def stop(name: str) -> None:
    if name in known_runs():
        jobs.stop_run(known_runs()[name])


@plain
def resume(name: str) -> None:
    if name in known_runs():
        jobs.resume(known_runs()[name])
        jobs.advance()


@plain
def sample(name: str) -> None:
    if name in known_runs():
        Run(known_runs()[name]).request("sample")
        gr.Info("The samples are drawn after the step that is being made.", title="Asked for")


def build_panel(chosen: gr.Dropdown) -> None:
    """The panel of the run that `chosen` holds; it follows the run's events."""
    with gr.Row(elem_classes="actions"):
        stop_button = gr.Button("Stop and keep", visible=False, min_width=120)
        resume_button = gr.Button("Resume", variant="primary", visible=False, min_width=120)
        sample_button = gr.Button("Draw samples now", visible=False, min_width=120)
        report = gr.DownloadButton("Download the report", visible=False, min_width=120)
    top = gr.HTML()
    grid = gr.HTML()
    curve = gr.HTML()
    seen = gr.State(None)
    shown = [top, curve, grid, stop_button, resume_button, sample_button, report, seen]
    options: dict[str, Any] = {"show_progress": "hidden", "queue": True, "api_visibility": "private"}
    gr.Timer(SECONDS).tick(show, [chosen, seen], shown, **options)
    chosen.change(show, [chosen, seen], shown, **options)
    for button, ask in ((stop_button, stop), (resume_button, resume), (sample_button, sample)):
        button.click(ask, chosen, None, **options).then(show, [chosen, seen], shown, **options)


# -- the queue ---------------------------------------------------------------------------------------------------


def queue_table(seen: Any = None) -> tuple[Any, Any]:
    """The waiting and running jobs with buttons, as HTML; skipped if nothing has changed."""
    listed = [job for job in jobs.jobs() if job.phase in ("queued", "started")]
    now = [(job.id, job.state()) for job in listed]
    if seen is not None and [tuple(pair) for pair in seen] == now:
        return gr.skip(), seen
    if not any(state == "queued" for _, state in now):
        return "", now
    rows = []
    for job, (_, state) in zip(listed, now, strict=True):
        buttons = ""
        if state == "queued":
            buttons = " ".join(
                f"<button type='button' class='link' data-click='{what}:{pieces.text(job.id)}' "
                f"aria-label='{label} {pieces.text(job.name)}'>{label}</button>"
                for what, label in (("up", "earlier"), ("down", "later"), ("cancel", "take out"))
            )
        name = title_of(Path(job.run))[0] if job.is_training else job.title
        rows.append([pieces.text(name), pieces.badge(state), buttons])
    return pieces.table(["in the queue", "state", ""], rows), now


@plain
def queue_action(event: gr.EventData) -> tuple[Any, Any]:
    what, _, name = str(event._data.get("name", "")).partition(":")
    if what == "cancel":
        jobs.cancel(name)
    elif what in ("up", "down"):
        jobs.move(name, -1 if what == "up" else 1)
    return queue_table()
