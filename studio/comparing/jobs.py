"""What a study amounts to: jobs, each with the commands that do it and one result file.

A job's fingerprint covers all that its figures depend on: the resolved preset, the lesson's pictures, how it is
measured, the base. A result with another fingerprint, or a torn one, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.adapter import load_adapter
from studio.bases.registry import load_base
from studio.comparing.lessons import Lesson, fingerprint, make_lesson
from studio.comparing.study import Cell, Merges, Study, Sums, Way
from studio.comparing.together import ALONE, Concept
from studio.comparing.together import Order as Together
from studio.errors import AdapterError, PresetError, RequestError
from studio.evaluate.training_cost import training_cost
from studio.files import slugify, write_atomically
from studio.preset import Preset
from studio.run import Run
from studio.training import Order, resolve

STUDIO = (sys.executable, "-m", "studio")


@dataclass
class Job:
    """One result. `commands` are run one after the other; the last one writes `card`, the job's figures."""

    name: str
    kind: str  # training, taught, sum, concepts, pairs, described or zeroed
    facts: dict[str, Any]
    fingerprint: str
    folder: Path
    needs: tuple[str, ...] = ()  # names of jobs that come first
    order: dict[str, Any] = field(default_factory=dict)  # what `commands` is made from

    @property
    def result_path(self) -> Path:
        return self.folder / "results" / f"{self.name}.json"

    @property
    def card_path(self) -> Path:
        return self.folder / "cards" / self.name / "card.json"

    @property
    def log_path(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / f"{self.name}-{self.fingerprint[:8]}"

    def result(self) -> dict[str, Any] | None:
        """The stored result, if it is whole and of this very job."""
        try:
            stored = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(stored, dict) and stored.get("fingerprint") == self.fingerprint
        return stored if whole and isinstance(stored.get("card"), dict) else None

    def store(self, seconds: float) -> dict[str, Any]:
        """Writes the result from the card. Raises RequestError if the commands left none."""
        card = self._card()
        card.pop("files", None)
        result = {
            "job": self.name,
            "kind": self.kind,
            **self.facts,
            "fingerprint": self.fingerprint,
            "seconds": round(seconds, 1),
            "card": card,
        }
        write_atomically(self.result_path, json.dumps(result, indent=1) + "\n")
        return result

    def _card(self) -> dict[str, Any]:
        """What the commands left; of an adapter that is only taught, what that cost."""
        try:
            if self.kind == "taught":
                path = Run(self.run_folder).adapter_path
                return {"training": training_cost(load_adapter(path), path)}
            return json.loads(self.card_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, AdapterError):
            raise RequestError(f"the job '{self.name}' left no card", f"see '{self.log_path}'") from None

    def commands(self) -> list[list[str]]:
        """What is still to be done: a training that was interrupted goes on from its checkpoint."""
        if self.kind == "taught":
            return self._training()
        if self.kind in ("concepts", "pairs"):
            order_file = self.folder / "orders" / f"{self.name}.json"
            write_atomically(order_file, self.order["together"].model_dump_json(indent=1))
            module = [sys.executable, "-m", "studio.comparing.together", self.kind, str(order_file)]
            return [[*module, "--out", str(self.card_path)]]
        lesson: Any = self.order.get("lesson")
        how = self.order["how"]
        if self.kind in ("zeroed", "described"):
            module = [sys.executable, "-m", "studio.comparing.bare_base", self.kind, "--base", self.order["base"]]
            if self.kind == "described":
                module += ["--word", lesson.known_as, "--references", str(lesson.references)]
                module += ["--protocol", lesson.protocol]
            else:
                module += ["--share", str(self.order["share"]), "--glyphs", str(self.order["glyphs"])]
            return [[*module, *how, "--out", str(self.card_path)]]
        evaluated = [*STUDIO, "evaluate", self.order["adapter"], "--references", str(lesson.references)]
        evaluated += [*how, "--out", str(self.card_path.parent), "--json", *self.order["more"]]
        for other in self.order.get("beside", ()):
            evaluated += ["--beside", other]
        return [*self._training(), evaluated] if self.kind == "training" else [evaluated]

    def _training(self) -> list[list[str]]:
        run = Run(self.run_folder)
        if run.adapter_path.exists() and _finished(run):
            return []
        if run.checkpoint_folders():
            return [[*STUDIO, "train", "--resume", "--run", str(run.folder)]]
        shutil.rmtree(run.folder, ignore_errors=True)  # interrupted before its first checkpoint
        preset_file = self.folder / "presets" / f"{self.name}.yaml"
        write_atomically(preset_file, self.order["preset"].to_yaml())
        train = [*STUDIO, "train", "--preset", str(preset_file), "--run", str(run.folder), "--name", self.name]
        return [train]


def _finished(run: Run) -> bool:
    return any(event["kind"] == "finished" for event in run.events())


# -- from a study to jobs ------------------------------------------------------------------------------------------


def make_jobs(study: Study, folder: Path) -> list[Job]:
    """All jobs of a study below `folder`, trainings first. Raises PresetError for a cell that cannot be."""
    preset, _ = resolve(Order(study.preset, settings=flat(study.settings)))
    lessons = {name: make_lesson(study, name, folder / "lessons") for name in study.lessons}
    prints = {name: fingerprint(lesson) for name, lesson in lessons.items()}
    maker = _Maker(study, folder, preset.base, lessons, prints)
    jobs = [
        *maker.trainings(),
        *maker.sums(),
        *maker.merges(),
        *maker.described(),
        *maker.zeroed(),
    ]
    return list({job.name: job for job in jobs}.values())


@dataclass
class _Maker:
    study: Study
    folder: Path
    base: str
    lessons: dict[str, Lesson]
    prints: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)

    def _values_of(self, base: str) -> str:
        """A digest of a base's weights."""
        if base not in self.values:
            identity = load_base(base).identity()
            self.values[base] = _digest(identity.architecture, identity.values)
        return self.values[base]

    def trainings(self) -> Iterator[Job]:
        """Seeds outermost, so that a study that is cut short has all cells."""
        wanted = [*self.study.seeds, *(seed for cell in self.study.cells for seed in cell.seeds)]
        for seed in dict.fromkeys(wanted):
            for name in self.study.lessons:
                for cell in self.study.cells:
                    if seed in (cell.seeds or self.study.seeds) and name in self.study.taught_to(cell):
                        yield self.training(cell, self.lessons[name], seed)

    def training(self, cell: Cell, lesson: Lesson, seed: int) -> Job:
        preset = cell_preset(self.study, cell, lesson, seed)
        shown = preset.model_dump(mode="json")
        shown["data"]["path"] = None  # the pictures count, not where they lie
        facts = {"cell": cell.name, "lesson": lesson.name, "lesson_kind": lesson.kind, "seed": seed}
        facts["base"] = Path(preset.base).name
        order: dict[str, Any] = {"preset": preset, "lesson": lesson, **self._measured(lesson)}
        name = f"{slugify(cell.name)}--{slugify(lesson.name)}--{seed}"
        mark = _digest(shown, self.prints[lesson.name], self._how(), self._values_of(preset.base))
        job = Job(name, "training", facts, mark, self.folder, order=order)
        order["adapter"] = str(job.run_folder)
        return job

    def _how(self) -> dict[str, Any]:
        return self.study.evaluation.model_dump(mode="json")

    def _measured(self, lesson: Lesson) -> dict[str, Any]:
        evaluation = self.study.evaluation
        more: list[str] = []
        if protocol := evaluation.protocol or lesson.protocol:
            more += ["--protocol", protocol]
        for metric in evaluation.metrics:
            more += ["--metrics", metric]
        for option, folder in (("--clip", evaluation.clip), ("--dino", evaluation.dino)):
            more += [option, str(Path(folder).expanduser().resolve())] if folder else []
        if lesson.name in self.study.tunes:
            how = ["--sounds", str(evaluation.sounds), "--seconds", f"{evaluation.seconds:g}"]
            more = ["--clap", str(Path(evaluation.clap).expanduser().resolve())] if evaluation.clap else []
        else:
            how = self._drawn()
        return {"how": how, "more": more}

    def _drawn(self) -> list[str]:
        return ["--steps", str(self.study.evaluation.steps), "--batch", str(self.study.evaluation.batch)]

    def sums(self) -> Iterator[Job]:
        for group in self.study.sums:
            for cell in (cell for cell in self.study.cells if cell.name in group.cells):
                for seed in group.seeds:
                    yield from self._sums_of(group, cell, seed)

    def _sums_of(self, group: Sums, cell: Cell, seed: int) -> Iterator[Job]:
        singles = [self.training(cell, self.lessons[name], seed) for name in group.lessons[: max(group.sizes)]]
        yield from singles
        for size in group.sizes:
            for weight in group.weights:
                for i in range(min(group.measured, size)):
                    yield self._sum(cell, singles[:size], i, weight, seed)

    def _sum(self, cell: Cell, singles: list[Job], measured: int, weight: float, seed: int) -> Job:
        own, others = singles[measured], [job for i, job in enumerate(singles) if i != measured]
        lesson: Lesson = own.order["lesson"]
        facts = {"cell": cell.name, "lesson": lesson.name, "lesson_kind": lesson.kind, "seed": seed}
        facts |= {"concepts": len(singles), "weight": weight}
        order = {"lesson": lesson, "adapter": f"{own.run_folder}:{weight:g}", **self._measured(lesson)}
        order["beside"] = [f"{job.run_folder}:{weight:g}" for job in others]
        name = f"sum{len(singles)}-{weight:g}--{own.name}".replace(".", "_")
        parts = [job.fingerprint for job in (own, *others)]
        needs = tuple(job.name for job in singles)
        return Job(name, "sum", facts, _digest(parts, weight), self.folder, needs, order)

    def merges(self) -> Iterator[Job]:
        """Seeds outermost; of each, the concepts that are only taught for this, then what is made of them."""
        for group in self.study.merges:
            for seed in group.seeds:
                for cell in (cell for cell in self.study.cells if cell.name in group.cells):
                    yield from self._merges_of(group, cell, seed)

    def _merges_of(self, group: Merges, cell: Cell, seed: int) -> Iterator[Job]:
        singles = [self._taught(cell, self.lessons[name], seed) for name in group.lessons[: max(group.sizes)]]
        yield from singles
        alone, ways = (Way(strategy=ALONE),), group.ways
        yield self._together(group, cell, seed, singles, "concepts", alone)
        for size in group.sizes:
            yield self._together(group, cell, seed, singles[:size], "concepts", ways)
        if group.pairs:
            yield self._together(group, cell, seed, singles[: 2 * group.pairs], "pairs", ways)

    def _taught(self, cell: Cell, lesson: Lesson, seed: int) -> Job:
        job = self.training(cell, lesson, seed)
        if lesson.name not in self.study.taught_to(cell):
            job.kind = "taught"
        return job

    def _together(
        self, group: Merges, cell: Cell, seed: int, singles: list[Job], kind: str, ways: tuple[Way, ...]
    ) -> Job:
        evaluation = self.study.evaluation
        lessons: list[Lesson] = [job.order["lesson"] for job in singles]
        concepts = [
            Concept(
                name=a.name,
                adapter=str(Run(job.run_folder).adapter_path),
                trigger=a.trigger,
                references=str(a.references),
                known_as=a.known_as,
            )
            for a, job in zip(lessons, singles)
        ]
        order = Together(
            base=singles[0].order["preset"].base,
            concepts=concepts,
            ways=list(ways),
            protocol=evaluation.protocol or "sticker-subject",
            pictures=group.pictures,
            scenes=group.scenes,
            pairs=group.pairs if kind == "pairs" else 0,
            steps=evaluation.steps,
            batch=evaluation.batch,
        )
        told = order.model_dump(mode="json", exclude={"concepts"})  # where files lie is no matter
        known = [lesson.known_as for lesson in lessons] if kind == "pairs" else []
        mark = _digest(kind, told, [job.fingerprint for job in singles], *known)
        alone = [way.strategy for way in ways] == [ALONE]
        name = f"{'alone' if alone else kind}{'' if alone else len(singles)}--{slugify(cell.name)}--{seed}"
        facts = {"cell": cell.name, "seed": seed, "concepts": 1 if alone else len(singles)}
        needs = tuple(job.name for job in singles)
        return Job(name, kind, facts, mark, self.folder, needs, {"together": order})

    def described(self) -> Iterator[Job]:
        taught = {name for cell in self.study.cells for name in self.study.taught_to(cell)}
        for lesson in self.lessons.values():
            if lesson.known_as and lesson.name in taught:
                facts = {"cell": "described", "lesson": lesson.name, "lesson_kind": lesson.kind}
                told = (self.prints[lesson.name], lesson.known_as, self._how(), self._values_of(self.base))
                mark = _digest("described", *told)
                order = {"base": self.base, "lesson": lesson, **self._measured(lesson)}
                yield Job(f"described--{slugify(lesson.name)}", "described", facts, mark, self.folder, order=order)

    def zeroed(self) -> Iterator[Job]:
        pruning = self.study.pruning
        for share in (0.0, *pruning.shares) if pruning else ():
            assert pruning is not None
            mark = _digest("zeroed", share, pruning.glyphs, self._how(), self._values_of(self.base))
            order = {"base": self.base, "share": share, "glyphs": pruning.glyphs, "how": self._drawn()}
            name = f"zeroed--{share:g}".replace(".", "_")
            yield Job(name, "zeroed", {"share": share}, mark, self.folder, order=order)


def cell_preset(study: Study, cell: Cell, lesson: Lesson, seed: int) -> Preset:
    """What a cell trains on a lesson. Raises PresetError that names the cell."""
    method = _placed(cell.method, lesson.index)
    if not isinstance(method, dict) or "kind" not in method:
        raise PresetError(f"the cell '{cell.name}' names no method", "add a 'kind' to its method")
    data = {"data.path": str(lesson.pictures), "data.trigger": lesson.trigger, "data.caption": lesson.caption}
    data["data.class_word"] = lesson.class_word
    own = {f"method.{key}": value for key, value in method.items() if key != "kind"}
    silent = {"sample_every": 0, "validate_every": 0, "export": []}
    changes = {**silent, **study.settings, **data, **own, **_placed(cell.settings, lesson.index)}
    try:
        order = Order(cell.preset or study.preset, method=str(method["kind"]), settings=flat(changes), seed=seed)
        return resolve(order)[0]
    except PresetError as error:
        raise PresetError(f"the cell '{cell.name}': {error.message}", error.hint) from None


def flat(settings: dict[str, Any], parent: str = "") -> tuple[str, ...]:
    """Nested fields as `a.b=value` lines, as `--set` takes them. A dict under `method` is a value."""
    lines: list[str] = []
    for key, value in settings.items():
        name = f"{parent}{key}"
        if isinstance(value, dict) and not name.startswith("method."):
            lines += flat(value, f"{name}.")
        else:
            lines.append(f"{name}={json.dumps(value)}")
    return tuple(lines)


def _placed(value: Any, index: int) -> Any:
    """With '{index}' and '{number}' replaced by the lesson's place."""
    if isinstance(value, dict):
        return {key: _placed(part, index) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(part, index) for part in value]
    return {"{index}": index, "{number}": index + 1}.get(value, value) if isinstance(value, str) else value


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
