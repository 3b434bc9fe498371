"""Pieces of HTML that several pages show. Every text from outside is escaped; pictures travel inside the page."""

from __future__ import annotations

import base64
import hashlib
import html
import shutil
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from studio.drawing import pictures_dir
from studio.paths import studio_home
from studio.thumbnails import SOUND_SUFFIXES, make_thumbnails

# An element with data-click or data-edit inside the component tells the server its name, a field also its value; both
# tell `values`, what all the fields of the component say.
TELL = """
const said = t => t.type === 'checkbox' ? t.checked : t.value;
const values = () => {
  const found = {};
  element.querySelectorAll('[data-edit]').forEach(t => {
    const key = t.dataset.edit;
    if (t.dataset.option === undefined) found[key] = said(t);
    else { found[key] = found[key] || []; if (t.checked) found[key].push(t.dataset.option); }
  });
  return found;
};
element.addEventListener('click', e => {
  const t = e.target.closest('[data-click]');
  if (t) { e.preventDefault(); trigger('click', {name: t.dataset.click, values: values()}); }
});
element.addEventListener('change', e => {
  const t = e.target.closest('[data-edit]');
  if (t) trigger('input', {name: t.dataset.edit, text: said(t), values: values()});
});
"""


# Of edits none is dropped while another is under way, and none overtakes another.
IN_TURN: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1}


def anew(form: str) -> str:
    """A form that takes the place of the one shown, whatever a person has typed or opened there.

    The library changes the page's elements into those that the server sends, and keeps what was typed; an element of
    another name it replaces.
    """
    name = f"form-{time.time_ns()}"
    return f"<{name} data-time='{name}'>{form}</{name}>"


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def heading(title: str, lead: str) -> str:
    return f"<h1 class='page'>{text(title)}</h1><p class='lead'>{text(lead)}</p>"


def step(number: int, title: str) -> str:
    return f"<h2 class='step'><i aria-hidden='true'>{number}</i>{text(title)}</h2>"


def part(title: str) -> str:
    return f"<h2 class='step'>{text(title)}</h2>"


def say(sentence: str, kind: str = "") -> str:
    return f"<div class='say {kind}' role='status'>{text(sentence)}</div>" if sentence else ""


def empty(title: str, sentence: str) -> str:
    return f"<div class='empty'><b>{text(title)}</b>{text(sentence)}</div>"


KINDS = {"finished": "good", "failed": "bad", "broken off": "bad"} | dict.fromkeys(
    ("starting", "preparing", "training", "working", "stopping", "paused", "queued"), "busy"
)


def badge(state: str) -> str:
    return f"<span class='badge {KINDS.get(state, '')}'>{text(state)}</span>"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], chosen: int | None = None) -> str:
    """A table; the cells are HTML already."""
    head = "".join(f"<th scope='col'>{text(c)}</th>" for c in columns)
    body = "".join(
        f"<tr{' class=chosen' if number == chosen else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f"<div class='table'><table>{head}<tbody>{body}</tbody></table></div>"


# -- pictures ----------------------------------------------------------------------------------------------------


def thumbnails_dir() -> Path:
    return studio_home() / "cache" / "thumbnails"


def thumbnails(pictures: Sequence[Path], side: int = 256) -> dict[Path, dict[str, Any]]:
    """What `make_thumbnails` says of each picture, from memory where it was asked before. `url` is a data URL."""
    wanted = {path: _mark(path) for path in pictures}
    new = [path for path, mark in wanted.items() if (path, mark, side) not in _made]
    found = make_thumbnails(new, thumbnails_dir(), side) if new else {}
    for path in new:
        facts = found[str(path)]
        if "thumbnail" in facts:
            thumbnail = Path(facts["thumbnail"])
            facts["url"] = f"data:image/webp;base64,{base64.b64encode(thumbnail.read_bytes()).decode()}"
            thumbnail.unlink(missing_ok=True)
        while len(_made) > 4000:
            _made.pop(next(iter(_made)))
        _made[path, wanted[path], side] = facts
    return {path: _made[path, mark, side] for path, mark in wanted.items()}


_made: dict[tuple[Path, int, int], dict[str, Any]] = {}


def _mark(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


SMALL_BYTES = 96 << 10  # of a picture that is shown as it is
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


def own_pictures(pictures: Sequence[Path]) -> dict[Path, str]:
    """Data URLs of pictures that the studio itself brought along or made; "" for one that cannot be shown.

    Small ones go to the browser as they are, without a process that decodes them first.
    """
    urls = {path: _as_it_is(path, _mark(path)) for path in pictures}
    large = [path for path, url in urls.items() if not url]
    return urls | {path: facts.get("url", "") for path, facts in (thumbnails(large, 320) if large else {}).items()}


@lru_cache(maxsize=1000)
def _as_it_is(path: Path, _changed: int) -> str:
    try:
        if path.suffix not in TYPES or path.stat().st_size > SMALL_BYTES:
            return ""
        if path.is_relative_to(pictures_dir()):  # where the server gives files from
            return file_url(path)
        return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return ""


def inside(path: Path) -> str:
    """A small picture of the studio's own as a data URL, read anew each time; "" if it is not there."""
    try:
        return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return ""


def served(path: Path) -> Path:
    """A copy of a run's file in the one folder that the server gives files from."""
    folder = studio_home() / "cache" / "served" / hashlib.sha256(str(path).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    try:
        if target.stat().st_mtime_ns != path.stat().st_mtime_ns:
            raise FileNotFoundError
    except FileNotFoundError:
        shutil.copy2(path, target)
    return target


def sample_grid(folder: Path, samples: Sequence[dict[str, Any]]) -> str:
    """Rows are steps, the first the base alone; columns are prompts."""
    prompts = list(dict.fromkeys(e["prompt"] for e in samples))
    found: dict[int, dict[str, Path]] = {}
    for event in samples:
        found.setdefault(event["step"], {})[event["prompt"]] = folder / event["path"]
    rows = [
        (f"step {number}" if number else "the base", [row.get(prompt) for prompt in prompts])
        for number, row in sorted(found.items())
    ]
    return picture_grid(prompts, rows)


def picture_grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path | None]]], large: bool = False) -> str:
    """Pictures of the studio's own under their columns' names. Arrow keys move, Enter shows a picture large.

    None is a picture that is not drawn yet. A row that is named `the base` is marked as what others are held against.
    """
    if not rows:
        return ""
    urls = own_pictures([p for _, row in rows for p in row if p is not None and p.suffix not in SOUND_SUFFIXES])
    head = "".join(f"<th scope='col'>{text(name)}</th>" for name in columns)
    body = ""
    for name, row in rows:
        cells = "".join(_cell(f"{column} ({name})", path, urls) for column, path in zip(columns, row, strict=True))
        body += f"<tr class='{'base' if name == 'the base' else ''}'><th scope='row'>{text(name)}</th>{cells}</tr>"
    kind = "grid large" if large else "grid"
    return f"<div class='{kind}'><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(title: str, path: Path | None, urls: dict[Path, str]) -> str:
    if path is None:
        return "<td class='coming'></td>"
    if path.suffix in SOUND_SUFFIXES:
        return f"<td class='sound'>{player(path, title)}</td>"
    full = "" if _as_it_is(path, _mark(path)) else f" data-full='{text(file_url(served(path)))}'"
    picture = f"<img alt='{text(title)}' src='{urls[path]}'{full}>" if urls[path] else "missing"
    return f"<td><button data-cell type='button' title='{text(title)}'>{picture}</button></td>"


def player(path: Path, title: str) -> str:
    """A player of a sound of the studio's own."""
    address = text(file_url(path if path.is_relative_to(pictures_dir()) else served(path)))
    return f"<audio controls preload='none' aria-label='{text(title)}' src='{address}'></audio>"


def file_url(path: Path) -> str:
    """The address of a file in a folder that the server gives files from."""
    return f"/gradio_api/file={quote(str(path))}"
