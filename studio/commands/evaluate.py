"""`studio evaluate`: the card of an adapter, or of several (seeds of one recipe) with mean and spread."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from studio.errors import RequestError
from studio.terminal import CountProgress, out, print_json, print_table, say


def evaluate(
    adapters: Annotated[list[str], typer.Argument(metavar="RUN|ADAPTER[:WEIGHT]...", help="One, or several seeds.")],
    beside: Annotated[
        list[str] | None, typer.Option(metavar="ADAPTER[:WEIGHT]", help="Worn at the same time. May be given again.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Pictures or sounds to compare with. Default: the training's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Default: the adapter's own base.")] = None,
    protocol: Annotated[str | None, typer.Option(help="What to draw: a name or a file. Default: what fits.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help="judge, palette, clip, dino. May be given again. Default: what fits.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model: adds CLIP-I and CLIP-T.")] = None,
    dino: Annotated[Path | None, typer.Option(help="Folder of a DINO or DINOv2 model: adds its similarity.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: 25, of music the base's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the base's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noises.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 8,
    sounds: Annotated[int, typer.Option(min=2, help="Music: how many sounds are played.")] = 12,
    seconds: Annotated[float, typer.Option(min=1, help="Music: how long they are.")] = 6.0,
    clap: Annotated[Path | None, typer.Option(help="Music: folder of a CLAP model: adds its figures.")] = None,
    out_path: Annotated[Path | None, typer.Option("--out", help="Folder of the card. Default: the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """How well it learned, what else it moved, what it cost. Example: studio evaluate my-cat --references photos/"""
    from studio.evaluate.card import Question, adapter_base, card_folder
    from studio.evaluate.card import evaluate as measure
    from studio.evaluate.card_page import write_card
    from studio.evaluate.exhibit import Drawing
    from studio.evaluate.music_card import MusicQuestion, evaluate_music
    from studio.evaluate.music_page import write_music_card
    from studio.evaluate.recital import Playing

    drawing = Drawing(steps or 25, guidance, seed, batch)
    how = (tuple(beside or ()), references, base, protocol, tuple(metrics or ()), clip, dino, drawing)
    questions = [Question(adapter, *how) for adapter in adapters]
    loaded = _base([adapter_base(question) for question in questions])
    asked: list[Any] = questions
    ask: Any = measure
    write: Any = write_card
    if loaded.medium == "audio":
        playing = Playing(sounds, min(seconds, loaded.longest_seconds), guidance, steps, seed)
        asked = [MusicQuestion(adapter, tuple(beside or ()), references, clap, playing) for adapter in adapters]
        ask, write = evaluate_music, write_music_card
    cards = []
    for question in asked:
        with CountProgress(f"measuring {question.adapter}", 1) as progress:
            answer = ask(question, loaded, progress.show_of)
        for warning in answer.warnings:
            say(f"warning: {warning}", style="yellow")
        name = Path(answer.card["adapter"]).stem
        folder = card_folder(question.adapter) if out_path is None else out_path / (name if len(adapters) > 1 else "")
        cards.append(answer.card | {"files": write(answer, folder)})
    if as_json:
        print_json(cards if len(cards) > 1 else cards[0])
    else:
        _show(cards)


def _base(names: list[str]) -> Any:
    import torch

    from studio.bases.registry import load_base

    if len(set(names)) > 1:
        raise RequestError("the adapters are of different bases", "evaluate them one by one, or name one with --base")
    return load_base(names[0]).to("cuda" if torch.cuda.is_available() else "cpu")


def _show(cards: list[dict[str, Any]]) -> None:
    from studio.evaluate.card_page import figure_rows

    if len(cards) == 1:
        print_table(["figure", "adapter", "base alone", "references"], figure_rows(cards[0]["figures"]))
        print_table(["training", ""], list(cards[0]["training"].items()))
    else:
        rows = []
        for key in dict.fromkeys(key for card in cards for key in card["figures"]):
            values = [card["figures"].get(key, float("nan")) for card in cards]  # not all can be said of every adapter
            there = [value for value in values if not math.isnan(value)]
            spread = f"{statistics.stdev(there):.3f}" if len(there) > 1 else ""
            rows.append((key, f"{statistics.mean(there):.3f}", spread, " ".join(f"{v:.3f}" for v in values)))
        print_table(["figure", "mean", "sd", "each"], rows)
    for card in cards:
        out.print(f"card: {card['files']['card.html']}", soft_wrap=True, markup=False)
