"""What was generated, as the page shows it: pictures and clips to look at, sounds to play, each with what can be done
with it. Which of these a work is, its file's ending says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studio.drawing import pictures_dir
from studio.errors import RequestError
from studio.stickers_out.limits import TARGETS
from studio.thumbnails import SOUND_SUFFIXES
from ui import pieces

ENDINGS = {"image": ".png", "video": ".webp", "audio": ".wav"}
FOLDERS, WORKS = 400, 48  # of the history, the newest
STICKERS = {"whatsapp": "WhatsApp", "telegram": "Telegram", "line": "LINE", "discord": "Discord", "gif": "GIF"}


def history(medium: str) -> list[Path]:
    """The works of a medium, newest first."""
    folders = sorted(pictures_dir().glob("*"), reverse=True) if pictures_dir().is_dir() else []
    found: list[Path] = []
    for folder in folders[:FOLDERS]:
        found += sorted(folder.glob(f"[0-9][0-9][0-9]{ENDINGS[medium]}"))
        if len(found) >= WORKS:
            break
    return found[:WORKS]


def work_of(name: str) -> Path:
    """The file that a page names by folder and file. Raises RequestError for anything else than a work."""
    path = (pictures_dir() / name).resolve()
    known = path.suffix in ENDINGS.values() and path.parent.parent == pictures_dir().resolve()
    if not known or not path.is_file():
        raise RequestError(f"there is no work '{name}'", "reload the page")
    return path


def shown(works: Sequence[tuple[Path, str]], coming: int = 0) -> str:
    """Works with a line of text each, large; and room for those that are still to come."""
    if not works and not coming:
        return ""
    boxes = "".join(_figure(path, said) for path, said in works)
    boxes += "<div class='work view' style='aspect-ratio:1' aria-hidden='true'></div>" * coming
    sounds = " sounds" if works and works[0][0].suffix in SOUND_SUFFIXES else ""
    return f"<div class='works{sounds}'>{boxes}</div>"


def shelf(works: Sequence[Path]) -> str:
    """Everything made before, small."""
    urls = pieces.own_pictures([_face(path) for path in works])
    boxes = "".join(
        f"<figure class='work'>{_view(path, title_of(path), urls[_face(path)])}<figcaption>"
        f"<span>{pieces.text(title_of(path))}</span>{_use(path)}</figcaption></figure>"
        for path in works
    )
    kind = "works sounds" if works and works[0].suffix in SOUND_SUFFIXES else "works small"
    return f"<div class='{kind}'>{boxes}</div>"


def title_of(path: Path) -> str:
    """The beginning of the prompt, as the folder's name has it."""
    return path.parent.name.split("-", 2)[-1].rsplit("-", 1)[0].replace("-", " ")


def _figure(path: Path, said: str) -> str:
    face = _face(path)
    url = pieces.own_pictures([face])[face]
    name = pieces.text(f"{title_of(path)}{path.suffix}".replace(" ", "-"))
    save = f"<a class='link' href='{pieces.text(pieces.file_url(path))}' download='{name}'>Download</a>"
    targets = _targets(path) if path.suffix == ENDINGS["video"] else ""
    return (
        f"<figure class='work'>{_view(path, said, url)}<figcaption><span>{pieces.text(said)}</span>{save}{_use(path)}"
        f"{targets}</figcaption></figure>"
    )


DRAWN = {
    "spectrum": "spectrogram, low notes below",
    "pitch": "how often each pitch sounds, with lines where the mode has degrees, on the tonic that fits best",
}


def _face(path: Path) -> Path:
    """The picture that stands for a work: of a sound its waveform."""
    return path.with_suffix(".wave.webp") if path.suffix in SOUND_SUFFIXES else path


def _view(path: Path, title: str, url: str) -> str:
    if path.suffix in SOUND_SUFFIXES:
        drawn = f"<img alt='waveform' src='{pieces.text(url)}'>" if url else ""
        for kind, words in DRAWN.items():
            if (file := path.with_suffix(f".{kind}.webp")).exists():
                drawn += f"<img class='{kind}' alt='{words}' src='{pieces.text(pieces.file_url(file))}' loading='lazy'>"
        return f"<div class='sound'>{pieces.player(path, title)}{drawn}</div>"
    address = pieces.text(pieces.file_url(path))
    picture = f"<img alt='{pieces.text(title)}' src='{pieces.text(url)}' data-full='{address}' loading='lazy'>"
    return f"<button type='button' class='view' data-cell title='{pieces.text(title)}'>{picture}</button>"


def _use(path: Path) -> str:
    name = pieces.text(f"{path.parent.name}/{path.name}")
    return f"<button type='button' class='link' data-click='use:{name}'>Use its settings</button>"


def _targets(path: Path) -> str:
    name = pieces.text(f"{path.parent.name}/{path.name}")
    buttons = "".join(
        f"<button type='button' class='button' data-click='sticker:{target}:{name}'>{label}</button>"
        for target, label in STICKERS.items()
        if target in TARGETS
    )
    return f"<span>Make a sticker for</span><span class='targets'>{buttons}</span>"
