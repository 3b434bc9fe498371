"""The card of an adapter of music: how well it learned, what else it moved, what it cost.

Figures bear the suffixes of all cards: with the adapter, `_base` without it, `_references` of true sounds against true
ones. Modes are measured where captions name them; files of the melody world tell tonic, tempo and instrument, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from studio.data.cache import Cache
from studio.data.melodies.cycles import CYCLES
from studio.data.melodies.modes import MODES
from studio.data.recordings import scan_recordings
from studio.data.sounds import Sound
from studio.errors import DataError
from studio.evaluate.beats import cycle_correlation, estimate_tempo, f_measure, onset_envelope, onsets
from studio.evaluate.card import card_of, recipe_of, trained_on
from studio.evaluate.frechet import embed, frechet_of, spread_of
from studio.evaluate.lines import (
    direction_kept,
    likeliest_tonic,
    mode_likelihood,
    notes_of,
    ornament_distance,
    weights_of,
)
from studio.evaluate.melody_card import tempo_fits
from studio.evaluate.pitch import PitchTrack, track_pitch
from studio.evaluate.recital import Asked, Playing, Progress, Recital, Recording, play_recital, read_recordings
from studio.evaluate.scales import in_scale_share
from studio.evaluate.timbre import TimbreJudge, timbre_features
from studio.generation import parse_use, wearing
from studio.keyed import torch_generator
from studio.library import find
from studio.music.score import read_score
from studio.paths import studio_home
from studio.preset import Data

DRAWS = 8  # noises per recording, for bases that denoise
LOSS_BATCH = 4
MARKS = (
    "in_scale",
    "mode_likelihood",
    "mode_margin",
    "mode_right",
    "direction",
    "beats_met",
    "rhythm",
    "tempo_right",
    "instrument_right",
)


@dataclass(frozen=True)
class MusicQuestion:
    """What is to be evaluated, and how."""

    adapter: str
    beside: Sequence[str] = ()
    references: Path | None = None
    clap: Path | None = None
    playing: Playing = field(default_factory=Playing)


@dataclass(frozen=True)
class MusicAnswer:
    card: dict[str, Any]
    recital: Recital
    warnings: list[str]


def evaluate_music(question: MusicQuestion, base: Any, on_progress: Progress | None = None) -> MusicAnswer:
    """Measures an adapter on a base of music. Raises RequestError, DataError, MissingPart."""
    began = time.monotonic()
    use = parse_use(question.adapter)
    path, card = find(use.name), use.adapter.card
    beside = [parse_use(text) for text in question.beside]
    folder = question.references or trained_on(path)
    if folder is None:
        raise DataError("there is nothing to compare with", "give a folder of recordings with --references")
    template = str(recipe_of(path).get("data", {}).get("caption", "{trigger}"))
    playing = question.playing
    words = card.trigger, card.class_word
    recordings = read_recordings(folder, base, playing, template, words)
    uses = [use, *beside]
    recital, warnings = play_recital(base, uses, recordings, playing, Cache(studio_home() / "cache"), on_progress)
    figures = figures_of(recital, base)
    unheard = recordings if question.references else held_out_by(path, folder, base, words)
    if unheard:
        figures["held_out_loss_base"] = held_out_loss(base, unheard)
        with wearing(base, uses):
            figures["held_out_loss"] = held_out_loss(base, unheard)
    else:
        warnings.append("no held_out_loss: it was trained on all these recordings (--references, or data.validation)")
    if question.clap is not None:
        from studio.evaluate.clap import clap_figures

        figures |= clap_figures(question.clap, recital)
    told = {
        "base": base.identity().name,  # no folders of the user's
        "licence": base.licence,
        "medium": "audio",
        "protocol": "captions of the recordings",
        "seed": playing.seed,
        "num_inference_steps": playing.steps,
        "guidance_scale": playing.guidance,
        "sounds": len(recital.truth),
        "seconds": playing.seconds,
        "references": len(recordings),
    }
    return MusicAnswer(card_of(uses, path, base, told, figures, began), recital, warnings)


def held_out_by(path: Path, folder: Path, base: Any, words: tuple[str, str]) -> list[Recording]:
    """Pieces of the folder that an adapter was trained on which its run held out, if any."""
    data = Data.model_validate(recipe_of(path).get("data", {}))
    if not data.validation:
        return []
    pieces = scan_recordings(folder, data, {"trigger": words[0], "class": words[1]}).held_out
    rate = base.sample_rate_hz
    return [Recording(piece.caption, sound=Sound(piece.load(rate, 1), rate)) for piece in pieces]


@torch.no_grad()
def held_out_loss(base: Any, recordings: Sequence[Recording]) -> float:
    """Cross-entropy in nats per code, or the error of what a base that denoises predicts, under the true captions."""
    total = 0.0
    for start in range(0, len(recordings), LOSS_BATCH):
        part = recordings[start : start + LOSS_BATCH]
        shortest = min(r.sound.wave.shape[-1] for r in part)
        codes = base.encode_sounds(torch.stack([r.sound.wave[:, :shortest] for r in part]))
        condition = base.encode_prompts([r.caption for r in part])
        if hasattr(base, "objective"):
            total += float(_denoising_errors(base, codes, condition, start).sum())
        else:
            total += float(base.losses(codes, condition).sum())
    return total / len(recordings)


def _denoising_errors(base: Any, clean: torch.Tensor, condition: Any, start: int) -> torch.Tensor:
    """Mean squared error over noises and times that are the same for every adapter, (B,)."""
    errors = clean.new_zeros(len(clean))
    for draw in range(DRAWS):
        generators = [torch_generator("recital", start + i, draw) for i in range(len(clean))]
        times = torch.stack([base.objective.draw_time(g) for g in generators])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean)
        noisy, target = base.objective.noised(clean, noise, times), base.objective.target(clean, noise, times)
        predicted = base.predict(noisy, base.objective.network_time(times), condition).to(clean)
        errors += (predicted - target).square().flatten(1).mean(1)
    return errors / DRAWS


# -- what is heard ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listened:
    """What the measures make of one sound."""

    wave: NDArray[np.floating]
    rate_hz: int
    track: PitchTrack
    windows: NDArray[np.floating]
    envelope: NDArray[np.floating]

    @classmethod
    def to(cls, sound: Sound) -> Listened:
        wave, rate = sound.wave.mean(0).numpy(), sound.sample_rate_hz
        return cls(wave, rate, track_pitch(wave, rate), embed(wave, rate), onset_envelope(wave, rate))


def figures_of(recital: Recital, base: Any) -> dict[str, float]:
    """All figures, shares in [0, 1]; those that nothing can be said of are NaN."""
    truth = [Listened.to(r.sound) for r in recital.truth]
    judge = _judge(recital, base)
    figures: dict[str, float] = {}
    for suffix, played in (("", recital.worn), ("_base", recital.alone)):
        heard = [Listened.to(sound) for sound in played.asked]
        figures |= _with(suffix, _beside_truth(heard, truth) | _as_asked(heard, recital.truth, judge))
        figures[f"diversity{suffix}"] = spread_of([one.windows for one in heard])
        known = [Listened.to(sound) for sound in played.known]
        figures[f"known_in_scale{suffix}"] = _as_asked(known, recital.known, None)["in_scale"]
    floor = [Listened.to(r.sound) for r in recital.floor]
    figures |= _with("_references", _beside_truth(floor, truth))
    figures |= _with("_references", _as_asked(floor, recital.floor, judge))
    figures["diversity_references"] = spread_of([one.windows for one in floor])
    return figures


def _with(suffix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{name}{suffix}": value for name, value in figures.items()}


def _beside_truth(heard: Sequence[Listened], truth: Sequence[Listened]) -> dict[str, float]:
    return {
        "frechet": frechet_of([one.windows for one in heard], [one.windows for one in truth]),
        "ornament_distance": ornament_distance([one.track for one in heard], [one.track for one in truth]),
    }


def _as_asked(heard: Sequence[Listened], asked: Sequence[Asked], judge: TimbreJudge | None) -> dict[str, float]:
    """Means over the sounds of which it is known what they should be; a sound without pitch fails what is asked."""
    rows = [
        _mode_marks(one.track, what) | _time_marks(one, what) | _timbre_marks(one, what, judge)
        for one, what in zip(heard, asked, strict=True)
    ]
    return {name: _mean([row.get(name, float("nan")) for row in rows]) for name in MARKS}


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


def _mode_marks(track: PitchTrack, asked: Asked) -> dict[str, float]:
    """How a line does in its mode; where no tonic is told, each mode has the one under which it fits best."""
    mode = asked.mode
    if mode is None:
        return {}
    if not track.voiced.any():
        return {"in_scale": 0.0, "mode_right": 0.0}
    modes = MODES[mode.tradition]
    tonics = {
        name: asked.tonic_hz or likeliest_tonic(track, other.degrees, weights_of(other))
        for name, other in modes.items()
    }
    likelihoods = {name: mode_likelihood(track.cents(tonics[name]), other) for name, other in modes.items()}
    margin = likelihoods[mode.name] - max(value for name, value in likelihoods.items() if name != mode.name)
    tonic = tonics[mode.name]
    return {
        "in_scale": in_scale_share(track.cents(tonic), mode.degrees),
        "mode_likelihood": likelihoods[mode.name],
        "mode_margin": margin,
        "mode_right": float(margin > 0),
        "direction": direction_kept(notes_of(track, mode.degrees, tonic), mode),
    }


def _time_marks(heard: Listened, asked: Asked) -> dict[str, float]:
    """How onsets fall on the beats that a caption tells, on the strokes of a cycle, and in the tempo of a word."""
    row, fields, tempo = {}, asked.fields, estimate_tempo(heard.envelope)
    if beats := read_score(asked.caption).within(0.0, len(heard.wave) / heard.rate_hz).beats:
        row["beats_met"] = f_measure(onsets(heard.envelope), [seconds for seconds, _ in beats])
    if fields is None:
        return row
    if fields.tradition != "western" and fields.cycle and np.isfinite(tempo):
        cycle = CYCLES[fields.tradition][fields.cycle]
        strokes = [beat for beat, _ in cycle.strokes]
        row["rhythm"] = cycle_correlation(heard.envelope, strokes, cycle.beats, tempo)
    return row | {"tempo_right": float(tempo_fits(tempo, fields))}


def _timbre_marks(heard: Listened, asked: Asked, judge: TimbreJudge | None) -> dict[str, float]:
    if judge is None or asked.fields is None:
        return {}
    return {
        "instrument_right": float(judge.name(timbre_features(heard.wave, heard.rate_hz)) == asked.fields.instrument)
    }


def _judge(recital: Recital, base: Any) -> TimbreJudge | None:
    """A judge of the instruments that are asked for, fitted to lines of theirs; None where it is not told which."""
    from studio.evaluate.melody_card import fit_judge

    told = [r.fields for r in recital.truth if r.fields is not None]
    if not told:
        return None
    traditions = tuple(dict.fromkeys(fields.tradition for fields in told))
    return fit_judge(base, min(recital.truth[0].sound.seconds, 4.0), 72, traditions)[0]
