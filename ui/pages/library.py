"""Library: the adapters on this machine as cards, and what can be done with one."""

from __future__ import annotations

import dataclasses
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from studio import library
from studio.cards import read_card
from studio.errors import AdapterError, RequestError, StudioError
from studio.files import slug, slugify
from studio.library import Entry
from studio.paths import studio_home
from ui import order, pieces
from ui.commands import ask
from ui.draft import draft_of
from ui.errors import plain, sentence
from ui.evaluations import card_of
from ui.registry import Page, opened_page

A_PAGE = 24
FORMATS = [
    ("diffusers: a LoRA for diffusers and most programs", "diffusers"),
    ("kohya: a LoRA for ComfyUI, Forge and others", "kohya"),
    ("diff: the whole difference of each layer", "diff"),
    ("checkpoint: the base with the adapter in it", "checkpoint"),
]
MOST_BYTES = 4 << 30


def facts_of(entry: Entry) -> dict[str, Any]:
    """What a card and a search need; a damaged file says so."""
    try:
        card = read_card(entry.path)
    except AdapterError as error:
        card = {"method": {"kind": "damaged"}, "base": {"name": error.message}}
    return {
        "method": card.get("method", {}).get("kind", ""), "base": card.get("base", {}).get("name", ""),
        "trigger": card.get("trigger", ""), "steps": card.get("steps", 0), "pictures": card.get("data_count", 0),
        "licence": card.get("base", {}).get("licence", ""), "note": entry.facts.get("note", ""),
        "seed": card.get("seed", 0), "bytes": entry.path.stat().st_size, "run": entry.facts.get("run", ""),
    }  # fmt: skip


FILTERS = ("method", "base")


def found(search: str, chosen: tuple[str, ...] = ()) -> list[Entry]:
    """The adapters whose name or facts have all words of the search, newest first; of the chosen method and base."""
    words, wanted = search.lower().split(), [(key, value) for key, value in zip(FILTERS, chosen, strict=False) if value]
    entries = _newest_first()
    if not words and not wanted:
        return entries
    known = [(entry, facts_of(entry)) for entry in entries]
    return [
        entry
        for entry, facts in known
        if all(facts[key] == value for key, value in wanted)
        and all(word in f"{entry.name} {' '.join(map(str, facts.values()))}".lower() for word in words)
    ]


def _newest_first() -> list[Entry]:
    folder = library.library_dir()
    return _listed(folder, folder.stat().st_mtime_ns) if folder.is_dir() else []


@lru_cache(maxsize=1)
def _listed(folder: Path, _changed: int) -> list[Entry]:
    """Whatever is kept in the folder gets there by renaming, which changes the folder's own time."""
    return sorted(library.entries(), key=lambda e: e.path.stat().st_mtime, reverse=True)


def filter_choices() -> list[Any]:
    """What there is to choose from, for each filter."""
    facts = [facts_of(entry) for entry in _newest_first()]
    listed = [sorted({str(f[key]) for f in facts if f[key]}) for key in FILTERS]
    return [gr.update(choices=[("all", ""), *((value, value) for value in values)]) for values in listed]


def cards(search: str, page: int, chosen: str, *filters: str) -> str:
    entries = found(search, filters)
    if not entries:
        if search or any(filters):
            return pieces.empty("Nothing found", "No adapter has these words, this method and this base.")
        link = "<p><a class='button primary' href='.'>Teach the first one</a></p>"
        return (
            "<div class='empty'><b>The library is empty</b>Finished trainings come here by themselves, and adapters "
            f"can be dropped below.{link}</div>"
        )
    shown = entries[page * A_PAGE : (page + 1) * A_PAGE]
    previews = pieces.own_pictures([e.path.with_suffix(".png") for e in shown if e.path.with_suffix(".png").exists()])
    made = "".join(_card(e, previews.get(e.path.with_suffix(".png"), ""), e.name == chosen) for e in shown)
    return f"<div class='cards' role='group' aria-label='Adapters'>{made}</div>"


def _card(entry: Entry, url: str, chosen: bool) -> str:
    facts, name = facts_of(entry), pieces.text(entry.name)
    picture = f"<img src='{url}' alt='a picture drawn with it'>" if url else "<span class='blank'>no picture</span>"
    trigger = f"<span class='say-it'>say <b>{pieces.text(facts['trigger'])}</b></span>" if facts["trigger"] else ""
    figures = card_of(entry).get("figures", {})
    told = [f"{key} {figures[key]:.2f}" for key in ("similarity", "drift") if isinstance(figures.get(key), float)]
    measured = f"<span>{pieces.text(', '.join(told))}</span>" if told else ""
    note = f"<span>{pieces.text(facts['note'])}</span>" if facts["note"] else ""
    return (
        f"<button type='button' class='card' data-click='{name}' aria-pressed='{str(chosen).lower()}'>"
        f"{picture}<span class='words'><b>{name}</b>{trigger}{note}{measured}<small>{pieces.text(facts['method'])} on "
        f"{pieces.text(facts['base'])}, {pieces.size(facts['bytes'])}</small></span></button>"
    )


def pager(search: str, page: int, *filters: str) -> Any:
    last = max(0, (len(found(search, filters)) - 1) // A_PAGE)
    return gr.update(visible=last > 0, maximum=max(2, last + 1), value=page + 1)


def details(name: str) -> str:
    entry = next((e for e in library.entries() if e.name == name), None)
    if entry is None:
        return pieces.empty("Choose an adapter", "Its facts and what you can do with it appear here.")
    facts = facts_of(entry)
    rows = [
        ("word that calls it", facts["trigger"]), ("method", facts["method"]), ("base", facts["base"]),
        ("licence of the base", facts["licence"]), ("steps", facts["steps"]), ("pictures", facts["pictures"]),
        ("seed", facts["seed"]), ("size", pieces.size(facts["bytes"])), ("file", entry.path), ("run", facts["run"]),
    ]  # fmt: skip
    cells = [[pieces.text(key), pieces.text(value)] for key, value in rows if value not in ("", None)]
    return pieces.part(name) + pieces.table(["", ""], cells)


def take_to_generate(name: str, browser: str | None) -> str:
    """Puts the adapter and its word into the form of its medium. Returns the browser's draft."""
    entry = next((e for e in library.entries() if e.name == name), None)
    if entry is None:
        raise RequestError(f"there is no adapter '{name}'", "reload the page")
    facts, draft = facts_of(entry), draft_of(browser)
    rows = {row["name"]: row["medium"] for row in order.schemas()["bases"]}
    told = order.order_of(draft, rows.get(facts["base"], "image"))
    word = facts["trigger"].split(", ")[0]
    dataclasses.replace(told, adapters=(name,), values={**told.values, "prompt": f"a {word}", "base": ""}).keep()
    return draft.name


# -- what can be done --------------------------------------------------------------------------------------------


def choose(search: str, page: float, method: str, base: str, event: gr.EventData) -> list[Any]:
    return _chosen(str(event._data.get("name", "")), search, page, method, base)


def _chosen(name: str, search: str, page: float, *filters: str) -> list[Any]:
    entry = next((e for e in library.entries() if e.name == name), None)
    note = entry.facts.get("note", "") if entry else ""
    shown = cards(search, int(page) - 1, name, *filters)
    return [name, shown, details(name), gr.update(visible=entry is not None), name, note, ""]


@plain
def keep_words(name: str, new: str, note: str, search: str, page: float, *filters: str) -> list[Any]:
    """Renames, and keeps the note."""
    if new != name:
        library.rename(name, slug(new))
    library.note(new, note[:500])
    return _chosen(new, search, page, *filters)


def bin_dir() -> Path:
    """Removed adapters wait here for an undo, for as long as the studio is not asked to empty it."""
    return studio_home() / "removed"


@plain
def remove(name: str, search: str, page: float, *filters: str) -> list[Any]:
    """Moves an adapter to the bin, whence `undo` brings it back."""
    path = library.library_dir() / f"{slug(name)}.safetensors"
    if not path.exists():
        raise RequestError(f"there is no adapter '{name}'", "reload the page")
    folder = bin_dir() / f"{time.time_ns()}-{name}"
    folder.mkdir(parents=True)
    for suffix in (".json", ".png", ".safetensors"):
        if path.with_suffix(suffix).exists():
            shutil.move(path.with_suffix(suffix), folder / f"{name}{suffix}")
    return [*_chosen("", search, page, *filters), gr.update(visible=True, value=f"Undo: bring back '{name}'")]


@plain
def undo(search: str, page: float, *filters: str) -> list[Any]:
    """Brings the adapter that was removed last back."""
    folders = sorted(bin_dir().iterdir(), reverse=True) if bin_dir().is_dir() else []
    if not folders:
        raise RequestError("there is nothing to bring back")
    name = folders[0].name.split("-", 1)[1]
    free = library.free_name(name)
    for path in folders[0].iterdir():
        shutil.move(path, library.library_dir() / f"{free}{path.suffix}")
    folders[0].rmdir()
    return [*_chosen(free, search, page, *filters), gr.update(visible=False)]


@plain
def export(name: str, to: str, approximate: bool) -> tuple[Any, Any]:
    """Writes the adapter for another program, proves it by reloading, and offers it as one file."""
    if to not in {known for _, known in FORMATS}:
        raise RequestError(f"there is no format '{to}'")
    folder = studio_home() / "cache" / "served" / f"{slug(name)}-{to}"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--allow-approximate"] if approximate else []
    try:
        facts = ask("export", name, "--to", to, "--out", str(folder), *options)
    except StudioError as error:
        return pieces.say(f"Refused. {sentence(error)}", "bad"), gr.update(visible=False)
    archive = shutil.make_archive(str(folder), "zip", folder)
    proof = pieces.say(f"Proven by reloading: {facts['status']}.", "good" if facts["status"] == "exact" else "")
    lines = "".join(f"<li>{pieces.text(line)}</li>" for line in facts.get("warnings", ()))
    rest = {k: v for k, v in facts.items() if isinstance(v, str | int | float) and k not in ("status", "format")}
    table = pieces.table(["", ""], [[pieces.text(k.replace("_", " ")), pieces.text(v)] for k, v in rest.items()])
    return f"{proof}<ul>{lines}</ul>{table}", gr.update(visible=True, value=archive, label=f"Download {name}-{to}.zip")


@plain
def take_in(file: str | None, search: str, page: float, *filters: str) -> list[Any]:
    """Adds a dropped adapter file, after its header was looked at. The name of the file becomes its name."""
    if not file:
        return [gr.skip()] * 7 + [None]
    path = Path(file)
    if path.suffix.lower() != ".safetensors" or path.stat().st_size > MOST_BYTES:
        raise AdapterError(f"'{path.name}' is no .safetensors file of at most {MOST_BYTES >> 30} GB")
    read_card(path)
    ask("inspect", str(path))  # reads it all, apart: damaged values are found now and not when drawing
    name = library.free_name(slugify(path.stem))
    library.add(name, path, {"note": "", "imported": True})
    return [*_chosen(name, search, 1, *filters), None]


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    draft = gr.BrowserState("", storage_key="studio-draft", secret="studio")
    gr.HTML(pieces.heading("Library", "Your adapters. Choose one to use, rename or take elsewhere."))
    chosen = gr.State("")
    with gr.Row(elem_classes="section"):
        search = gr.Textbox(label="Search", placeholder="name, method, base, word or note", scale=3, min_width=220)
        filters = [
            gr.Dropdown([("all", "")], value="", label=key.capitalize(), min_width=140, filterable=False)
            for key in FILTERS
        ]
        page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False, min_width=160)
    back = gr.Button("Undo", visible=False, size="lg")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            grid = gr.HTML(js_on_load=pieces.TELL)
            with gr.Column(elem_classes="section"):
                file = gr.File(
                    label="Drop an adapter (.safetensors) to import it", file_types=[".safetensors"], height=100,
                    elem_classes="drop",
                )  # fmt: skip
        with gr.Column(scale=2, min_width=320, elem_classes="section"):
            facts = gr.HTML()
            with gr.Column(visible=False) as actions:
                use = gr.Button("Generate with it", variant="primary")
                name = gr.Textbox(label="Name", info="Letters, digits, '.', '-' and '_'.")
                note = gr.Textbox(label="Note", placeholder="good at 0.8")
                keep = gr.Button("Keep name and note")
                with gr.Accordion("Export for other programs", open=False):
                    to = gr.Dropdown(FORMATS, value="diffusers", label="Format", filterable=False)
                    approximate = gr.Checkbox(label="Accept a measured error where exact is impossible")
                    write = gr.Button("Export and prove")
                    download = gr.DownloadButton("Download", visible=False, variant="primary")
                delete = gr.Button("Remove", variant="stop")
            proof = gr.HTML()
    shown = [chosen, grid, facts, actions, name, note, proof]
    place = [search, page, *filters]
    grid.click(choose, place, shown, **quiet)
    gr.on([name.submit, note.submit, keep.click], keep_words, [chosen, name, note, *place], shown, **quiet)
    use.click(plain(take_to_generate), [chosen, draft], draft, **quiet).success(
        None, None, None, js="() => { window.location.href = 'generate'; }"
    )
    delete.click(remove, [chosen, *place], [*shown, back], **quiet)
    back.click(undo, place, [*shown, back], **quiet)
    write.click(export, [chosen, to, approximate], [proof, download], api_name="export")
    file.upload(take_in, [file, *place], [*shown, file], show_progress="minimal", api_visibility="private")
    gr.on(
        [search.change, *(f.input for f in filters)],
        lambda s, c, *f: [cards(s, 0, c, *f), pager(s, 0, *f)], [search, chosen, *filters], [grid, page], **quiet,
    )  # fmt: skip
    page.release(lambda c, s, p, *f: cards(s, int(p) - 1, c, *f), [chosen, *place], grid, **quiet)
    gr.on(
        opened_page(), lambda: [cards("", 0, ""), pager("", 0), details(""), *filter_choices()], None,
        [grid, page, facts, *filters], **quiet,
    )  # fmt: skip


PAGE = Page("Library", "library", 30, build)
