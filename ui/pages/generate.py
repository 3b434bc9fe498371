"""Generate: a prompt, adapters with their strengths, and what the base makes of them; and everything made before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from studio.drawing import Engine
from studio.errors import RequestError, StudioError
from studio.paths import studio_home
from ui import fields, order, pieces, works
from ui.commands import ask
from ui.draft import ENDINGS as UPLOADS
from ui.draft import draft_of
from ui.errors import plain, said
from ui.order import Order, order_of
from ui.registry import Page, opened_page
from ui.sweep import Sweep, sweep_of

ENGINE = Engine()
LARGE_GRID = 16  # pictures, from which a sweep's are small


def form_of(told: Order) -> str:
    return pieces.anew(order.html(told))


@plain
def edit(medium: str, name: str, event: gr.EventData) -> Any:
    """Keeps the form; what brings or takes fields draws it anew."""
    before = order_of(draft_of(name), medium)
    now = order.changed(before, dict(event._data.get("values", {}))).keep()
    key = str(event._data.get("name", ""))
    anew = key in ("add", "base", "x", "y", "boxes", "width", "height") or key.endswith(":adapter")
    moved = key == "boxes" and len(now.boxes) == len(before.boxes)
    return form_of(now) if anew and not moved else gr.skip()


def act(medium: str, name: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
    """The form's buttons. Yields (form, said, results, shelf)."""
    what, _, which = str(event._data.get("name", "")).partition(":")
    told = order.changed(order_of(draft_of(name), medium), dict(event._data.get("values", {}))).keep()
    nothing = gr.skip()
    if what == "stop":
        ENGINE.cancel()
    elif what == "drop":
        yield form_of(order.without(told, *which.split(":", 1)).keep()), nothing, nothing, nothing
    elif what == "region":
        yield form_of(replace(told, boxes=((0, 0, 0.5, 1), (0.5, 0, 1, 1))).keep()), nothing, nothing, nothing
    else:
        try:
            yield from ((nothing, *shown) for shown in draw(told))
            following = _next(order_of(draft_of(name), medium), told)
            yield form_of(following) if following else nothing, nothing, nothing, shelf_of(medium)
        except StudioError as error:
            raise said(error) from None


def draw(told: Order) -> Iterator[tuple[Any, Any, Any]]:
    """Works as they come: (said, results, shelf). Raises StudioError."""
    request, sweep = order.request_of(told), _sweep(told)
    total = len(request.get("cells", ())) or request["count"]
    made: list[tuple[Path, str]] = []
    warnings: list[str] = []
    note, preview = "", ""

    def results() -> str:
        return _swept(sweep, made, total) if sweep else works.shown(made, total - len(made))

    yield pieces.say("Starting.", "busy"), results(), gr.skip()
    for answer in ENGINE.draw(request):
        if "error" in answer:
            raise RequestError(answer["error"], answer.get("hint", ""))
        if "warning" in answer:
            warnings.append(f"Note: {answer['warning']}.")
        elif "note" in answer:
            note = answer["note"]
            yield _progress([*warnings, note], "", 0, ""), gr.skip(), gr.skip()
        elif "preview" in answer:
            preview = pieces.inside(Path(answer["preview"]))
        elif "step" in answer:
            noun = order.NOUNS[told.medium].capitalize()
            where = f"{noun} {answer['number'] + 1} of {total}, step {answer['step']} of {answer['steps']}"
            part = (answer["number"] + answer["step"] / answer["steps"]) / total
            yield _progress([*warnings, note], where, part, preview), gr.skip(), gr.skip()
        elif "picture" in answer:
            made.append((Path(answer["picture"]), f"{request['prompt']} - seed {answer['seed']}"))
            preview = ""
            yield gr.skip(), results(), gr.skip()
    words = " ".join([f"{len(made)} made.", *warnings])
    yield pieces.say(words, "good" if made and not warnings else ""), gr.skip() if made else "", gr.skip()


def _sweep(told: Order) -> Sweep | None:
    adapters = [f"{name}:1" for name in told.adapters]
    return sweep_of(told.get("x"), told.get("xs"), told.get("y"), told.get("ys"), told.get("bare", True), adapters)


def _next(now: Order, told: Order) -> Order | None:
    """The form with the seed moved on, if it is to move."""
    if told.get(order.LOCK.key, True) or told.get("x") or told.get("y"):
        return None
    following = int(told.number(order.SEED)) + int(told.number(order.COUNT))
    return replace(now, values={**now.values, "seed": str(following)}).keep()


def _swept(sweep: Sweep, made: list[tuple[Path, str]], total: int) -> str:
    found: list[Path | None] = [path for path, _ in made]
    grid = sweep.grid([*found, *[None] * (total - len(found))])
    return pieces.picture_grid(sweep.columns, grid, large=total <= LARGE_GRID)


def _progress(notes: list[str], where: str, part: float, preview: str) -> str:
    told = pieces.say(" ".join(filter(None, notes)), "busy")
    picture = f"<img src='{preview}' alt='as it looks so far'>" if preview else ""
    bar = f"<progress max='1' value='{part:.3f}' aria-label='{pieces.text(where)}'></progress>" if where else ""
    return f"{told}<div class='preview'>{picture}<div>{bar}<p class='lead'>{pieces.text(where)}</p></div></div>"


# -- what was made before ----------------------------------------------------------------------------------------


def shelf_of(medium: str) -> str:
    made = works.history(medium)
    if made:
        return works.shelf(made)
    noun = order.NOUNS[medium]
    if not order.bases_here(medium):
        names = ", ".join(row["name"] for row in order.schemas()["bases"] if row["medium"] == medium)
        return pieces.empty(
            f"No base that makes a {noun} is here yet",
            f"{names}: choose one under Advanced, and it is downloaded first.",
        )
    example = fields.button("example", f"Make one: {order.TRY[medium]}", "primary")
    return f"<div class='empty'><b>No {noun}s yet</b>Write a prompt above, or see how it goes.<p>{example}</p></div>"


def act_on_work(medium: str, name: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
    """Restores a work's settings, makes a sticker of it, or the example. Yields (form, said, results, shelf)."""
    what, _, which = str(event._data.get("name", "")).partition(":")
    told = order_of(draft_of(name), medium)
    try:
        if what == "example":
            told = replace(told, values={**told.values, "prompt": order.TRY[medium]}).keep()
            yield form_of(told), gr.skip(), gr.skip(), gr.skip()
            yield from ((gr.skip(), *shown) for shown in draw(told))
            yield gr.skip(), gr.skip(), gr.skip(), shelf_of(medium)
        elif what == "use":
            yield restore_from(told, works.work_of(which)), gr.skip(), gr.skip(), gr.skip()
        elif what == "sticker":
            target, _, work = which.partition(":")
            yield (
                gr.skip(),
                pieces.say(f"Fitting it to {works.STICKERS.get(target, target)}.", "busy"),
                gr.skip(),
                gr.skip(),
            )
            yield gr.skip(), sticker(works.work_of(work), target), gr.skip(), gr.skip()
    except StudioError as error:
        raise said(error) from None


def sticker(path: Path, target: str) -> str:
    """Fits a clip to a messenger's limits and offers the file. Raises WorkError."""
    ending = works.TARGETS[target].ending if target in works.TARGETS else ""
    out = studio_home() / "cache" / "served" / f"{path.parent.name}-{path.stem}-{target}{ending}"
    facts = ask("sticker", str(path), "--for", target, "--out", str(out), "--force")
    facts = {k: v for k, v in facts.items() if k != "sticker" and isinstance(v, str | int | float)}
    rows = [[pieces.text(key.replace("_", " ")), pieces.text(value)] for key, value in facts.items()]
    url, name = pieces.text(pieces.file_url(out)), pieces.text(out.name)
    link = f"<a class='button primary' href='{url}' download='{name}'>Download {name}</a>"
    ready = pieces.say(f"It fits what {works.STICKERS.get(target, target)} takes.", "good")
    return f"{ready}<p>{link}</p>{pieces.table(['', ''], rows)}"


def restore_from(told: Order, file: Path) -> str:
    """The form with the settings that a work was made with, read from the file itself. Raises RequestError."""
    found = pieces.thumbnails([file])[file]
    if "error" in found:
        raise RequestError(f"this file {found['error']}")
    if "prompt" not in found["facts"]:
        raise RequestError("this file does not say how it was made", "what the studio makes does")
    now, missing = order.restored(told, found["facts"])
    if missing:
        gr.Warning(f"Not in the library: {', '.join(missing)}", title="Adapters left out")
    gr.Info("It makes the same again.", title="Settings restored")
    return form_of(now.keep())


@plain
def drop(medium: str, name: str, file: str | None) -> tuple[Any, None]:
    told = order_of(draft_of(name), medium)
    return (restore_from(told, Path(file)) if file else gr.skip()), None


@plain
def give(name: str, files: list[str] | None) -> tuple[Any, None]:
    told = order_of(draft_of(name), "video")
    if left_out := order.give_frames(told, [Path(file) for file in files or ()]):
        gr.Warning("; ".join(left_out), title="Left out")
    return form_of(told), None


# -- the page ----------------------------------------------------------------------------------------------------


def build_medium(medium: str, draft: Any) -> tuple[Any, Any]:
    """A form, what comes of it, and what came before. Returns form and shelf."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    many: dict[str, Any] = {**quiet, "trigger_mode": "multiple", "concurrency_limit": 4}
    with gr.Column(elem_classes="section"):
        form = gr.HTML(js_on_load=pieces.TELL)
        if medium == "video":
            given = gr.File(
                label="Drop pictures that are frames of the clip", file_count="multiple",
                file_types=list(UPLOADS["image"]), height=100, elem_classes="drop",
            )  # fmt: skip
            given.upload(give, [draft, given], [form, given], **quiet)
    told = gr.HTML()
    results = gr.HTML(js_on_load=pieces.TELL)
    with gr.Column(elem_classes="section"):
        gr.HTML(pieces.part("Made before"))
        shelf = gr.HTML(js_on_load=pieces.TELL)
        file = gr.File(
            label=f"Drop a {order.NOUNS[medium]} that the studio made, to restore its settings",
            file_types=list(UPLOADS[medium]), height=100, elem_classes="drop",
        )  # fmt: skip
    shown = [form, told, results, shelf]

    def edited(name: str, event: gr.EventData) -> Any:  # the library knows an event by its annotation
        return edit(medium, name, event)

    def pressed(name: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        yield from act(medium, name, event)

    def chosen(name: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        yield from act_on_work(medium, name, event)

    form.input(edited, draft, form, **quiet, **pieces.IN_TURN)
    form.click(pressed, draft, shown, **many)
    for place in (results, shelf):
        place.click(chosen, draft, shown, **many)
    file.upload(partial(drop, medium), [draft, file], [form, file], **quiet)
    return form, shelf


def build() -> None:
    gr.HTML(pieces.heading("Generate", "Say what to make. With an adapter, use its word."))
    draft = gr.BrowserState("", storage_key="studio-draft", secret="studio")
    media = order.media()
    parts: list[Any] = []
    if len(media) == 1:
        parts += build_medium(media[0], draft)
    else:
        with gr.Tabs():
            for medium in media:
                with gr.Tab(order.TITLES[medium], id=medium):
                    parts += build_medium(medium, draft)

    def opened(name: str | None) -> list[Any]:
        own = draft_of(name)  # one for all tabs, also if the browser has none yet
        return [own.name, *(part for m in media for part in (form_of(order_of(own, m)), shelf_of(m)))]

    gr.on(opened_page(), opened, draft, [draft, *parts], show_progress="hidden", api_visibility="private")


PAGE = Page("Generate", "generate", 40, build)
