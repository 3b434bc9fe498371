"""Pieces of HTML that several pages show. Every text from outside is escaped; pictures travel inside the page."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.paths import studio_home
from studio.thumbnails import make_thumbnails

# An element with data-click or data-edit inside the component tells the server its name, and a field its text.
TELL = """
element.addEventListener('click', e => {
  const t = e.target.closest('[data-click]');
  if (t) { e.preventDefault(); trigger('click', {name: t.dataset.click}); }
});
element.addEventListener('change', e => {
  const t = e.target.closest('[data-edit]');
  if (t) trigger('input', {name: t.dataset.edit, text: t.value});
});
"""


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def heading(title: str, lead: str) -> str:
    return f"<h2 class='page'>{text(title)}</h2><p class='lead'>{text(lead)}</p>"


def step(number: int, title: str) -> str:
    return f"<h3 class='step'><i>{number}</i>{text(title)}</h3>"


def say(sentence: str, kind: str = "") -> str:
    return f"<div class='say {kind}' role='status'>{text(sentence)}</div>" if sentence else ""


def empty(title: str, sentence: str) -> str:
    return f"<div class='empty'><b>{text(title)}</b>{text(sentence)}</div>"


KINDS = {"finished": "good", "failed": "bad", "broken off": "bad"} | dict.fromkeys(
    ("starting", "preparing", "training", "stopping", "paused", "queued"), "busy"
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


@lru_cache(maxsize=256)
def own_picture(path: Path) -> str:
    """The data URL of a picture that ships with the studio, or ""."""
    return thumbnails([path], 320)[path].get("url", "") if path.is_file() else ""


def served(path: Path) -> Path:
    """A copy of a run's file in the one folder that the server gives files from."""
    folder = studio_home() / "cache" / "served" / hashlib.sha256(str(path).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    target.write_bytes(path.read_bytes())
    return target


def sample_grid(folder: Path, samples: Sequence[dict[str, Any]]) -> str:
    """Rows are steps, the first the base alone; columns are prompts. Arrow keys move, Enter shows a picture large."""
    if not samples:
        return ""
    prompts = list(dict.fromkeys(e["prompt"] for e in samples))
    rows: dict[int, dict[str, Path]] = {}
    for event in samples:
        rows.setdefault(event["step"], {})[event["prompt"]] = folder / event["path"]
    made = thumbnails([path for row in rows.values() for path in row.values()])
    head = "".join(f"<th scope='col'>{text(prompt)}</th>" for prompt in prompts)
    body = ""
    for number, row in sorted(rows.items()):
        name = "the base" if number == 0 else f"step {number}"
        cells = ""
        for prompt in prompts:
            url = made[row[prompt]].get("url", "") if prompt in row else ""
            title = f"{prompt} ({name})"
            if prompt not in row:
                cells += "<td></td>"  # not drawn yet
                continue
            picture = f"<img alt='{text(title)}' src='{url}'>" if url else "missing"
            cells += f"<td><button data-cell type='button' title='{text(title)}'>{picture}</button></td>"
        body += f"<tr class='{'base' if number == 0 else ''}'><th scope='row'>{name}</th>{cells}</tr>"
    return f"<div class='grid'><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
