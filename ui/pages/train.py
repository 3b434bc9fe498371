"""Train: choose what to teach, drop pictures, start, and watch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs, library
from studio.errors import StudioError
from studio.files import slug, slugify, write_atomically
from studio.paths import assets_dir, studio_home
from studio.thumbnails import SUFFIXES
from ui import live, pieces, settings
from ui.commands import ask
from ui.draft import Draft, draft_of
from ui.errors import plain, said
from ui.estimate import estimate, remember_check
from ui.registry import Page


def preset_cards(chosen: str) -> str:
    cards, known = "", settings.presets()
    examples = {name: path for name, content in known.items() if (path := _example(content)) is not None}
    urls = pieces.own_pictures([*examples.values()])
    for name, content in known.items():
        url = urls.get(examples.get(name, Path()), "")
        picture = f"<img src='{url}' alt=''>" if url else "<span class='blank'>your pictures</span>"
        mark = "<span class='chosen'>&#10003; chosen</span>" if name == chosen else ""
        cards += (
            f"<button type='button' class='card' data-click='{pieces.text(name)}' "
            f"aria-pressed='{str(name == chosen).lower()}'>"
            f"{picture}<span class='words'><b>{pieces.text(name.replace('-', ' '))}</b>"
            f"<span>{pieces.text(content['description'])}</span>"
            f"<small>{pieces.text(content['method']['kind'])}, {content['steps']} steps</small>{mark}</span></button>"
        )
    return f"<div class='cards' role='group' aria-label='What to teach'>{cards}</div>"


def _example_folder(content: dict[str, Any]) -> Path | None:
    path = content["data"]["path"]
    return Path(path.replace("{assets}", str(assets_dir()))) if path else None


def _example(content: dict[str, Any]) -> Path | None:
    folder = _example_folder(content)
    return next(iter(sorted(folder.glob("*.png"))), None) if folder else None


# -- pictures ----------------------------------------------------------------------------------------------------


def photos(draft: Draft, preset: str) -> str:
    """The pictures with captions to edit and marks; or what is learned from without any."""
    pictures = draft.pictures()
    if not pictures:
        return _example_photos(preset)
    marks, made = _marks(draft), pieces.thumbnails(pictures)
    return f"<div class='photos'>{''.join(_photo(draft, p, made[p], marks.get(p.name)) for p in pictures)}</div>"


def _photo(draft: Draft, path: Path, facts: dict[str, Any], mark: str | None) -> str:
    name = pieces.text(path.name)
    if "error" in facts:
        picture, mark = "<span class='blank'>no preview</span>", facts["error"]
    else:
        picture = f"<img src='{facts['url']}' alt='{name}'>"
    kind = "" if mark is None else "ok" if mark == "fine" else "bad"
    said_mark = {"": f"{facts.get('width')} x {facts.get('height')}", "ok": "&#10003; fine"}.get(kind)
    words = said_mark or f"&#9888; {pieces.text(mark)}"
    return (
        f"<div class='photo'>{picture}<button type='button' class='remove' data-click='{name}' "
        f"aria-label='remove {name}'>&#10005;</button><div class='mark {kind}'>{words}</div>"
        f"<textarea data-edit='{name}' aria-label='caption of {name}' placeholder='caption: automatic'>"
        f"{pieces.text(draft.caption(path))}</textarea></div>"
    )


def _example_photos(preset: str) -> str:
    content = settings.presets().get(preset)
    folder = _example_folder(content) if content else None
    if folder is None or not folder.is_dir():
        return pieces.empty("No pictures yet", "Drop 4 to 20 pictures above.")
    pictures = sorted(folder.glob("*.png"))[:12]
    urls = pieces.own_pictures(pictures)
    shown = "".join(
        f"<div class='photo'><img src='{urls[p]}' alt=''><div class='mark'>example</div></div>" for p in pictures
    )
    note = pieces.empty(
        "No pictures of yours yet", "Without any, the training learns this example: try it in one click."
    )
    return f"{note}<div class='photos' style='opacity:.75;margin-top:.8rem'>{shown}</div>"


def _marks(draft: Draft) -> dict[str, str]:
    """What the last check said of each picture."""
    report = draft.report()
    if not report:
        return {}
    lines = [*report.get("left out", ()), *report.get("warning", ())]
    return {
        path.name: next(
            (line.replace(f"'{path.name}'", "").strip() for line in lines if f"'{path.name}'" in line), "fine"
        )
        for path in draft.pictures()
    }


def report_of(report: dict[str, Any]) -> str:
    """A check in sentences."""
    if not report:
        return ""
    facts = [
        ("pictures", report["pictures"]), ("left out", len(report["left out"])),
        ("time, about", pieces.duration(report["minutes in all, about"] * 60)),
        ("memory, peak", f"{report['peak memory GiB']} GiB"), ("trained numbers", f"{report['trained numbers']:,}"),
    ]  # fmt: skip
    boxes = "".join(f"<div><dt>{name}</dt><dd>{pieces.text(value)}</dd></div>" for name, value in facts)
    lines = (
        [f"left out: {x}" for x in report["left out"]] + report["warning"] + [f"export {x}" for x in report["export"]]
    )
    items = "".join(f"<li>{pieces.text(line)}</li>" for line in lines[:30])
    return f"<dl class='facts'>{boxes}</dl><ul>{items}</ul>"


@plain
def add_files(name: str, preset: str, files: list[str] | None) -> tuple[str, None, str]:
    draft = draft_of(name)
    left_out = draft.add([Path(file) for file in files or ()])
    return photos(draft, preset), None, pieces.say("Left out: " + "; ".join(left_out) + ".", "bad") if left_out else ""


@plain
def remove_photo(name: str, preset: str, event: gr.EventData) -> str:
    draft = draft_of(name)
    draft.remove(str(event._data.get("name", "")))
    return photos(draft, preset)


@plain
def edit_caption(name: str, event: gr.EventData) -> None:
    draft_of(name).set_caption(str(event._data.get("name", "")), str(event._data.get("text", "")))


@plain
def bulk_edit(name: str, preset: str, find: str, by: str) -> str:
    draft = draft_of(name)
    gr.Info(f"{draft.replace_in_captions(find, by)} captions changed", title="Captions")
    return photos(draft, preset)


@plain
def clear_photos(name: str, preset: str) -> str:
    draft = draft_of(name)
    draft.clear()
    return photos(draft, preset)


# -- settings ----------------------------------------------------------------------------------------------------


def choose_preset(name: str, event: gr.EventData) -> list[Any]:
    preset = str(event._data.get("name", ""))
    return load_preset(name, preset if preset in settings.presets() else next(iter(settings.presets())))


def load_preset(name: str, preset: str) -> list[Any]:
    """The form as a preset has it."""
    values = settings.values_of(settings.presets()[preset])
    draft = draft_of(name)
    draft.save_form({**draft.form(), "preset": preset, "values": dict(zip(settings.keys(), values, strict=True))})
    draft.changed()
    return [preset, preset_cards(preset), photos(draft, preset), foreseen(preset, values), *values, *_groups(values[1])]


def choose_method(preset: str, kind: str) -> list[Any]:
    """Shows a method's own settings, and the learning rate that the preset has for it."""
    content = settings.presets()[preset]
    same = content["method"]["kind"] == kind
    rate = content["learning_rate"] if same else content["learning_rates"].get(kind)
    return [f"{rate:g}" if rate else "", *_groups(kind)]


def _groups(kind: str) -> list[Any]:
    return [gr.update(visible=known == kind) for known in settings.method_fields()]


def save_form(name: str, preset: str, title: str, *values: Any) -> str:
    """Keeps the form, and says how long such a training takes."""
    draft = draft_of(name)
    form = {"preset": preset, "title": title, "values": dict(zip(settings.keys(), values, strict=True))}
    if form != draft.form():
        draft.save_form(form)
        draft.changed()
    return foreseen(preset, values)


def foreseen(preset: str, values: Sequence[Any]) -> str:
    """Time and memory, by what was trained before; "" for a form that is not right yet."""
    try:
        return f"<p class='lead' role='status'>{pieces.text(estimate(settings.content_of(preset, list(values))))}</p>"
    except StudioError:
        return ""


@plain
def show_yaml(preset: str, *values: Any) -> str:
    return settings.to_yaml(settings.content_of(preset, list(values)))


@plain
def use_yaml(text: str) -> list[Any]:
    content = settings.from_yaml(text)
    values = settings.values_of(content)
    settings.content_of(next(iter(settings.presets())), values)  # each value within its limits
    gr.Info("The form now says what this YAML says.", title="Taken over")
    return [*values, *_groups(values[1])]


# -- check and start ---------------------------------------------------------------------------------------------


def _write_order(draft: Draft, preset: str, values: list[Any], name: str, data: Path | None) -> Path:
    content = settings.content_of(preset, values)
    if data is not None:
        content["data"]["path"] = str(data)
    path = studio_home() / "orders" / f"{slug(name)}.yaml"
    write_atomically(path, settings.to_yaml(content))
    return path


def check(name: str, preset: str, *values: Any) -> Iterator[tuple[Any, Any]]:
    """Looks at pictures, settings, time and memory; trains two steps in a scratch folder."""
    draft = draft_of(name)
    yield (
        pieces.say("Checking: every picture is decoded and two steps are measured. This takes some seconds."),
        gr.skip(),
    )
    try:
        data = draft.pictures_dir if draft.pictures() else None
        order = _write_order(draft, preset, list(values), f"check-{draft.name}", data)
        draft.save_report(ask("check", "--preset", str(order)))
        remember_check(settings.content_of(preset, list(values)), draft.report())
        yield report_of(draft.report()), photos(draft, preset)
    except StudioError as error:
        raise said(error) from None


@plain
def start(name: str, preset: str, title: str, *values: Any) -> tuple[Any, ...]:
    """Puts the training in the queue, with a copy of the pictures, and shows it."""
    draft = draft_of(name)
    wanted = library.free_name(slugify(title) if title.strip() else preset)
    run = _free_run(f"{time.strftime('%Y%m%d-%H%M%S')}-{wanted}")
    settings.content_of(preset, list(values))  # a wrong value is said before anything is written
    data = draft.freeze(run.name) if draft.pictures() else None
    order = _write_order(draft, preset, list(values), run.name, data)
    jobs.submit(["train", "--preset", str(order), "--run", str(run), "--name", wanted], run)
    jobs.advance()
    return gr.Tabs(selected="now"), gr.update(choices=live.run_choices(), value=str(run.resolve()))


def _free_run(name: str) -> Path:
    taken = {Path(job.run).name for job in jobs.jobs()}
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(library.runs_dir() / n for n in names if n not in taken and not (library.runs_dir() / n).exists())


# -- the page ----------------------------------------------------------------------------------------------------


def restore(name: str | None) -> list[Any]:
    """What a tab shows when it opens: the draft as it was, and the run that is at work."""
    draft = draft_of(name)
    form = draft.form()
    preset = form.get("preset") if form.get("preset") in settings.presets() else ""
    preset = preset or ("subject" if "subject" in settings.presets() else next(iter(settings.presets())))
    given = dict(zip(settings.keys(), settings.values_of(settings.presets()[preset]), strict=True))
    given |= {key: value for key, value in form.get("values", {}).items() if key in given}
    active = live.active_run()
    busy = bool(active) and live.state_of(live.known_runs()[active]) in live.BUSY
    return [
        draft.name, preset, preset_cards(preset), photos(draft, preset), form.get("title", ""),
        report_of(draft.report()),
        gr.Tabs(selected="now" if busy else "new"), gr.update(choices=live.run_choices(), value=active or None),
        foreseen(preset, [*given.values()]), *given.values(), *_groups(given["kind"]),
    ]  # fmt: skip


def build() -> None:
    draft = gr.BrowserState("", storage_key="studio-draft", secret="studio")
    preset = gr.State("subject")
    gr.HTML(pieces.heading("Train", "Teach the base something from a few pictures, and take home a small file."))
    with gr.Tabs(selected="new") as tabs:
        with gr.Tab("New training", id="new"):
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(1, "What is it?"))
                cards = gr.HTML(js_on_load=pieces.TELL)
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(2, "Your pictures"))
                files = gr.File(
                    label="Drop pictures here, with captions as .txt beside them if you have some",
                    file_count="multiple", file_types=[*SUFFIXES, ".txt"], height=130,
                )  # fmt: skip
                left_out = gr.HTML()
                shown = gr.HTML(js_on_load=pieces.TELL)
                with gr.Accordion("Change all captions", open=False), gr.Row():
                    find = gr.Textbox(label="Find", info="Empty: put the other text in front.", min_width=160)
                    by = gr.Textbox(label="Put instead", min_width=160)
                    bulk = gr.Button("Change all", min_width=110)
                    clear = gr.Button("Remove all pictures", min_width=110)
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(3, "Settings"))
                title = gr.Textbox(
                    label="Name", placeholder="my-cat", max_length=60,
                    info="Its name in the library, and the word that calls it in a prompt.",
                )  # fmt: skip
                widgets, groups = settings.build()
                with gr.Accordion("As YAML", open=False) as as_yaml:
                    text = gr.Code(language="yaml", label="Preset", max_lines=24)
                    with gr.Row():
                        show = gr.Button("Read the form again")
                        use = gr.Button("Use this YAML")
            with gr.Row():
                look = gr.Button("Check first", size="lg")
                go = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            ahead = gr.HTML()
            report = gr.HTML()
        with gr.Tab("Now and before", id="now"):
            queue = gr.HTML(js_on_load=pieces.TELL)
            chosen = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="run")
            with gr.Column(elem_classes="section"):
                live.build_panel(chosen)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    _wire_form(draft, preset, title, cards, shown, widgets, groups, ahead, text, (as_yaml, show, use), quiet)
    files.upload(add_files, [draft, preset, files], [shown, files, left_out], **quiet)
    shown.click(remove_photo, [draft, preset], shown, **quiet)
    shown.input(edit_caption, draft, None, **quiet)
    bulk.click(bulk_edit, [draft, preset, find, by], shown, **quiet)
    clear.click(clear_photos, [draft, preset], shown, **quiet)
    look.click(check, [draft, preset, *widgets], [report, shown], show_progress="hidden", api_name="check")
    go.click(start, [draft, preset, title, *widgets], [tabs, chosen], show_progress="minimal", api_name="start")
    gr.on(
        None,
        restore,
        draft,
        [draft, preset, cards, shown, title, report, tabs, chosen, ahead, *widgets, *groups.values()],
        **quiet,
    )
    seen = gr.State(None)
    gr.Timer(live.SECONDS).tick(live.queue_table, seen, [queue, seen], **quiet)
    queue.click(live.queue_action, None, [queue, seen], **quiet)


def _wire_form(
    draft: Any, preset: Any, title: Any, cards: Any, shown: Any, widgets: list[Any], groups: dict[str, Any],
    ahead: Any, text: Any, yaml_parts: tuple[Any, Any, Any], quiet: dict[str, Any],
) -> None:  # fmt: skip
    as_yaml, show, use = yaml_parts
    at = settings.keys().index
    cards.click(choose_preset, draft, [preset, cards, shown, ahead, *widgets, *groups.values()], **quiet)
    kind, rate = widgets[at("kind")], widgets[at("learning_rate")]
    kind.input(choose_method, [preset, kind], [rate, *groups.values()], **quiet)
    base = widgets[at("base")]
    base.input(settings.values_for_base, [preset, base], widgets, **quiet)
    typed = [w.blur for w in [title, *widgets] if isinstance(w, gr.Textbox)]
    picked = [w.input for w in widgets if not isinstance(w, gr.Textbox)]
    gr.on([*typed, *picked], save_form, [draft, preset, title, *widgets], ahead, **quiet)
    for event in (as_yaml.expand, show.click):
        event(show_yaml, [preset, *widgets], text, **quiet)
    use.click(use_yaml, text, [*widgets, *groups.values()], **quiet)


PAGE = Page("Train", "", 10, build)
