"""The card on disk: `card.json`, `sheet.png`, and `card.html`, one self-contained page without script or network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from studio.evaluate.card import Answer
from studio.evaluate.exhibit import Exhibit
from studio.files import write_atomically
from studio.report import STYLE
from studio.samples import labelled_grid, save_png

SHOWN = 128  # the side of a picture on the page and on the sheet, in pixels
SUFFIXES = ("", "_base", "_references")


def write_card(answer: Answer, folder: Path) -> dict[str, str]:
    """Writes the three files and returns where they are. Raises DiskError."""
    write_atomically(folder / "card.json", json.dumps(answer.card, indent=1, ensure_ascii=False) + "\n")
    prompts = [setting.prompt for setting in answer.exhibit.protocol.settings]
    save_png(sheet(answer.exhibit), folder / "sheet.png", {"adapter": answer.card["adapter"], "prompts": prompts})
    write_atomically(folder / "card.html", _page(answer))
    return {name: str(folder / name) for name in ("card.json", "card.html", "sheet.png")}


def figure_rows(figures: dict[str, float]) -> list[tuple[str, ...]]:
    """Each figure with the base's and the references' own beside it."""
    names = [name for name in figures if not name.endswith(SUFFIXES[1:])]
    return [(name, *(_number(figures.get(name + suffix)) for suffix in SUFFIXES)) for name in names]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def sheet(exhibit: Exhibit) -> Image.Image:
    """The settings side by side: the references, the base alone, with the adapter."""
    prompts = [setting.prompt for setting in exhibit.protocol.settings]
    rows = {"adapter": exhibit.worn.settings, "base alone": exhibit.alone.settings}
    if exhibit.references:
        rows = {"references": exhibit.references[: len(prompts)], **rows}
    return labelled_grid([[_small(p) for p in row] for row in rows.values()], prompts, list(rows))


def _small(picture: Image.Image) -> Image.Image:
    """On a square, whatever its shape."""
    picture = picture.convert("RGB").copy()
    picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SHOWN, SHOWN), "white")
    square.paste(picture, ((SHOWN - picture.width) // 2, (SHOWN - picture.height) // 2))
    return square


# -- the page --------------------------------------------------------------------------------------------------


def _page(answer: Answer) -> str:
    card, exhibit = answer.card, answer.exhibit
    beside = "".join(f" beside {other['adapter']}:{other['weight']:g}" for other in card["beside"])
    title = html.escape(f"{card['adapter']}:{card['weight']:g}{beside}")
    how = f"{card['method']['kind']} on {card['base']}, protocol {card['protocol']}, seed {card['seed']}, "
    how += f"{card['num_inference_steps'] or 'the base’s own'} sampling steps"
    prompts = [setting.prompt for setting in exhibit.protocol.settings]
    repeats = [f"seed {i}" for i in range(len(exhibit.worn.repeated))]
    parts = [
        f"<h1>{title}</h1><p>{html.escape(how)}</p>",
        "<h2>Figures</h2>" + table(("", "adapter", "base alone", "references"), figure_rows(card["figures"])),
        "<h2>Training</h2>" + table(("", ""), [(key, fact(value)) for key, value in card["training"].items()]),
        "<h2>In new settings</h2>" + _pictures(prompts, exhibit.worn.settings, exhibit.alone.settings),
        "<h2>Unrelated prompts</h2>"
        + _pictures(exhibit.protocol.unrelated, exhibit.worn.unrelated, exhibit.alone.unrelated),
        f"<h2>{html.escape(exhibit.protocol.repeated)}, over seeds</h2>"
        + _pictures(repeats, exhibit.worn.repeated, exhibit.alone.repeated),
        "<h2>References</h2><p>" + "".join(_inline(p, "reference") for p in exhibit.references) + "</p>",
        f"<h2>Machine</h2>{table(('', ''), list(card['machine'].items()))}",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}p img {{ width: 96px; margin: 2px }}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )


def fact(value: Any) -> str:
    """A figure of the training as text."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table whose first column heads its rows."""
    top = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(str(row[0]))}</th>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _pictures(prompts: Sequence[str], worn: Sequence[Image.Image], alone: Sequence[Image.Image]) -> str:
    head = "".join(f"<th scope='col'>{html.escape(prompt)}</th>" for prompt in prompts)
    rows = "".join(
        f"<tr><th scope='row'>{name}</th>"
        + "".join(f"<td>{_inline(p, prompt)}</td>" for p, prompt in zip(pictures, prompts, strict=True))
        + "</tr>"
        for name, pictures in (("adapter", worn), ("base alone", alone))
    )
    return f"<div class='grid'><table><tr><th></th>{head}</tr>{rows}</table></div>"


def _inline(picture: Image.Image, text: str) -> str:
    small = picture.convert("RGB").copy()
    small.thumbnail((2 * SHOWN, 2 * SHOWN))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/webp;base64,{data}'>"
