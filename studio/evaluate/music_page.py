"""The card of an adapter of music on disk: `card.json`, `card.html` with players and pictures, and the sounds."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from studio.data.sounds import Sound, save_sound
from studio.evaluate.card_page import fact, figure_rows, table
from studio.evaluate.music_card import MusicAnswer
from studio.evaluate.recital import Recording
from studio.files import write_atomically
from studio.report import STYLE
from studio.sound_pictures import pitch_histogram, spectrogram

SHOWN = 4  # sounds on the page
SIZE = (440, 150)


def write_music_card(answer: MusicAnswer, folder: Path) -> dict[str, str]:
    """Writes everything and returns where it is. Raises DiskError."""
    recital, card = answer.recital, answer.card
    for name, sounds in (("adapter", recital.worn.asked), ("base", recital.alone.asked)):
        for number, (sound, truth) in enumerate(zip(sounds, recital.truth, strict=True)):
            facts = {"prompt": truth.caption, "base": card["base"], "licence": card["licence"]}
            save_sound(sound, folder / name / f"{number:02d}.wav", facts)
    write_atomically(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "card.html", _page(answer))
    return {name: str(folder / name) for name in ("card.json", "card.html")}


def _page(answer: MusicAnswer) -> str:
    card, recital = answer.card, answer.recital
    title = html.escape(f"{Path(card['adapter']).name}:{card['weight']:g}")
    licence = f", licence of the base {card['licence']}" if card["licence"] else ""
    how = f"{card['method']['kind']} on {card['base']}{licence}, {card['sounds']} sounds of {card['seconds']:g} s"
    parts = [
        f"<h1>{title}</h1><p>{html.escape(how)}</p>",
        "<h2>Figures</h2>" + table(("", "adapter", "base alone", "references"), figure_rows(card["figures"])),
        "<h2>Training</h2>" + table(("", ""), [(key, fact(value)) for key, value in card["training"].items()]),
    ]
    sets = {"adapter": recital.worn.asked, "base alone": recital.alone.asked}
    sets["recording"] = [r.sound for r in recital.truth]
    for number, recording in enumerate(recital.truth[:SHOWN]):
        rows = "".join(_row(name, sounds[number], recording) for name, sounds in sets.items())
        parts.append(f"<h2>{html.escape(recording.caption)}</h2><div class='sounds'>{rows}</div>")
    parts.append(f"<h2>Machine</h2>{table(('', ''), list(card['machine'].items()))}")
    own = ".sounds figure { margin: .6rem 0 } .sounds img { max-width: 100% } audio { width: 20rem }"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}{own}</style></head><body>{''.join(parts)}</body></html>"
    )


def _row(name: str, sound: Sound, recording: Recording) -> str:
    wave, rate = sound.wave.mean(0).numpy(), sound.sample_rate_hz
    pictures: Sequence[Image.Image] = [spectrogram(wave, rate, *SIZE)]
    if recording.mode is not None:
        pictures = [*pictures, pitch_histogram(wave, rate, recording.mode, *SIZE, recording.tonic_hz)]
    shown = "".join(f"<img alt='{name}' src='data:image/png;base64,{_encoded(picture)}'>" for picture in pictures)
    return f"<figure><figcaption>{name}</figcaption>{_player(sound)}<br>{shown}</figure>"


def _player(sound: Sound) -> str:
    import soundfile

    buffer = io.BytesIO()
    wave = sound.wave.clamp(-1, 1).T.numpy()
    soundfile.write(buffer, wave, sound.sample_rate_hz, format="WAV", subtype="PCM_16")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<audio controls preload='none' src='data:audio/wav;base64,{data}'></audio>"


def _encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
