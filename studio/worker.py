"""A process that keeps a base loaded and makes what the base makes: one JSON request a line on stdin, answers a line
each on stdout.

Request: `{"id", "prompt", "negative", "base", "adapters": ["NAME:WEIGHT"], "steps", "guidance", "seed", "count",
"folder", "wait"}`, for pictures and clips `width` and `height`, for clips `frames`, `fps`, `loop` and `given` (files by
the frame's number), for sounds `seconds`; or `{"cancel": id}`. Instead of a `count`, `cells` may say for each work what
differs from the request: a grid over strengths, seeds, adapters. `regions` are `{"box", "adapter", "prompt"}` each.
Answers carry the id and one of: `note` (a sentence), `step` and `steps` of work `number`, `preview` (a file), `picture`
(a file, whatever its medium) with `seed` and of a sound pictures of it, `warning`, `error` with `hint`, `done`. A
training on the same machine is paused for each work, or waited for if `wait` is true.
The process ends when its stdin does.
"""

from __future__ import annotations

import functools
import itertools
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio import jobs
from studio.errors import StudioError, reason_of

PREVIEWS = 5  # intermediate pictures of each drawing
PITCHES = (400, 150)  # pixels of a histogram of pitch
LOOK_EVERY_SECONDS = 1.0


def cells_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What each picture is drawn from: the request, changed by its cell, or else counting the seed up."""
    common = {"adapters": [], "seed": 0, **request}
    changes = request.get("cells") or [{"seed": common["seed"] + i} for i in range(request.get("count", 1))]
    return [{**common, **change} for change in changes]


def _layout(regions: Any) -> Any:
    """The regions that are asked for, or None."""
    if not regions:
        return None
    from studio.generation import parse_use
    from studio.regions.layout import Layout, Region
    from studio.regions.masks import Box

    return Layout(
        tuple(Region(Box(*r["box"]), r["prompt"], parse_use(r["adapter"]) if r["adapter"] else None) for r in regions)
    )


def _worn(base: Any, layout: Any, uses: list[Any], request: dict[str, Any]) -> Any:
    from studio.generation import wearing
    from studio.regions.drawing import drawing

    size = request.get("width"), request.get("height")
    return drawing(base, layout, uses, size) if layout else wearing(base, uses)


def _given(files: dict[str, str], base: Any) -> dict[int, Any]:
    """Pictures of given frames by number. Raises RequestError for a base without clips."""
    from studio.generation import given_frames

    return given_frames([f"{index}={file}" for index, file in files.items()], base, None, None, False) if files else {}


def _drawn_sound(path: Path, base: Any, prompt: str) -> dict[str, Any]:
    """Waveform and spectrogram of a sound, and where its pitch lies in the mode that the prompt names."""
    if base.medium != "audio":
        return {}
    from studio import sound_pictures, waves
    from studio.data.melodies.fields import mode_in

    found = waves.draw(path)
    if mode := mode_in(prompt):
        wave, rate, _ = waves.read_wave(path)
        drawn = path.with_suffix(".pitch.webp")
        sound_pictures.pitch_histogram(wave, rate, mode, *PITCHES).save(drawn, "WEBP", quality=90)
        found["pitch"] = str(drawn)
    return found


class Cancelled(Exception):
    """The request was taken back, or whoever made it has gone."""


class Worker:
    """Draws request after request with the base of the last one, until `stdin` ends."""

    def __init__(self) -> None:
        self.requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.cancelled: set[str] = set()
        self.closed = threading.Event()
        self.base: Any = None
        self.base_asked = ""
        self.output = sys.stdout
        sys.stdout = sys.stderr  # what libraries print must not mix with the answers

    def read(self) -> None:
        for line in sys.stdin:
            try:
                request = json.loads(line)
            except ValueError:
                continue
            if "cancel" in request:
                self.cancelled.add(request["cancel"])
            else:
                self.requests.put(request)
        self.closed.set()
        self.requests.put(None)

    def run(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        while (request := self.requests.get()) is not None:
            try:
                self.draw(request)
                self.say(request, done=True)
            except Cancelled:
                self.say(request, done=True, cancelled=True)
            except StudioError as error:
                self.say(request, error=error.message, hint=error.hint)
            except (RuntimeError, ValueError, MemoryError) as error:
                text = reason_of(error)
                self.say(request, error=text, hint="try a smaller size, or fewer adapters")

    def say(self, request: dict[str, Any], **answer: Any) -> None:
        self.output.write(json.dumps({"id": request["id"], **answer}) + "\n")
        self.output.flush()

    # -- drawing -----------------------------------------------------------------------------------------------

    def draw(self, request: dict[str, Any]) -> None:
        """Raises StudioError for what cannot be drawn, Cancelled."""
        from studio.generation import parse_use, remarks_on

        cells = cells_of(request)
        parsed = functools.cache(parse_use)
        layout = _layout(request.get("regions") or ())
        worn = [cell["adapters"][0] for cell in cells if cell["adapters"]]
        firsts = [parsed(worn[0])] if worn else layout.uses if layout else []
        base = self._base(request, request.get("base") or (firsts[0].base if firsts else "sticker"))
        told: set[str] = set()
        number = 0
        for texts, alike in itertools.groupby(cells, lambda cell: cell["adapters"]):
            uses = [parsed(text) for text in texts]
            with _worn(base, layout, uses, request) as warnings:
                lacking = [] if "cells" in request else remarks_on(request["prompt"], uses, base)
                for warning in (*warnings, *lacking):
                    if warning not in told:
                        self.say(request, warning=warning)
                    told.add(warning)
                for cell in alike:
                    self._draw_one(request, cell, number, base, uses, layout.facts() if layout else {})
                    number += 1

    def _draw_one(
        self, request: dict[str, Any], cell: dict[str, Any], number: int, base: Any, uses: list[Any],
        also: dict[str, Any],
    ) -> None:  # fmt: skip
        from studio.base import Request
        from studio.generation import works_of

        order = Request(
            [cell["prompt"]],
            [cell["seed"]],
            cell.get("negative", ""),
            steps=cell.get("steps"),
            guidance=cell.get("guidance"),
            width=cell.get("width"),
            height=cell.get("height"),
            seconds=cell.get("seconds"),
            frames=cell.get("frames"),
            fps=cell.get("fps"),
            loop=bool(cell.get("loop")),
            given=_given(cell.get("given") or {}, base),
            on_step=self._reporter(request, number),
            on_preview=self._previewer(request, number) if base.medium == "image" else None,
            previews=PREVIEWS,
        )
        with self._turn(request):
            work = base.generate(order)[0]
        works = works_of(base)
        path = Path(request["folder"]) / f"{number:03d}{works.ending}"
        works.save(work, path, works.facts(order, 0, base, uses) | also)
        drawn = _drawn_sound(path, base, cell["prompt"])
        self.say(request, picture=str(path), number=number, seed=cell["seed"], **drawn)

    def _base(self, request: dict[str, Any], name: str) -> Any:
        from studio.bases.registry import load_base

        if self.base_asked != name:
            self.say(request, note=f"Loading the base '{Path(name).name}'.")
            self.base = None  # two at a time may not fit
            self.base, self.base_asked = load_base(name), name
        return self.base

    def _reporter(self, request: dict[str, Any], number: int) -> Any:
        def report(step: int, steps: int) -> None:
            if self.closed.is_set() or request["id"] in self.cancelled:
                raise Cancelled
            self.say(request, step=step, steps=steps, number=number)

        return report

    def _previewer(self, request: dict[str, Any], number: int) -> Any:
        def preview(picture: Any) -> None:
            path = Path(request["folder"]) / ".preview.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, "WEBP", quality=80)
            self.say(request, preview=str(path), number=number)

        return preview

    @contextmanager
    def _turn(self, request: dict[str, Any]) -> Iterator[None]:
        """Inside, the machine is this drawing's own, as far as jobs go."""
        if request.get("wait"):
            self._wait(request)
        with jobs.paused() as held:
            if held:
                self.say(request, note=f"The training '{held[0]}' pauses while this picture is drawn.")
            yield

    def _wait(self, request: dict[str, Any]) -> None:
        told = False
        while any(job.phase == "started" and jobs.is_alive(job.process) for job in jobs.jobs()):
            if self.closed.is_set() or request["id"] in self.cancelled:
                raise Cancelled
            if not told:
                self.say(request, note="Waiting until the training is over.")
                told = True
            time.sleep(LOOK_EVERY_SECONDS)


if __name__ == "__main__":
    Worker().run()
