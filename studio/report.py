"""`report.html`: a run on one self-contained page: figures, loss curve, samples, settings. No script, no network."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from studio.curves import loss_curve
from studio.files import write_atomically
from studio.inspecting import describe_adapter
from studio.run import Run

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667; --line: #d8dbe2; --ground: #fff; --curve: #2f6fdd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --soft: #9aa2b1; --line: #353a46; --ground: #15181e; --curve: #7aa8ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p, td, th { color: var(--soft) } b { color: var(--ink) }
table { border-collapse: collapse } td, th { padding: .3rem .5rem; text-align: left; vertical-align: top;
  font-weight: normal } .grid { overflow-x: auto }
.grid th[scope=col] { max-width: 128px }
.grid img { width: 128px; border-radius: 6px; display: block }
pre { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; font-size: 13px }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 12px }
"""


def write_report(run: Run) -> None:
    """Writes `report.html` from what lies in the run folder."""
    history = run.history()
    last = history[-1] if history else {}
    steps = [e for e in history if e["kind"] == "step"]
    parts = [
        f"<h1>{html.escape(run.folder.name)}</h1><p>{html.escape(_outcome(last, steps))}</p>",
        "<h2>Loss</h2>" + loss_curve(steps, [e for e in history if e["kind"] == "validation"]),
        "<h2>Samples</h2><p>Rows are steps, the first is the base alone; each has the same prompts and noise.</p>"
        + _sample_grid(run, [e for e in history if e["kind"] == "sample"]),
        *(_text(path) for path in sorted((run.folder / "sections").glob("*.html"))),  # what a task tells of itself
        _card(run),
        _list("Warnings", [e.get("text", "") for e in history if e["kind"] == "warning"]),
        f"<h2>Settings</h2><pre>{html.escape(_text(run.preset_path))}</pre>",
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(run.folder.name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    write_atomically(run.folder / "report.html", page)


def _outcome(last: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    done = f"{steps[-1]['step']} steps" if steps else "no step"
    kind = last.get("kind")
    if kind == "finished":
        return f"Finished: {done} in {last.get('seconds', 0):.0f} s."
    if kind == "failed":
        return f"Failed after {done}: {last.get('error', '')}"
    return f"{'Stopped' if kind == 'stopped' else 'Unfinished'} after {done}."


def _sample_grid(run: Run, samples: list[dict[str, Any]]) -> str:
    if not samples:
        return "<p>None were drawn.</p>"
    prompts = list(dict.fromkeys(e["prompt"] for e in samples))
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for event in samples:
        rows.setdefault(event["step"], {})[event["prompt"]] = event
    head = "".join(f"<th scope='col'>{html.escape(p)}</th>" for p in prompts)
    body = ""
    for step, row in sorted(rows.items()):
        cells = "".join(f"<td>{_picture(run, row[p]) if p in row else ''}</td>" for p in prompts)
        body += f"<tr><th scope='row'>{'base' if step == 0 else step}</th>{cells}</tr>"
    return f"<div class='grid'><table><tr><th></th>{head}</tr>{body}</table></div>"


def _picture(run: Run, event: dict[str, Any]) -> str:
    if event["path"].endswith(".wav"):
        return _sound(run, event)
    try:
        picture = Image.open(run.folder / event["path"]).convert("RGB")
    except OSError:
        return "missing"
    picture.thumbnail((1024, 256))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(event['prompt'], quote=True)}' src='data:image/webp;base64,{data}'>"


def _sound(run: Run, event: dict[str, Any]) -> str:
    try:
        data = base64.b64encode((run.folder / event["path"]).read_bytes()).decode()
    except OSError:
        return "missing"
    return f"<audio controls src='data:audio/wav;base64,{data}'></audio>"


def _card(run: Run) -> str:
    """What the adapter's own card says, for runs that made one."""
    if not run.adapter_path.exists():
        return ""
    facts = describe_adapter(str(run.adapter_path))
    rows = [(key, value) for key, value in facts.items() if key not in ("file", "components", "words")]
    for part in facts["components"]:
        ranks = f", rank {part['ranks']}" if part["ranks"] else ""
        trained = f"{part['trained_numbers']:,} trained numbers"
        size = f", change of norm {part['norm']:.4g}" if part["norm"] is not None else ""
        text = f"{part['layers']} layers{ranks}, {trained}{size}"
        rows.append((part["part"], text))
    body = "".join(f"<tr><th scope='row'>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return f"<h2>Adapter</h2><table>{body}</table>"


def _list(title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
