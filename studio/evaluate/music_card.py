"""The card of an adapter of music: how well it learned, what else it moved, what it cost.

Figures bear the suffixes of all cards: with the adapter, `_base` without it, `_references` of true sounds against true
ones. Modes are measured where the recordings say what they are, as those of the melody world do.
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
from studio.data.melodies.composing import tonic_of
from studio.data.melodies.cycles import CYCLES
from studio.data.melodies.fields import Fields
from studio.data.melodies.modes import MODES, mode_of
from studio.data.sounds import Sound
from studio.errors import DataError
from studio.evaluate.beats import cycle_correlation, estimate_tempo, onset_envelope
from studio.evaluate.card import card_of, recipe_of, trained_on
from studio.evaluate.frechet import embed, frechet_of, spread_of
from studio.evaluate.lines import direction_kept, mode_likelihoods, notes_of, ornament_distance
from studio.evaluate.melody_card import tempo_fits
from studio.evaluate.pitch import PitchTrack, track_pitch
from studio.evaluate.recital import Playing, Progress, Recital, Recording, play_recital, read_recordings
from studio.evaluate.scales import in_scale_share
from studio.evaluate.timbre import TimbreJudge, timbre_features
from studio.generation import parse_use, wearing
from studio.keyed import torch_generator
from studio.library import find
from studio.paths import studio_home

DRAWS = 8  # noises per recording, for bases that denoise
LOSS_BATCH = 4


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
    recordings = read_recordings(folder, base, playing, template, (card.trigger, card.class_word))
    uses = [use, *beside]
    recital, warnings = play_recital(base, uses, recordings, playing, Cache(studio_home() / "cache"), on_progress)
    figures = figures_of(recital, base)
    figures["held_out_loss_base"] = held_out_loss(base, recordings)
    with wearing(base, uses):
        figures["held_out_loss"] = held_out_loss(base, recordings)
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
    fields = [r.fields for r in recital.truth]
    judge = _judge(recital, base)
    figures: dict[str, float] = {}
    for suffix, played in (("", recital.worn), ("_base", recital.alone)):
        heard = [Listened.to(sound) for sound in played.asked]
        figures |= _with(suffix, _beside_truth(heard, truth) | _in_mode(heard, fields, judge))
        figures[f"diversity{suffix}"] = spread_of([one.windows for one in heard])
        known = [Listened.to(sound) for sound in played.known]
        figures[f"known_in_scale{suffix}"] = _in_mode(known, recital.known, None)["in_scale"]
    floor = [Listened.to(r.sound) for r in recital.floor]
    figures |= _with("_references", _beside_truth(floor, truth))
    figures |= _with("_references", _in_mode(floor, [r.fields for r in recital.floor], judge))
    figures["diversity_references"] = spread_of([one.windows for one in floor])
    return figures


def _with(suffix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{name}{suffix}": value for name, value in figures.items()}


def _beside_truth(heard: Sequence[Listened], truth: Sequence[Listened]) -> dict[str, float]:
    return {
        "frechet": frechet_of([one.windows for one in heard], [one.windows for one in truth]),
        "ornament_distance": ornament_distance([one.track for one in heard], [one.track for one in truth]),
    }


def _in_mode(heard: Sequence[Listened], fields: Sequence[Fields | None], judge: TimbreJudge | None) -> dict[str, float]:
    """Means over the sounds of which it is known what they should be; a sound without pitch fails what is asked."""
    rows = [_marks(one, told, judge) for one, told in zip(heard, fields, strict=True) if told is not None]
    names = (
        "in_scale",
        "mode_likelihood",
        "mode_margin",
        "mode_right",
        "direction",
        "rhythm",
        "tempo_right",
        "instrument_right",
    )
    return {name: _mean([row.get(name, float("nan")) for row in rows]) for name in names}


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


def _marks(heard: Listened, fields: Fields, judge: TimbreJudge | None) -> dict[str, float]:
    modes = {name: mode_of(fields.tradition, name) for name in MODES[fields.tradition]}
    mode, tonic = modes[fields.mode], tonic_of(fields)
    tempo = estimate_tempo(heard.envelope)
    row = {"tempo_right": float(tempo_fits(tempo, fields))}
    if judge is not None:
        row["instrument_right"] = float(judge.name(timbre_features(heard.wave, heard.rate_hz)) == fields.instrument)
    if fields.tradition != "western" and fields.cycle and np.isfinite(tempo):
        cycle = CYCLES[fields.tradition][fields.cycle]
        strokes = [beat for beat, _ in cycle.strokes]
        row["rhythm"] = cycle_correlation(heard.envelope, strokes, cycle.beats, tempo)
    if not heard.track.voiced.any():
        return row | {"in_scale": 0.0, "mode_right": 0.0}
    cents = heard.track.cents(tonic)
    likelihoods = mode_likelihoods(cents, modes)
    margin = likelihoods[mode.name] - max(value for name, value in likelihoods.items() if name != mode.name)
    return row | {
        "in_scale": in_scale_share(cents, mode.degrees),
        "mode_likelihood": likelihoods[mode.name],
        "mode_margin": margin,
        "mode_right": float(margin > 0),
        "direction": direction_kept(notes_of(heard.track, mode.degrees, tonic), mode),
    }


def _judge(recital: Recital, base: Any) -> TimbreJudge | None:
    """A judge of the instruments that are asked for, fitted to lines of theirs; None where it is not told which."""
    from studio.evaluate.melody_card import fit_judge

    told = [r.fields for r in recital.truth if r.fields is not None]
    if not told:
        return None
    traditions = tuple(dict.fromkeys(fields.tradition for fields in told))
    return fit_judge(base, min(recital.truth[0].sound.seconds, 4.0), 72, traditions)[0]
