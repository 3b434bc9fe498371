"""Library: the adapters on this machine as cards, and what can be done with one."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import gradio as gr

from studio import library
from studio.cards import read_card
from studio.errors import AdapterError, RequestError, StudioError
from studio.files import slug, slugify
from studio.library import Entry
from studio.paths import studio_home
from ui import pieces
from ui.commands import ask
from ui.errors import plain, sentence
from ui.registry import Page

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


def found(search: str) -> list[Entry]:
    """The adapters whose name or facts have all words of the search, newest first."""
    words = search.lower().split()
    entries = sorted(library.entries(), key=lambda e: e.path.stat().st_mtime, reverse=True)
    if not words:
        return entries
    return [
        e for e in entries if all(w in f"{e.name} {' '.join(map(str, facts_of(e).values()))}".lower() for w in words)
    ]


def cards(search: str, page: int, chosen: str) -> str:
    entries = found(search)
    if not entries:
        if search:
            return pieces.empty("Nothing found", f"No adapter has '{search}' in its name, method, base, word or note.")
        return pieces.empty(
            "The library is empty", "Finished trainings come here by themselves. Start one under Train."
        )
    shown = entries[page * A_PAGE : (page + 1) * A_PAGE]
    previews = pieces.own_pictures([e.path.with_suffix(".png") for e in shown if e.path.with_suffix(".png").exists()])
    made = "".join(_card(e, previews.get(e.path.with_suffix(".png"), ""), e.name == chosen) for e in shown)
    return f"<div class='cards' role='group' aria-label='Adapters'>{made}</div>"


def _card(entry: Entry, url: str, chosen: bool) -> str:
    facts, name = facts_of(entry), pieces.text(entry.name)
    picture = f"<img src='{url}' alt='a picture drawn with it'>" if url else "<span class='blank'>no picture</span>"
    trigger = f"<span>say: <b>{pieces.text(facts['trigger'])}</b></span>" if facts["trigger"] else ""
    note = f"<span>{pieces.text(facts['note'])}</span>" if facts["note"] else ""
    return (
        f"<button type='button' class='card' data-click='{name}' aria-pressed='{str(chosen).lower()}'>"
        f"{picture}<span class='words'><b>{name}</b>{trigger}{note}<small>{pieces.text(facts['method'])} on "
        f"{pieces.text(facts['base'])}, {pieces.size(facts['bytes'])}</small></span></button>"
    )


def pager(search: str, page: int) -> Any:
    last = max(0, (len(found(search)) - 1) // A_PAGE)
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
    return f"<h2 class='step'>{pieces.text(name)}</h2>" + pieces.table(["", ""], cells)


# -- what can be done --------------------------------------------------------------------------------------------


def choose(search: str, page: float, event: gr.EventData) -> list[Any]:
    return _chosen(str(event._data.get("name", "")), search, int(page) - 1)


def _chosen(name: str, search: str, page: int) -> list[Any]:
    entry = next((e for e in library.entries() if e.name == name), None)
    note = entry.facts.get("note", "") if entry else ""
    return [name, cards(search, page, name), details(name), gr.update(visible=entry is not None), name, note, ""]


@plain
def rename(name: str, new: str, search: str, page: float) -> list[Any]:
    if new != name:
        library.rename(name, new)
    return _chosen(new, search, int(page) - 1)


@plain
def set_note(name: str, text: str, search: str, page: float) -> list[Any]:
    library.note(name, text[:500])
    return _chosen(name, search, int(page) - 1)


def bin_dir() -> Path:
    """Removed adapters wait here for an undo, for as long as the studio is not asked to empty it."""
    return studio_home() / "removed"


@plain
def remove(name: str, search: str, page: float) -> list[Any]:
    """Moves an adapter to the bin, whence `undo` brings it back."""
    path = library.library_dir() / f"{slug(name)}.safetensors"
    if not path.exists():
        raise RequestError(f"there is no adapter '{name}'", "reload the page")
    folder = bin_dir() / f"{time.time_ns()}-{name}"
    folder.mkdir(parents=True)
    for suffix in (".json", ".png", ".safetensors"):
        if path.with_suffix(suffix).exists():
            shutil.move(path.with_suffix(suffix), folder / f"{name}{suffix}")
    return [*_chosen("", search, int(page) - 1), gr.update(visible=True, value=f"Undo: bring back '{name}'")]


@plain
def undo(search: str, page: float) -> list[Any]:
    """Brings the adapter that was removed last back."""
    folders = sorted(bin_dir().iterdir(), reverse=True) if bin_dir().is_dir() else []
    if not folders:
        raise RequestError("there is nothing to bring back")
    name = folders[0].name.split("-", 1)[1]
    free = library.free_name(name)
    for path in folders[0].iterdir():
        shutil.move(path, library.library_dir() / f"{free}{path.suffix}")
    folders[0].rmdir()
    return [*_chosen(free, search, int(page) - 1), gr.update(visible=False)]


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
def take_in(file: str | None, search: str) -> list[Any]:
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
    return [*_chosen(name, search, 0), None]


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.HTML(pieces.heading("Library", "Your adapters. Choose one to use, rename or take elsewhere."))
    chosen = gr.State("")
    with gr.Row():
        search = gr.Textbox(label="Search", placeholder="name, method, base, word or note", scale=3)
        page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False, min_width=140)
        back = gr.Button("Undo", visible=False, min_width=160)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            grid = gr.HTML(js_on_load=pieces.TELL)
            file = gr.File(label="Drop an adapter (.safetensors) to import it", file_types=[".safetensors"], height=150)
        with gr.Column(scale=2, min_width=320, elem_classes="section"):
            facts = gr.HTML()
            with gr.Column(visible=False) as actions:
                gr.Button("Draw with it", link="/generate", variant="primary")
                name = gr.Textbox(label="Name", info="Letters, digits, '.', '-' and '_'. Enter renames.")
                note = gr.Textbox(label="Note", placeholder="good at 0.8", info="Enter keeps it.")
                with gr.Accordion("Export for other programs", open=False):
                    to = gr.Dropdown(FORMATS, value="diffusers", label="Format")
                    approximate = gr.Checkbox(label="Accept a measured error where exact is impossible")
                    write = gr.Button("Export and prove")
                    download = gr.DownloadButton("Download", visible=False, variant="primary")
                delete = gr.Button("Remove", variant="stop")
            proof = gr.HTML()
    shown = [chosen, grid, facts, actions, name, note, proof]
    grid.click(choose, [search, page], shown, **quiet)
    name.submit(rename, [chosen, name, search, page], shown, **quiet)
    note.submit(set_note, [chosen, note, search, page], shown, **quiet)
    delete.click(remove, [chosen, search, page], [*shown, back], **quiet)
    back.click(undo, [search, page], [*shown, back], **quiet)
    write.click(export, [chosen, to, approximate], [proof, download], api_name="export")
    file.upload(take_in, [file, search], [*shown, file], show_progress="minimal", api_visibility="private")
    search.change(lambda s, c: [cards(s, 0, c), pager(s, 0)], [search, chosen], [grid, page], **quiet)
    page.release(lambda s, p, c: cards(s, int(p) - 1, c), [search, page, chosen], grid, **quiet)
    gr.on(None, lambda s: [cards(s, 0, ""), pager(s, 0), details("")], search, [grid, page, facts], **quiet)


PAGE = Page("Library", "library", 30, build)
