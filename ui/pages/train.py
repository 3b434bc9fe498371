"""Train: choose what to teach, drop pictures, clips or recordings, start, and watch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs, library
from studio.errors import RequestError, StudioError
from studio.files import slug, slugify, write_atomically
from studio.paths import studio_home
from ui import brought, fields, live, pieces, settings
from ui.commands import ask
from ui.draft import ENDINGS, NOUNS, Draft, draft_of
from ui.errors import plain, said, sentence
from ui.estimate import estimate, remember_check
from ui.registry import Page, opened_page


def preset_cards(chosen: str) -> str:
    """The presets by picture and sentence; variants of one, whose names have a dash, apart."""
    known = settings.presets()
    main, others = ([name for name in known if ("-" in name) == apart] for apart in (False, True))
    shown = _cards({name: known[name] for name in main}, chosen)
    rest = _cards({name: known[name] for name in others}, chosen)
    return shown + (
        fields.more("variants", "The same by other methods", rest, open_=chosen in others) if others else ""
    )


def _cards(known: dict[str, dict[str, Any]], chosen: str) -> str:
    cards = ""
    examples = {name: files[0] for name, content in known.items() if (files := _examples(content))}
    urls = pieces.own_pictures([*examples.values()])
    for name, content in known.items():
        noun = NOUNS[settings.medium_of(content)]
        url = urls.get(examples.get(name, Path()), "")
        picture = f"<img src='{url}' alt=''>" if url else f"<span class='blank {noun}'>your {noun}s</span>"
        mark = "<span class='chosen'>&#10003; chosen</span>" if name == chosen else ""
        cards += (
            f"<button type='button' class='card' data-click='{pieces.text(name)}' "
            f"aria-pressed='{str(name == chosen).lower()}'>"
            f"{picture}<span class='words'><b>{pieces.text(name.replace('-', ' ').capitalize())}</b>"
            f"<span>{pieces.text(content['description'])}</span>"
            f"<small>{pieces.text(content['method']['kind'])}, {content['steps']} steps</small>{mark}</span></button>"
        )
    return f"<div class='cards' role='group' aria-label='What to teach'>{cards}</div>"


def _examples(content: dict[str, Any]) -> list[Path]:
    return [p for p in brought.example_files(content, settings.medium_of(content)) if p.suffix in pieces.TYPES]


# -- the draft ---------------------------------------------------------------------------------------------------


def preset_of(draft: Draft) -> str:
    name = draft.form().get("preset")
    return name if name in settings.presets() else settings.first_preset()


def opened(name: Any) -> Draft:
    """The browser's draft, of the medium that its preset learns from."""
    draft = draft_of(name)
    return draft_of(draft.name, settings.medium_of(settings.presets()[preset_of(draft)]))


def values_in(draft: Draft) -> dict[str, Any]:
    """The form's values: the preset's, changed by what the draft says."""
    start = settings.values_of(settings.presets()[preset_of(draft)])
    kept = draft.form().get("values", {})
    kind = kept.get("kind", start["kind"])
    if kind != start["kind"] and kind in settings.method_fields():
        start |= settings.values_for_method(preset_of(draft), kind)
    return start | kept


def store(draft: Draft, preset: str, title: str, values: dict[str, Any]) -> None:
    form = {"preset": preset, "title": title, "values": values}
    if form != draft.form():
        draft.save_form(form)
        draft.changed()


def taken(draft: Draft, values: dict[str, Any]) -> None:
    """Keeps what the browser's form says."""
    values = dict(values)
    title = str(values.pop("title", draft.form().get("title", "")))[:60]
    other = str(values.pop("other_base", "") or "").strip()
    if values.get("base") == settings.OTHER and other:
        values["base"] = other
    store(draft, preset_of(draft), title, values_in(draft) | values)


def form_of(draft: Draft) -> str:
    ask_first = fields.button("check", "Check first", "", "Decode every file, measure two steps, rehearse the export")
    go = "<button type='button' class='button primary big' data-click='start' id='start'>Start training</button>"
    form = settings.html(preset_of(draft), values_in(draft), draft.form().get("title", ""))
    return pieces.anew(f"{form}<div class='buttons'>{ask_first}{go}</div>")


def foreseen(draft: Draft) -> str:
    """Time and memory, by what was trained before; a sentence for a form that is not right yet."""
    try:
        return pieces.say(estimate(settings.content_of(preset_of(draft), values_in(draft))))
    except StudioError as error:
        return pieces.say(sentence(error), "bad")


def yaml_of(draft: Draft) -> str:
    try:
        text = settings.to_yaml(settings.content_of(preset_of(draft), values_in(draft)))
    except StudioError as error:
        text = f"# {error.message}"
    box = (
        "<textarea class='yaml' rows='18' data-edit='yaml' spellcheck='false' aria-label='The preset as YAML'>"
        f"{pieces.text(text)}</textarea>"
    )
    use = fields.button("use", "Use this YAML")
    return pieces.anew(fields.more("yaml", "As YAML", f"{box}<div class='buttons'>{use}</div>"))


def whole(draft: Draft) -> list[Any]:
    """Everything that a preset decides: cards, dropped files, form, estimate, YAML, the drop zone."""
    preset = preset_of(draft)
    label = f"Drop {NOUNS[draft.medium]}s here, with captions as .txt beside them if you have some"
    return [
        preset_cards(preset), brought.shown(draft, settings.presets()[preset]), form_of(draft), foreseen(draft),
        yaml_of(draft), gr.update(label=label, file_types=[*ENDINGS[draft.medium], ".txt"]),
    ]  # fmt: skip


@plain
def choose_preset(name: str, event: gr.EventData) -> list[Any]:
    preset = str(event._data.get("name", ""))
    draft = draft_of(name)
    store(draft, preset if preset in settings.presets() else settings.first_preset(), draft.form().get("title", ""), {})
    return whole(opened(draft.name))


@plain
def edit(name: str, event: gr.EventData) -> list[Any]:
    """Keeps the form; another base or method brings settings of its own. Returns form, estimate, YAML."""
    draft, changed = opened(name), str(event._data.get("name", ""))
    values, before = dict(event._data.get("values", {})), values_in(draft)
    taken(draft, values)
    now = values_in(draft)
    if changed == "kind" and now["kind"] in settings.method_fields():
        now |= settings.values_for_method(preset_of(draft), now["kind"])
    elif changed in ("base", "other_base") and now["base"] != before["base"]:
        now |= settings.values_for_base(preset_of(draft), now["base"])
    else:
        return [gr.skip(), foreseen(draft), yaml_of(draft)]
    store(draft, preset_of(draft), draft.form().get("title", ""), now)
    return [form_of(draft), foreseen(draft), yaml_of(draft)]


@plain
def use_yaml(name: str, event: gr.EventData) -> list[Any]:
    draft = opened(name)
    values = settings.values_of(settings.from_yaml(str(event._data.get("values", {}).get("yaml", ""))))
    settings.content_of(preset_of(draft), values)  # each value within its limits
    store(draft, preset_of(draft), draft.form().get("title", ""), values)
    gr.Info("The form now says what this YAML says.", title="Taken over")
    return [form_of(draft), foreseen(draft), yaml_of(draft)]


# -- what was brought --------------------------------------------------------------------------------------------


def _shown(draft: Draft) -> str:
    return brought.shown(draft, settings.presets()[preset_of(draft)])


@plain
def add_files(name: str, files: list[str] | None) -> tuple[str, None, str]:
    draft = opened(name)
    left_out = draft.add([Path(file) for file in files or ()])
    return _shown(draft), None, pieces.say("Left out: " + "; ".join(left_out) + ".", "bad") if left_out else ""


@plain
def act_on_files(name: str, event: gr.EventData) -> tuple[Any, ...]:
    """Removes one or all, or starts with the example. Returns (files, tabs, run)."""
    draft, (what, _, which) = opened(name), str(event._data.get("name", "")).partition(":")
    if what == "example":
        return gr.skip(), *start(draft)
    if what == "clear":
        draft.clear()
    else:
        draft.remove(which)
    return _shown(draft), gr.skip(), gr.skip()


@plain
def edit_caption(name: str, event: gr.EventData) -> None:
    file = str(event._data.get("name", "")).removeprefix("caption:")
    opened(name).set_caption(file, str(event._data.get("text", "")))


@plain
def bulk_edit(name: str, find: str, by: str) -> str:
    draft = opened(name)
    gr.Info(f"{draft.replace_in_captions(find, by)} captions changed", title="Captions")
    return _shown(draft)


# -- check and start ---------------------------------------------------------------------------------------------


def _write_order(draft: Draft, name: str, data: Path | None) -> Path:
    content = settings.content_of(preset_of(draft), values_in(draft))
    if data is not None:
        content["data"]["path"] = str(data)
    elif content["data"]["path"] is None:
        raise RequestError(f"there are no {NOUNS[draft.medium]}s to learn from", "drop some under 2 first")
    path = studio_home() / "orders" / f"{slug(name)}.yaml"
    write_atomically(path, settings.to_yaml(content))
    return path


def act(name: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
    """The form's buttons. Yields (report, files, tabs, run)."""
    draft = opened(name)
    try:
        taken(draft, event._data.get("values", {}))
        if event._data.get("name") == "start":
            yield gr.skip(), gr.skip(), *start(draft)
        else:
            for report, files in check(draft):
                yield report, files, gr.skip(), gr.skip()
    except StudioError as error:
        raise said(error) from None


def check(draft: Draft) -> Iterator[tuple[Any, Any]]:
    """Looks at files, settings, time and memory; trains two steps in a scratch folder."""
    data = draft.pictures_dir if draft.pictures() else None
    order = _write_order(draft, f"check-{draft.name}", data)
    yield (
        pieces.say("Checking: every file is decoded and two steps are measured. This takes some seconds.", "busy"),
        gr.skip(),
    )
    try:
        draft.save_report(ask("check", "--preset", str(order)))
    except StudioError as error:
        yield pieces.say(f"It cannot start yet. {sentence(error)}", "bad"), gr.skip()
        return
    remember_check(settings.content_of(preset_of(draft), values_in(draft)), draft.report())
    yield brought.report_of(draft.report()), _shown(draft)


def start(draft: Draft) -> tuple[Any, Any]:
    """Puts the training in the queue, with a copy of the files, and shows it."""
    title = draft.form().get("title", "").strip()
    wanted = library.free_name(slugify(title) if title else preset_of(draft))
    run = _free_run(f"{time.strftime('%Y%m%d-%H%M%S')}-{wanted}")
    settings.content_of(preset_of(draft), values_in(draft))  # a wrong value is said before anything is written
    data = draft.freeze(run.name) if draft.pictures() else None
    order = _write_order(draft, run.name, data)
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
    draft = opened(name)
    active = live.active_run()
    busy = bool(active) and live.state_of(live.known_runs()[active]) in live.BUSY
    return [
        draft.name, brought.report_of(draft.report()), gr.Tabs(selected="now" if busy else "new"),
        gr.update(choices=live.run_choices(), value=active or None), *whole(draft),
    ]  # fmt: skip


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    draft = gr.BrowserState("", storage_key="studio-draft", secret="studio")
    gr.HTML(pieces.heading("Train", "Teach a base something from a few examples, and take home a small file."))
    with gr.Tabs(selected="new") as tabs:
        with gr.Tab("New training", id="new"):
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(1, "What is it?"))
                cards = gr.HTML(js_on_load=pieces.TELL)
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(2, "Show it"))
                files = gr.File(
                    label="Drop pictures here", file_count="multiple", file_types=[*ENDINGS["image"], ".txt"],
                    height=120, elem_classes="drop",
                )  # fmt: skip
                left_out = gr.HTML()
                shown = gr.HTML(js_on_load=pieces.TELL)
                with gr.Accordion("Change all captions", open=False), gr.Row():
                    find = gr.Textbox(label="Find", info="Empty: put the other text in front.", min_width=160)
                    by = gr.Textbox(label="Put instead", min_width=160)
                    bulk = gr.Button("Change all", min_width=110, scale=0)
            with gr.Column(elem_classes="section"):
                gr.HTML(pieces.step(3, "Settings"))
                form = gr.HTML(js_on_load=pieces.TELL, elem_id="form")
                ahead = gr.HTML()
                report = gr.HTML()
                as_yaml = gr.HTML(js_on_load=pieces.TELL)
        with gr.Tab("Now and before", id="now"):
            queue = gr.HTML(js_on_load=pieces.TELL)
            chosen = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="run")
            with gr.Column(elem_classes="section"):
                live.build_panel(chosen)
    settled = [cards, shown, form, ahead, as_yaml, files]
    cards.click(choose_preset, draft, settled, **quiet)
    files.upload(add_files, [draft, files], [shown, files, left_out], **quiet)
    shown.click(act_on_files, draft, [shown, tabs, chosen], **quiet)
    shown.input(edit_caption, draft, None, **quiet, **pieces.IN_TURN)
    bulk.click(bulk_edit, [draft, find, by], shown, **quiet)
    form.input(edit, draft, [form, ahead, as_yaml], **quiet, **pieces.IN_TURN)
    form.click(act, draft, [report, shown, tabs, chosen], **quiet, trigger_mode="multiple")
    as_yaml.click(use_yaml, draft, [form, ahead, as_yaml], **quiet)
    gr.on(opened_page(), restore, draft, [draft, report, tabs, chosen, *settled], **quiet)
    seen = gr.State(None)
    gr.Timer(live.SECONDS).tick(live.queue_table, seen, [queue, seen], **quiet)
    queue.click(live.queue_action, None, [queue, seen], **quiet)


PAGE = Page("Train", "", 10, build)
