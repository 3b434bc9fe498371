"""What a person brought to learn from, shown with captions to edit and the marks of the last check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio.paths import assets_dir
from ui import fields, pieces
from ui.draft import ENDINGS, NOUNS, Draft

MOST_EXAMPLES = 12


def example_folder(content: dict[str, Any]) -> Path | None:
    """Where a preset's own example lies, if it has one that is here."""
    path = content["data"]["path"]
    folder = Path(path.replace("{assets}", str(assets_dir()))) if path else None
    return folder if folder is not None and folder.is_dir() else None


def example_files(content: dict[str, Any], medium: str) -> list[Path]:
    folder = example_folder(content)
    found = sorted(folder.iterdir()) if folder else []
    return [path for path in found if path.suffix in ENDINGS[medium] and ".mask" not in path.name]


def shown(draft: Draft, content: dict[str, Any]) -> str:
    """What was dropped; or what is learned from without anything."""
    files = draft.pictures()
    if not files:
        return _example(content, draft.medium)
    marks, made = marks_of(draft), pieces.thumbnails(files)
    boxes = "".join(_box(draft, path, made[path], marks.get(path.name)) for path in files)
    return pieces.anew(f"{_tally(draft, files, marks)}<div class='photos'>{boxes}</div>")


def _tally(draft: Draft, files: list[Path], marks: dict[str, str]) -> str:
    bad = sum(mark != "fine" for mark in marks.values())
    noun, s = NOUNS[draft.medium], "" if len(files) == 1 else "s"
    fault = f", {bad} with a remark" if bad else ", all fine" if marks else ", not checked yet"
    return (
        f"<p class='tally' role='status'>{len(files)} {noun}{s}{fault}"
        f"{fields.button('clear', f'Remove all {noun}s', 'quiet')}</p>"
    )


def _box(draft: Draft, path: Path, facts: dict[str, Any], mark: str | None) -> str:
    name = pieces.text(path.name)
    if "error" in facts:
        picture, mark = "<span class='blank'>no preview</span>", facts["error"]
    else:
        picture = f"<img src='{facts['url']}' alt='{name}' loading='lazy'>"
    if draft.medium == "audio" and "error" not in facts:
        address = pieces.text(pieces.file_url(pieces.served(path)))
        picture = f"<div class='sound'>{picture}<audio controls preload='none' src='{address}'></audio></div>"
    kind = "" if mark is None else "ok" if mark == "fine" else "bad"
    words = {"": _size(facts), "ok": "&#10003; fine"}.get(kind) or f"&#9888; {pieces.text(mark)}"
    return (
        f"<div class='photo'>{picture}<button type='button' class='remove' data-click='remove:{name}' "
        f"title='remove {name}' aria-label='remove {name}'>&#10005;</button><div class='mark {kind}'>{words}</div>"
        f"<textarea data-edit='caption:{name}' aria-label='caption of {name}' placeholder='caption: automatic'>"
        f"{pieces.text(draft.caption(path))}</textarea></div>"
    )


def _size(facts: dict[str, Any]) -> str:
    parts = [f"{facts['width']} x {facts['height']}"] if "width" in facts else []
    parts += [f"{facts['frames']} frames"] if facts.get("frames") else []
    parts += [f"{facts['seconds']:g} s"] if "seconds" in facts else []
    return pieces.text(", ".join(parts))


def _example(content: dict[str, Any], medium: str) -> str:
    noun, files = NOUNS[medium], example_files(content, medium)[:MOST_EXAMPLES]
    if not files:
        hint = {"image": "Drop 4 to 20 pictures above.", "video": "Drop some clips above: GIF, WebP, WebM or MP4.",
                "audio": "Drop half an hour of recordings above, or less."}[medium]  # fmt: skip
        return pieces.empty(f"No {noun}s yet", hint)
    made = pieces.own_pictures(files) if medium != "audio" else {}
    boxes = "".join(
        f"<div class='photo'><img src='{made[path]}' alt=''><div class='mark'>example</div></div>"
        if made.get(path) else f"<div class='photo'><div class='mark'>{pieces.text(path.name)}</div></div>"
        for path in files
    )  # fmt: skip
    return (
        f"<div class='empty'><b>Nothing of yours yet</b>Drop {noun}s above, or see how it goes with these {len(files)}."
        f"<p>{fields.button('example', 'Teach it this example', 'primary')}</p></div>"
        f"<div class='photos examples'>{boxes}</div>"
    )


# -- what the check said -----------------------------------------------------------------------------------------


def marks_of(draft: Draft) -> dict[str, str]:
    """What the last check said of each file: `fine`, or a remark."""
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
    count = [(noun, report[noun]) for noun in ("pictures", "clips", "pieces of sound") if noun in report]
    facts = [
        *count, ("left out", len(report["left out"])),
        ("time, about", pieces.duration(report["minutes in all, about"] * 60)),
        ("memory, peak", f"{report['peak memory GiB']} GiB"), ("trained numbers", f"{report['trained numbers']:,}"),
    ]  # fmt: skip
    boxes = "".join(f"<div><dt>{name}</dt><dd>{pieces.text(value)}</dd></div>" for name, value in facts)
    lines = (
        [f"left out: {x}" for x in report["left out"]] + report["warning"] + [f"export {x}" for x in report["export"]]
    )
    items = "".join(f"<li>{pieces.text(line)}</li>" for line in lines[:30])
    return (
        f"{pieces.say('Checked: it can start.', 'good')}<dl class='facts'>{boxes}</dl><ul class='remarks'>{items}</ul>"
    )
