"""How good a base of the melody world is: what it keeps of lines alone, and its music against what was asked for.

Codec: held-out combinations of instrument and mode, the line alone, tracked before and after its codes or latents.
Prompts: generated pieces against the fields of their prompts; beside them true renderings of the same prompts (what the
measures can see at all), those sent through the base's codes or latents (what it could play at best), and chance (each
piece against the prompts of all others).

    python -m studio.evaluate.melody_card runs/codec/base --out card/ --prompts 0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from studio.base import Request
from studio.bases.musicgen import MusicGen
from studio.bases.mustango.family import Mustango
from studio.data.melodies.composing import tonic_of
from studio.data.melodies.cycles import TEMPI
from studio.data.melodies.fields import Fields, caption_of, draw_fields, solo, unaccented
from studio.data.melodies.modes import EVERY, MODES, OCTAVE, TAUGHT, TRADITIONS
from studio.data.melodies.source import draw_melody
from studio.data.sounds import Sound, save_sound
from studio.errors import DataError, nearest
from studio.evaluate.beats import estimate_tempo, onset_envelope
from studio.evaluate.lines import mode_likelihood, moves_a_second
from studio.evaluate.pitch import compare_pitch, track_pitch
from studio.evaluate.scales import in_scale_share
from studio.evaluate.timbre import TimbreJudge, timbre_features
from studio.files import write_atomically
from studio.keyed import numpy_generator
from studio.sound_pictures import spectrogram

Progress = Callable[[int, int], None]

CODEC_SECONDS = 4.0
JUDGE_PIECES = 168
TOGETHER = 12  # pieces through the base at a time
SHOWN = 6  # prompts that the sheet has
FIRST_NOTE = slice(3, 9)  # voiced frames
PACED = 8  # true renderings of each tempo that tell how often its lines move
KINDS = ("generated", "words alone", "known", "held out", "rendered", "through the base", "chance")
TEMPO_SLACK = 1.06  # a measured tempo may be so far outside what a word means


# -- the codec -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_codec(base: Any, pieces: int = 24, on_progress: Progress | None = None) -> dict[str, Any]:
    """Figures by tradition and over all, means over pieces; of each codebook the codes used and their perplexity."""
    whole = isinstance(base, Mustango)  # which hears clips of one length, as latents
    seconds = base.longest_seconds if whole else CODEC_SECONDS
    codes_seen: list[torch.Tensor] = []
    rows: dict[str, list[dict[str, float]]] = {tradition: [] for tradition in TRADITIONS}
    for number in range(pieces):
        tradition = TRADITIONS[number % len(TRADITIONS)]
        key = ("melody card", number)
        piece = draw_melody(key, seconds, base.sample_rate_hz, (tradition,), held_out=True, stem=True)
        codes = base.encode_sounds(piece.wave[None])
        heard = base.decode_sounds(codes)[0, 0].cpu().numpy()
        truth = track_pitch(piece.wave[0].numpy(), base.sample_rate_hz)
        rows[tradition].append(compare_pitch(track_pitch(heard, base.sample_rate_hz), truth))
        codes_seen += [] if whole else [codes[0]]
        if on_progress:
            on_progress(number + 1, pieces)
    everything = [row for part in rows.values() for row in part]
    figures = {name: _means(part) for name, part in {**rows, "all": everything}.items() if part}
    return {"pieces": pieces, **figures, "codebooks": _usage(torch.cat(codes_seen, 1)) if codes_seen else []}


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over pieces; a median is taken of medians, since one lost piece would rule a mean. NaN where nothing is."""
    found = {}
    for name in rows[0]:
        there = [row[name] for row in rows if not np.isnan(row[name])] or [float("nan")]
        found[name] = round(float((np.median if name == "median_cents" else np.mean)(there)), 4)
    return found


def _usage(codes: torch.Tensor) -> list[dict[str, float]]:
    """How many codes of each book occur in codes (K, F), and e to the entropy of their shares."""
    found = []
    for book in codes:
        shares = torch.bincount(book).double() / len(book)
        shares = shares[shares > 0]
        found.append({"used": len(shares), "perplexity": round(float(torch.exp(-(shares * shares.log()).sum())), 1)})
    return found


# -- prompts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heard:
    """What the measures make of one sound: cents above A4, moves a second, beats a minute, the instrument's name."""

    cents: NDArray[np.float64]
    moves: float
    tempo: float
    instrument: str


@torch.no_grad()
def fit_judge(
    base: Any, seconds: float, pieces: int = JUDGE_PIECES, traditions: Sequence[str] = TRADITIONS
) -> tuple[TimbreJudge, dict[str, float]]:
    """A judge of instruments, and the share of other renderings that it is right about.

    It knows renderings as they are and as the base's codes or latents keep them: `as they are`, `through the base`.
    """
    drawn = [draw_melody(("timbre", i), seconds, base.sample_rate_hz, traditions, stem=True) for i in range(pieces)]
    names = [piece.score.fields.instrument for piece in drawn]
    together = torch.stack([piece.wave for piece in drawn])
    kept = [base.decode_sounds(base.encode_sounds(part)).cpu() for part in together.split(TOGETHER)]
    waves = {"as they are": together, "through the base": torch.cat(kept)}
    features = {
        how: np.stack([timbre_features(wave[0].numpy(), base.sample_rate_hz) for wave in found])
        for how, found in waves.items()
    }
    split = pieces * 3 // 4
    judge = TimbreJudge.fitted(np.concatenate([rows[:split] for rows in features.values()]), 2 * names[:split])
    right = {
        how: float(np.mean([judge.name(row) == name for row, name in zip(rows[split:], names[split:], strict=True)]))
        for how, rows in features.items()
    }
    return judge, right


def listen(wave: NDArray[np.floating], rate_hz: int, judge: TimbreJudge) -> Heard:
    """Of a mono wave (T,)."""
    track, tempo = track_pitch(wave, rate_hz), estimate_tempo(onset_envelope(wave, rate_hz))
    instrument = judge.name(timbre_features(wave, rate_hz))
    return Heard(track.cents(440.0), moves_a_second(track), tempo, instrument)


def marks(heard: Heard, fields: Fields) -> dict[str, float]:
    """How a sound does against fields, each in [0, 1] or NaN.

    `begins` says whether the first note is where melodies in the mode begin; `mode` whether it is the likeliest of its
    tradition; `pace` whether the line moves about as often as lines of this tempo's word do, rather than another's;
    `tempo` whether its beat is what the word means, up to octaves.
    """
    mode, tonic = MODES[fields.tradition][fields.mode], 1200 * float(np.log2(tonic_of(fields) / 440))
    cents = heard.cents - tonic
    return {
        "begins": float(_begins_at(cents, mode.begins)),
        "in_scale": in_scale_share(cents, mode.degrees),
        "mode": float(_mode_of(heard, fields.tradition, tonic) == fields.mode),
        "pace": float(_pace_of(heard.moves, fields.tradition) == fields.tempo),
        "tempo": float(tempo_fits(heard.tempo, fields)),
        "instrument": float(heard.instrument == fields.instrument),
    }


def _begins_at(cents: NDArray[np.float64], begins: float) -> bool:
    """Whether the first pitch, once it has settled, is this degree of the tonic 0, within 50 cents in any octave."""
    settled = cents[FIRST_NOTE]
    return len(settled) > 0 and abs((float(np.median(settled)) - begins + OCTAVE / 2) % OCTAVE - OCTAVE / 2) < 50


@cache
def _mode_of(heard: Heard, tradition: str, tonic: float) -> str:
    """The likeliest mode of the tradition on this tonic, or "" where no pitch was heard."""
    if not len(heard.cents):
        return ""
    modes = MODES[tradition]
    return max(modes, key=lambda name: mode_likelihood(heard.cents - tonic, modes[name]))


def _pace_of(moves: float, tradition: str) -> str:
    """The tempo's word whose lines move about as often, by ratio."""
    usual = {word: usual_moves(tradition, word) for word in TEMPI[tradition]}
    return min(usual, key=lambda word: abs(np.log((moves + 0.1) / (usual[word] + 0.1))))


@cache
def usual_moves(tradition: str, tempo: str) -> float:
    """Moves a second of lines of a tempo's word, the median over true renderings."""
    found = []
    for number in range(PACED):
        fields = draw_fields(numpy_generator("paces", tradition, number), (tradition,))
        key = ("paces", tradition, tempo, number)
        piece = draw_melody(key, CODEC_SECONDS, 12_000, TRADITIONS, fields=replace(fields, tempo=tempo), stem=True)
        found.append(moves_a_second(track_pitch(piece.wave[0].numpy(), 12_000)))
    return float(np.median(found))


def tempo_fits(tempo: float, fields: Fields) -> bool:
    """Whether beats a minute, their double or half are what the fields' word means, within the slack; NaN is not."""
    low, high = TEMPI[fields.tradition][fields.tempo]
    return any(low / TEMPO_SLACK <= tempo * octave <= high * TEMPO_SLACK for octave in (0.5, 1, 2))


def measure_prompts(
    base: Any,
    count: int,
    seconds: float,
    seed: int = 0,
    out: Path | None = None,
    on_progress: Progress | None = None,
    modes: Set[str] = TAUGHT,
) -> dict[str, Any]:
    """Marks of generated pieces, of true renderings, and by chance; half of the prompts are held-out combinations.

    Of a base that is told beats and chords also `words alone`; `known` and `held out` are the halves of the generated,
    `through the base` renderings by way of its codes or latents. `modes` are those that the base was taught.
    """
    judge, judged = fit_judge(base, seconds)
    asked, shown = [], []
    heard: dict[str, list[Heard]] = {}
    for number in range(count):
        fields, caption, sounds = _played(base, number, seconds, seed, modes)
        if out is not None:
            save_sound(Sound(sounds["generated"], base.sample_rate_hz), out / f"{number:03d}.wav", {"prompt": caption})
        waves = {how: wave.mean(0).numpy() for how, wave in sounds.items()}
        if number < SHOWN:
            shown.append((unaccented(caption), waves["generated"], waves["rendered"]))
        asked.append(fields)
        for how, wave in waves.items():
            heard.setdefault(how, []).append(listen(wave, base.sample_rate_hz, judge))
        if on_progress:
            on_progress(number + 1, count)
    if out is not None:
        _sheet(shown, base.sample_rate_hz).save(out / "sheet.png")
    rows = {how: [marks(h, f) for h, f in zip(sounds, asked, strict=True)] for how, sounds in heard.items()}
    for name, side in (("known", False), ("held out", True)):
        rows[name] = [row for row, f in zip(rows["generated"], asked, strict=True) if f.is_held_out == side]
    rows["chance"] = [
        marks(heard["generated"][i], asked[j]) for a, b in combinations(range(count), 2) for i, j in ((a, b), (b, a))
        if asked[i].tradition == asked[j].tradition
    ]  # fmt: skip
    return {
        "prompts": count,
        "seconds": seconds,
        "seed": seed,
        "instrument_judge_right": {how: round(share, 3) for how, share in judged.items()},
        **{name: _average(part) for name, part in rows.items() if part},
    }


def _prompt(number: int, seed: int, modes: Set[str]) -> tuple[Fields, str]:
    """Fields and words, every other time of a held-out combination. Raises DataError where the modes have none."""
    traditions = [tradition for tradition in TRADITIONS if not modes.isdisjoint(MODES[tradition])]
    rng = numpy_generator("melody prompt", seed, number)
    fields = draw_fields(rng, (traditions[number % len(traditions)],), held_out=number % 2 == 1, modes=modes)
    return fields, solo(caption_of(fields, rng), fields)  # a drone would capture the pitch tracker


def _played(
    base: Any, number: int, seconds: float, seed: int, modes: Set[str]
) -> tuple[Fields, str, dict[str, torch.Tensor]]:
    """A random prompt's fields and words, and its sounds (C, T), by how they came about.

    A base that is told beats and chords is told those of the true rendering, and plays once more by words alone.
    """
    fields, caption = _prompt(number, seed, modes)
    key = ("rendered", seed, number)
    truth = draw_melody(key, seconds, base.sample_rate_hz, TRADITIONS, fields=fields, stem=True)
    prompts = {"generated": caption}
    if isinstance(base, Mustango):
        prompts = {"generated": replace(truth, caption=caption).told, "words alone": caption}
    sounds = {how: base.generate(Request([told], [number], seconds=seconds))[0].wave for how, told in prompts.items()}
    kept = base.decode_sounds(base.encode_sounds(truth.wave[None]))[0].cpu()
    return fields, caption, sounds | {"rendered": truth.wave, "through the base": kept}


def _sheet(rows: Sequence[tuple[str, NDArray[np.floating], NDArray[np.floating]]], rate_hz: int) -> Image.Image:
    """Spectrograms of what was played for each prompt and, to the right, of a true rendering of it."""
    wide, tall, line = 480, 170, 24
    sheet = Image.new("RGB", (2 * wide, len(rows) * (tall + line)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (prompt, played, truth) in enumerate(rows):
        top = number * (tall + line)
        for column, (words, wave) in enumerate(((prompt, played), ("as the world plays it", truth))):
            pen.text((column * wide + 52, top + 4), words, fill="black", font=font)
            sheet.paste(spectrogram(wave, rate_hz, wide, tall), (column * wide, top + line))
    return sheet


def _average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not np.isnan(row[name])]
        if values:
            found[name] = round(float(np.mean(values)), 3)
    return found


# -- as a program ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a base and writes card.json and example sounds. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.evaluate.melody_card", description=__doc__.split("\n")[0])
    parser.add_argument("base", metavar="FOLDER", help="folder of a MusicGen or Mustango, or a bundled base's name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where card.json and sounds go")
    parser.add_argument("--pieces", type=int, default=24, help="pieces sent through the codec (default 24)")
    parser.add_argument(
        "--prompts", type=int, default=24, help="prompts played (default 24; 0 measures the codec alone)"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of what is played, if it can (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default 0)")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=sorted(TAUGHT),
        metavar="MODE",
        help="modes that the base was taught (default: all that are not left to adapters)",
    )
    options = parser.parse_args(arguments)
    from studio.terminal import outcome

    return outcome(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    from studio.bases.registry import load_base
    from studio.terminal import CountProgress, print_table, say

    if strange := next((name for name in options.modes if name not in EVERY), None):
        raise DataError(f"there is no mode '{strange}'", nearest(strange, EVERY))
    for number in range(options.prompts):  # so that what cannot be asked is told before anything is written
        _prompt(number, options.seed, frozenset(options.modes))
    base = load_base(options.base, dtype="fp32")
    if not isinstance(base, MusicGen | Mustango):
        raise DataError(
            f"'{options.base}' makes no music", "the card is for a MusicGen or Mustango of the melody world"
        )
    with CountProgress("codec", options.pieces) as progress:
        codec = measure_codec(base, options.pieces, lambda done, total: progress.show(done))
    card: dict[str, Any] = {"codec": codec}
    _save_examples(base, options.out)
    names = [name for name in (*TRADITIONS, "all") if name in codec]
    print_table(("lines", *codec["all"]), [(name, *map(str, codec[name].values())) for name in names])
    books = [(str(k), str(book["used"]), str(book["perplexity"])) for k, book in enumerate(codec["codebooks"])]
    if books:
        print_table(("codebook", "codes used", "perplexity"), books)
    if options.prompts:
        with CountProgress("prompts", options.prompts) as progress:
            found = measure_prompts(
                base,
                options.prompts,
                min(options.seconds, base.longest_seconds),
                options.seed,
                options.out,
                lambda done, total: progress.show(done),
                frozenset(options.modes),
            )
        card["prompts"] = found
        kinds = [kind for kind in KINDS if kind in found]
        rows = [(mark, *(f"{found[kind].get(mark, float('nan')):.1%}" for kind in kinds)) for mark in found[kinds[0]]]
        print_table(("asked for", *kinds), rows)
    write_atomically(options.out / "card.json", json.dumps(card, indent=1) + "\n")
    say(f"written to {options.out}")


@torch.no_grad()
def _save_examples(base: Any, folder: Path) -> None:
    """A held-out piece of each tradition as it is, then through the codec."""
    seconds = min(6.0, base.longest_seconds)
    for tradition in TRADITIONS:
        piece = draw_melody(("example", tradition), seconds, base.sample_rate_hz, (tradition,), held_out=True)
        heard = base.decode_sounds(base.encode_sounds(piece.wave[None]))[0].cpu()
        pause = torch.zeros(1, base.sample_rate_hz // 2)
        both = Sound(torch.cat([piece.wave, pause, heard], 1), base.sample_rate_hz)
        save_sound(both, folder / f"codec-{tradition}.wav", {"caption": piece.caption})


if __name__ == "__main__":
    sys.exit(main())
