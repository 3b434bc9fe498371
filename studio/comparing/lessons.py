"""Lessons as folders: pictures or sounds with captions to learn from, and others of the same to compare with.

Held-out glyphs and styles are rendered by the sticker world, the same pictures for the same name. A style's references
are the very things that its protocol asks for, drawn in that style.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageFilter

from studio.comparing.study import Folder, Study, Style, Tune
from studio.data.melodies.folder import Pieces, write_folder
from studio.data.stickers import COLOURS, Ground, Scene, Thing, glyphs, picture, render
from studio.errors import PresetError, nearest
from studio.evaluate.protocol import Protocol, read_protocol
from studio.files import slugify, write_atomically
from studio.keyed import numpy_generator
from studio.samples import save_png
from studio.training import fresh_trigger

SIDE = 128
#: (size, position, ground) of what is learned from, and of what it is compared with
LEARNED = [
    ("", "", "white"),
    ("", "", "yellow"),
    ("", "on the left", "blue"),
    ("", "on the right", "white"),
    ("large", "", "pink"),
    ("small", "", "white"),
    ("", "", "green"),
    ("", "", "grey"),
]
COMPARED = [
    ("", "", "purple"),
    ("", "", "orange"),
    ("large", "", "red"),
    ("", "at the top", "white"),
    ("", "at the bottom", "yellow"),
    ("small", "", "blue"),
    ("", "", "black"),
    ("", "", "brown"),
]
STYLED = "dog cat apple cup rocket tree house fish guitar car owl mushroom".split()


@dataclass(frozen=True)
class Lesson:
    """A lesson that is ready. `protocol` is a name or a file; "" chooses what fits."""

    name: str
    index: int
    kind: str
    pictures: Path
    references: Path
    trigger: str
    protocol: str
    caption: str
    class_word: str = ""
    known_as: str = ""  # the nearest thing that the base knows


def make_lesson(study: Study, name: str, folder: Path) -> Lesson:
    """Renders a lesson below `folder`, or points to where it lies. Raises PresetError, MissingPart, DiskError."""
    index, trigger = study.lessons.index(name), fresh_trigger(f"lesson {name}")
    if name in study.folders:
        return _own(study.folders[name], name, index, trigger)
    place = folder / slugify(name)
    if name in study.tunes:
        tune = study.tunes[name]
        for part, count, seed in (("pictures", tune.pieces, 0), ("references", tune.compared, 1)):
            _play_tune(tune, place / part, count, seed)
        return Lesson(name, index, tune.tradition, place / "pictures", place / "references", trigger, "", "{trigger}")
    learned, compared = place / "pictures", place / "references"
    if name in study.subjects:
        _render_subject(name, learned, compared)
        known, protocol = study.subjects[name], "sticker-subject"
        return Lesson(name, index, "subject", learned, compared, trigger, protocol, "a {trigger}", known_as=known)
    protocol_file = place / "protocol.yaml"
    _render_style(study.styles[name], learned, compared, protocol_file)
    caption = "a {trigger} picture"
    return Lesson(name, index, "style", learned, compared, trigger, str(protocol_file), caption)


def fingerprint(lesson: Lesson) -> str:
    """A hash over what is learned and compared with."""
    digest = hashlib.sha256(f"{lesson.kind} {lesson.trigger} {lesson.caption} {lesson.class_word}".encode())
    for folder in (lesson.pictures, lesson.references):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _own(own: Folder, name: str, index: int, trigger: str) -> Lesson:
    pictures, references = Path(own.pictures).expanduser().resolve(), Path(own.references).expanduser().resolve()
    for path in (pictures, references):
        if not path.is_dir():
            raise PresetError(f"the lesson '{name}': there is no folder '{path}'")
    caption = "a {trigger} {class}" if own.class_word else "a {trigger}"
    return Lesson(name, index, "subject", pictures, references, trigger, "", caption, class_word=own.class_word)


def _play_tune(tune: Tune, folder: Path, count: int, seed: int) -> None:
    """Lines of the mode alone, without drone and drum, which would capture a pitch tracker."""
    if len(list(folder.glob("*.wav"))) == count and (folder / "metadata.jsonl").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(Pieces(folder, count, tune.seconds, mode=tune.mode, instrument=tune.instrument, stems=True, seed=seed))


def _render_subject(name: str, learned: Path, compared: Path) -> None:
    held_out = {glyph.name: glyph for glyph in glyphs("held-out")}
    if name not in held_out:
        raise PresetError(f"'{name}' is no held-out glyph", nearest(name, held_out))
    for folder, scenes in ((learned, LEARNED), (compared, COMPARED)):
        for number, (size, position, ground) in enumerate(scenes):
            scene = Scene((Thing(held_out[name], size=size),), Ground(ground), position)
            shown = render(scene, SIDE, numpy_generator("lesson", name, folder.name, number))
            told = " ".join(word for word in ("a", size, "{trigger}", position) if word)
            told += "" if ground == "white" else f", on a{'n' if ground == 'orange' else ''} {ground} background"
            _save(shown, folder / f"{number}.png", told)


def _render_style(style: Style, learned: Path, compared: Path, protocol_file: Path) -> None:
    asked = read_protocol("sticker-style")
    for thing in STYLED:
        _save(styled(style, thing), learned / f"{slugify(thing)}.png", f"a {{trigger}} {thing}")
    settings = []
    for setting in asked.settings:
        thing = setting.shows["glyph"]
        _save(styled(style, thing), compared / f"{slugify(thing)}.png", "")
        settings.append(setting.model_copy(update={"reference": f"{slugify(thing)}.png"}))
    paired: Protocol = asked.model_copy(update={"settings": tuple(settings)})
    write_atomically(protocol_file, yaml.safe_dump(paired.model_dump(mode="json"), sort_keys=False))


def styled(style: Style, thing: str) -> Image.Image:
    """A known thing in a style, in the middle of a white picture of 128 x 128 pixels."""
    character = next(glyph.character for glyph in glyphs("train") if glyph.name == thing)
    sprite = picture(character, style.colour) if style.kind == "tint" else _lines(picture(character), style.colour)
    scale = 0.62 * SIDE / max(sprite.size)
    sprite = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)), Image.Resampling.BOX)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(sprite, ((SIDE - sprite.width) // 2, (SIDE - sprite.height) // 2), sprite)
    return canvas


def _lines(sprite: Image.Image, colour: str) -> Image.Image:
    """White within lines where light changes: a difference of Gaussians, and the rim of the thing."""
    alpha = sprite.getchannel("A")
    flat = Image.new("RGB", sprite.size, "white")
    flat.paste(sprite, mask=alpha)
    grey = flat.convert("L")
    fine, coarse = (np.asarray(grey.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (1.2, 4.0))
    rim = np.asarray(alpha, np.float32) - np.asarray(alpha.filter(ImageFilter.MinFilter(7)), np.float32)
    ink = np.clip(np.maximum((coarse - fine) * 8, rim) / 255, 0, 1)[..., None]
    pixels = 255 * (1 - ink) + np.array(COLOURS[colour], np.float32) * ink
    return Image.merge("RGBA", (*Image.fromarray(pixels.astype(np.uint8)).split(), alpha))


def _save(shown: Image.Image, path: Path, caption: str) -> None:
    save_png(shown, path, {})
    if caption:
        write_atomically(path.with_suffix(".txt"), caption + "\n")
