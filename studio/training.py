"""From a request to a running training: everything is checked before anything is written.

`plan` resolves preset, base, data, names and folders and raises RequestError for whatever is wrong; the Training it
returns is an iterator of events that writes the run folder, the adapter, the library entry, exports and the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import studio
from studio import library
from studio.adapter import Card
from studio.adapting import AdapterTraining
from studio.base import Base
from studio.bases.registry import load_base
from studio.bases.sticker_video.family import StickerVideo
from studio.customize import AdapterTask
from studio.customize_clips import ClipLesson, refuse_still_settings
from studio.data.animations import AnimationSet, scan_animations
from studio.data.cache import Cache
from studio.data.pictures import PictureSet, scan
from studio.data.recordings import SoundSet, scan_recordings
from studio.errors import PresetError, RequestError
from studio.files import slug, slugify
from studio.fit import Task, fit
from studio.keyed import key_of
from studio.method import Method, Origin, PatchMethod, methods
from studio.music.denoising import DenoisingTask, scores_of
from studio.music.task import SoundTask, refuse_picture_settings, refuse_token_settings
from studio.paths import assets_dir, studio_home
from studio.preset import Preset, apply_settings, make_preset, parse_setting, read_preset
from studio.report import write_report
from studio.run import Event, Run
from studio.samples import before_after

Looking = Callable[[int, int], None]
Lessons = PictureSet | AnimationSet | SoundSet


@dataclass(frozen=True)
class Order:
    """What the user asks for. Fields left None come from the preset."""

    preset: str
    data: str | None = None
    base: str | None = None
    method: str | None = None
    name: str | None = None
    run: Path | None = None
    settings: Sequence[str] = ()
    steps: int | None = None
    seed: int | None = None


def resolve(order: Order) -> tuple[Preset, list[str]]:
    """The preset with the request's changes applied, and what was changed, as lines `key: old -> new`."""
    content = read_preset(order.preset)
    original = start = make_preset(content)
    shortcuts = {"data.path": order.data, "base": order.base, "steps": order.steps, "seed": order.seed}
    asked = [(key, value) for key, value in shortcuts.items() if value is not None]
    asked += [parse_setting(setting) for setting in order.settings]
    if dict(asked).get("base", original.base) != original.base:
        content = apply_settings(content, original.other_bases.items()) | {"learning_rates": {}}
        start = make_preset(content)
    if order.method is not None:
        content = _with_method(content, start, order.method)
    preset = make_preset(apply_settings(content, asked) | FOR_REQUESTS)
    old, new = (one.model_dump(mode="json", exclude=set(FOR_REQUESTS)) for one in (original, preset))
    return preset, _differences(old, new)


FOR_REQUESTS: dict[str, Any] = {"learning_rates": {}, "other_bases": {}}  # nothing of it is left in a training's preset


def _with_method(content: dict[str, Any], original: Preset, kind: str) -> dict[str, Any]:
    """The preset's method replaced by `kind` at the same layers, with the settings and rate that suit it."""
    replaced: dict[str, Any] = {"kind": kind}
    if _names_layers(type(original.method)) and _names_layers(methods().get(kind)):
        assert isinstance(original.method, PatchMethod)
        replaced["target_modules"] = list(original.method.target_modules)
    changed = {**content, "method": replaced}
    if kind != original.method.kind:
        changed["learning_rate"] = original.learning_rates.get(kind)  # None: the method's own
    return changed


def _names_layers(method: type[Method] | None) -> bool:
    return method is None or "target_modules" in method.model_fields


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("kind") != new.get("kind"):  # another method: its settings have nothing to be compared with
            return [f"{key}: {old['kind']} -> {new['kind']}"]
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == new else [f"{key}: {old} -> {new}"]


# -- names -----------------------------------------------------------------------------------------------------

ONSETS, VOWELS = "b d f g k l m n p r s t v z".split(), "aeiou"


def fresh_trigger(fingerprint: str) -> str:
    """A pronounceable word that no vocabulary has, the same for the same data: "zovuki"."""
    number = key_of("trigger", fingerprint)
    word = ""
    for _ in range(3):
        number, onset = divmod(number, len(ONSETS))
        number, vowel = divmod(number, len(VOWELS))
        word += ONSETS[onset] + VOWELS[vowel]
    return word


# -- the plan --------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A training that is ready to start. Nothing has been written yet."""

    preset: Preset
    changes: list[str]
    base: Any
    run: Run
    name: str
    accelerator: Accelerator
    card: Card | None = None
    pictures: Lessons | None = None
    resume: bool = False

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Trains; every event is stored in the run folder before it is yielded."""
        cache = Cache(studio_home() / "cache")
        task = self._task(cache)
        main = self.accelerator.is_main_process
        if main:
            self._begin()
        for event in self._train(task, cache, should_stop):
            if event.kind == "started":
                event = Event("started", event.step, {**event.data, "name": self.name})
            if main and event.kind != "progress":
                self.run.append(event)
            yield event

    def _task(self, cache: Cache) -> Task:
        """What is trained. Raises PresetError for what shows only as it is set up, before anything is written."""
        if not isinstance(self.preset.method, PatchMethod):
            return self.preset.method.task(self.base, self.preset, self.run)
        assert self.pictures is not None
        assert self.card is not None
        return adapter_training(self.preset.method, self.base, self.preset, self.run, self.pictures, self.card, cache)

    def _begin(self) -> None:
        self.run.prepare()
        self.run.save_preset(self.preset.to_yaml())
        library.register_run(self.run.folder)
        if self.card is not None and not self.resume and isinstance(self.preset.method, PatchMethod):
            self.preset.method.begin(self.card)

    def _train(self, task: Task, cache: Cache, should_stop: Callable[[], bool]) -> Iterator[Event]:
        yield from self._warnings()
        yield from task.prepare()
        for text in cache.warnings:
            yield Event("warning", 0, {"text": text})
        if self.preset.gradient_checkpointing:
            self.base.enable_gradient_checkpointing()
        try:
            for event in fit(task, self.preset, self.run, self.accelerator, self.resume, should_stop):
                if event.kind == "finished":
                    if isinstance(task, AdapterTraining) and self.accelerator.is_main_process:
                        yield from task.sketch_inputs()
                    event = Event("finished", event.step, {**self._finish(task), **event.data})
                yield event
        finally:
            if isinstance(task, AdapterTraining):
                task.close()
            if self.accelerator.is_main_process:
                write_report(self.run)

    def _warnings(self) -> Iterator[Event]:
        if self.pictures is None:
            return
        for name, reason in self.pictures.report.dropped:
            yield Event("warning", 0, {"text": f"left out: '{name}' {reason}"})
        for text in self.pictures.report.warnings:
            yield Event("warning", 0, {"text": text})

    def _finish(self, task: Task) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            return {}
        saved = task.save(self.run.folder, self.preset.steps)
        if not isinstance(task, AdapterTraining):
            return {"base": str(saved)}
        if self.base.medium == "image":
            before_after(self.run)
        preview = next(iter(sorted(self.run.samples.glob(f"{self.preset.steps:06d}-*.png"))), None)
        facts = {"run": str(self.run.folder.resolve()), "base": self.preset.base}
        stored = library.add(self.name, self.run.adapter_path, facts, preview)
        return {"adapter": str(self.run.adapter_path), "library": str(stored), "exports": self._export(task)}

    def _export(self, task: AdapterTraining) -> dict[str, str]:
        from studio.exporting import export_adapter

        task.close()
        exports: dict[str, str] = {}
        for target in self.preset.export:
            out = self.run.folder / "exports" / target
            export_adapter(task.adapter, self.base, target, out, force=True)
            exports[target] = str(out)
        return exports


def adapter_training(
    method: PatchMethod,
    base: Any,
    preset: Preset,
    run: Run,
    examples: Lessons,
    card: Card,
    cache: Cache,
) -> AdapterTraining:
    """The task for a base of this medium. Raises PresetError for settings that do not fit it."""
    if isinstance(examples, SoundSet):
        sound_task = DenoisingTask if hasattr(base, "objective") else SoundTask
        return sound_task(method, base, preset, run, examples, card, cache)
    if isinstance(examples, AnimationSet):
        return ClipLesson(method, base, preset, run, examples, card, cache)
    return AdapterTask(method, base, preset, run, examples, card, cache)


def plan(order: Order, looking: Looking = lambda done, total: None) -> Training:
    """Checks a request and makes it ready to run. Raises RequestError; writes nothing.

    `looking` is told (done, total) while the pictures are looked through.
    """
    preset, changes = resolve(order)
    accelerator = _accelerator(preset)
    if order.name is not None:
        slug(order.name)
    run_folder = order.run
    if run_folder is not None and accelerator.is_main_process and (run_folder / "events.jsonl").exists():
        raise RequestError(
            f"'{run_folder}' already holds a run",
            f"resume it with --resume --run {run_folder}, or choose another folder",
        )
    if not isinstance(preset.method, PatchMethod):
        base = preset.method.base(preset)
        name = order.name or slugify(Path(order.preset).stem)
        preset = _with_rate(preset, changes)
        return Training(preset, changes, base.to(accelerator.device), _run(run_folder, name), name, accelerator)
    base = load_base(preset.base).to(accelerator.device)
    base.notes.append(base.choose_attention())
    preset = _exportable(preset, order.method is not None, changes)
    if base.medium == "audio":
        assert isinstance(preset.method, PatchMethod)
        refuse_picture_settings(preset.method, preset, base)
    if base.medium != "audio" or hasattr(base, "objective"):
        refuse_token_settings(preset)
    if isinstance(base, StickerVideo):
        assert isinstance(preset.method, PatchMethod)
        refuse_still_settings(preset.method, preset, base)
    preset = _with_possible_prior(preset, base, changes)
    pictures, trigger = _scan(preset, base, order.name, looking)
    if isinstance(pictures, SoundSet) and hasattr(base, "objective"):
        scores_of(base, preset, pictures)  # raises for beats and chords that make no sense
    preset = preset.model_copy(update={"data": preset.data.model_copy(update={"trigger": trigger})})
    name = order.name or library.free_name(slugify(Path(preset.data.path or "concept").resolve().name))
    preset = _with_rate(_settled(preset, base, pictures, trigger), changes)
    card = _card(preset, base, pictures, trigger)
    return Training(preset, changes, base, _run(run_folder, name), name, accelerator, card, pictures)


LORA_FORMATS = ("diffusers", "kohya", "peft")


def _exportable(preset: Preset, chosen: bool, changes: list[str]) -> Preset:
    """The preset without the exports that its method has no form for, if the user chose another method for it.

    Raises PresetError where the preset itself asks for what cannot be.
    """
    assert isinstance(preset.method, PatchMethod)
    lost = [to for to in preset.export if to in LORA_FORMATS]
    if preset.method.has_low_rank_form or not lost:
        return preset
    if not chosen:
        raise PresetError(
            f"export: '{preset.method.kind}' is no LoRA exactly, so it cannot be exported to '{lost[0]}'",
            "set export=[checkpoint] or export=[diff]; 'studio export --allow-approximate' writes the nearest LoRA",
        )
    changes.append(f"export: without {', '.join(lost)}: '{preset.method.kind}' is no LoRA exactly")
    return preset.model_copy(update={"export": tuple(to for to in preset.export if to not in lost)})


def _with_possible_prior(preset: Preset, base: Base, changes: list[str]) -> Preset:
    """The preset without its class pictures where nothing says what they should show."""
    data = preset.data
    if not data.prior.pictures or data.prior.prompts or base.prompts or data.class_word:
        return preset
    changes.append("data.prior: no class pictures, for nothing says of what; with data.class_word=dog there are")
    without = data.prior.model_copy(update={"pictures": 0})
    return preset.model_copy(update={"data": data.model_copy(update={"prior": without})})


def _settled(preset: Preset, base: Base, pictures: Lessons, trigger: str) -> Preset:
    """The preset with its method resolved on the base. Raises PresetError."""
    assert isinstance(preset.method, PatchMethod)
    sites = preset.method.sites(base)
    origin = Origin(_concept(pictures, trigger), preset.seed)
    return preset.model_copy(update={"method": preset.method.resolved(sites, base.identity(), origin)})


def _with_rate(preset: Preset, changes: list[str]) -> Preset:
    """The preset with the method's learning rate where it has none of its own."""
    if preset.learning_rate is not None:
        return preset
    rate = preset.method.peak_learning_rate()
    changes[:] = [line for line in changes if not line.startswith("learning_rate: ")]
    changes.append(f"learning_rate: {rate:.3g}, as '{preset.method.kind}' has it")
    return preset.model_copy(update={"learning_rate": rate})


def _concept(pictures: Lessons, trigger: str) -> str:
    return f"{pictures.fingerprint}:{trigger}"


def plan_resume(folder: Path, looking: Looking = lambda done, total: None) -> Training:
    """The plan of a run that was stopped or killed, from its own preset."""
    run = Run(folder)
    if not run.preset_path.exists():
        raise RequestError(f"'{folder}' is not the folder of a run", "give --run the folder that holds preset.yaml")
    run.newest_checkpoint()
    content = read_preset(str(run.preset_path))
    preset = make_preset(content)
    accelerator = _accelerator(preset)
    began = next((event for event in run.history() if event["kind"] == "started"), {})
    name = str(began.get("name") or folder.resolve().name)
    if not isinstance(preset.method, PatchMethod):
        base = preset.method.base(preset).to(accelerator.device)
        return Training(preset, [], base, run, name, accelerator, resume=True)
    base = load_base(preset.base).to(accelerator.device)
    pictures, trigger = _scan(preset, base, None, looking)
    card = _card(preset, base, pictures, trigger)
    return Training(preset, [], base, run, name, accelerator, card, pictures, resume=True)


def _scan(preset: Preset, base: Any, name: str | None, looking: Looking) -> tuple[Lessons, str]:
    """The pictures, clips or sounds with their captions, and the trigger word that is in them."""
    if preset.data.path is None:
        raise PresetError("there is nothing to train on", "give a folder of pictures, clips or sounds with --data")
    folder = Path(preset.data.path.replace("{assets}", str(assets_dir()))).expanduser()
    trigger = preset.data.trigger or "".join(letter for letter in (name or "").lower() if letter.isalnum())
    fill = {"trigger": trigger or "{trigger}", "class": preset.data.class_word}
    found: Lessons
    if base.medium == "audio":
        found = scan_recordings(folder, preset.data, fill, looking)
    elif base.medium == "video":
        found = scan_animations(folder, preset.data, fill, looking)
    else:
        resolution = preset.data.resolution or base.resolution
        found = scan(folder, preset.data, fill, resolution, base.size_multiple, looking)
    if trigger:
        return found, trigger
    trigger = fresh_trigger(found.fingerprint)  # known only now, so the captions still have its place holder
    return found.with_captions(lambda caption: caption.replace("{trigger}", trigger)), trigger


def _card(preset: Preset, base: Base, pictures: Lessons, trigger: str) -> Card:
    assert isinstance(preset.method, PatchMethod)
    sites = preset.method.sites(base)
    shown = preset.model_dump(mode="json")
    shown["data"] = {**shown["data"], "path": None}  # folders can tell more than their owner wants
    shown["base"] = base.identity().name
    return Card(
        method=preset.method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: site.shape for name, site in sites.items()},
        trigger=trigger,
        class_word=preset.data.class_word,
        concept=_concept(pictures, trigger),
        data_fingerprint=pictures.fingerprint,
        data_count=pictures.count,
        preset=shown,
        seed=preset.seed,
        library_version=studio.__version__,
    )


def _accelerator(preset: Preset) -> Accelerator:
    AcceleratorState._reset_state()  # else a second training in this process could not choose its precision
    return Accelerator(mixed_precision=preset.mixed_precision, cpu=not torch.cuda.is_available())


def _run(folder: Path | None, name: str) -> Run:
    return Run(folder or library.runs_dir() / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
