"""The command line. Parses, calls, prints; no logic of its own. Torch is imported inside the commands that need it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from studio.commands.bench import bench
from studio.commands.compare import compare
from studio.commands.convert import convert
from studio.commands.evaluate import evaluate
from studio.commands.generate import generate
from studio.commands.inspect import inspect
from studio.commands.merge import merge
from studio.commands.slots import slots
from studio.commands.sticker import sticker
from studio.commands.ui import ui
from studio.errors import RequestError, StudioError, reason_of
from studio.terminal import (
    CountProgress,
    StopSignal,
    TrainingProgress,
    file_size,
    out,
    print_error,
    print_json,
    print_table,
    say,
)

UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries its own copy of click's

app = typer.Typer(
    help="Teach a generative model a subject, a style, a motion or a tradition, and take home a small file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
library_app = typer.Typer(help="The adapters on this machine. Example: studio library", invoke_without_command=True)
app.add_typer(library_app, name="library")

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command()
def train(
    preset: Annotated[str, typer.Option(help="A preset's name, or a file.")] = "",
    data: Annotated[str | None, typer.Option(help="Folder of pictures, clips or recordings to learn from.")] = None,
    base: Annotated[str | None, typer.Option(help="Bundled name, alias, folder, hub id or .safetensors file.")] = None,
    method: Annotated[str | None, typer.Option(help="Replace the preset's method: lora, orthogonal, ...")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the library, and the trigger word.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run. Default: in the studio's home.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any field.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter. Example: studio train --preset subject --data photos/ --name my-cat"""
    if not resume:
        _known_preset(preset)
    from studio.training import Order, plan, plan_resume

    if resume:
        if run is None:
            raise RequestError("--resume needs the folder of the run", "add --run FOLDER; 'studio runs' lists them")
        if settings or any(value is not None for value in (data, base, method, name, steps, seed)):
            raise RequestError(
                "a resumed run keeps the settings it began with, so that it ends with the same bits",
                f"studio train --resume --run {run}; or start a new run",
            )
        with CountProgress("looking through files", 0) as looking:
            training = plan_resume(run, looking.show)
    else:
        with CountProgress("looking through files", 0) as looking:
            training = plan(
                Order(preset, data, base, method, name, run, tuple(settings or ()), steps, seed), looking.show
            )
    if training.accelerator.is_main_process:
        _announce(training)
        _follow(training, as_json)
    else:
        with StopSignal() as stop:  # another process of the same training; the main one speaks for all
            for _ in training.events(stop):
                pass


def _known_preset(name: str) -> None:
    """Raises for a name that is none before what trains is imported, which takes seconds."""
    from studio.preset import read_preset

    if not name:
        raise RequestError("train needs a preset", "for example --preset subject; 'studio presets' lists them")
    read_preset(name)


def _announce(training: Any) -> None:
    preset, pictures = training.preset, training.pictures
    say(f"base: {preset.base}   method: {preset.method.kind}   steps: {preset.steps}   seed: {preset.seed}")
    for note in training.base.notes:
        say(note)
    for change in training.changes:
        say(f"changed: {change}")
    if pictures is not None:
        say(f"data: {pictures.count} {pictures.noun} from {preset.data.path}")
        say(f"trigger word: {training.card.trigger}")
    say(f"run: {training.run.folder}")


def _follow(training: Any, as_json: bool) -> None:
    progress = TrainingProgress(training.preset.steps)
    last = None
    from studio.run import Event

    with StopSignal() as stop:
        try:
            for event in training.events(stop):
                progress.show(event)
                if event.kind == "warning":
                    say(f"warning: {event.data['text']}", style="yellow")
                if stop() and event.kind == "progress":
                    break  # nothing is trained yet, so there is nothing to save
                last = event
        except (StudioError, MemoryError, RuntimeError) as error:
            text = error.message if isinstance(error, StudioError) else reason_of(error)
            if training.run.events_path.exists():
                training.run.append(Event("failed", last.step if last else 0, {"error": text}))
            if isinstance(error, RuntimeError) and "out of memory" not in text and "allocate" not in text:
                raise
            raise error if isinstance(error, StudioError) else _out_of_memory(text) from None
        finally:
            progress.close()
        if stop():
            say(f"stopped; go on with: studio train --resume --run {training.run.folder}")
            raise SystemExit(stop.exit_code)
    if last is not None and last.kind == "stopped":
        say(f"stopped; go on with: studio train --resume --run {training.run.folder}")
        return
    _finished(training, last.data if last else {}, as_json)


def _out_of_memory(text: str) -> StudioError:
    return StudioError(
        f"out of memory: {text}",
        "use a smaller batch_size or data.resolution, set gradient_checkpointing=true, or mixed_precision=bf16",
    )


def _finished(training: Any, facts: dict[str, Any], as_json: bool) -> None:
    run = training.run.folder
    result = {**facts, "run": str(run), "report": str(run / "report.html")}
    if (run / "before-after.png").exists():
        result["before_after"] = str(run / "before-after.png")
    if training.card is not None:
        result |= {"name": training.name, "trigger": training.card.trigger}
    if as_json:
        print_json(result)
        return
    out.print(f"done in {facts.get('seconds', 0):.0f} s")
    labels = {
        "adapter": "adapter",
        "base": "base",
        "before_after": "before and after",
        "report": "report",
        "trigger": "trigger word",
    }
    for key, label in labels.items():
        if key in result:
            out.print(f"  {label + ':':<18}{result[key]}", soft_wrap=True, markup=False)
    for target, path in facts.get("exports", {}).items():
        out.print(f"  {target + ' export:':<18}{path}", soft_wrap=True, markup=False)
    if training.card is not None:
        from shlex import quote

        from studio.data.captions import put_words

        words = {"trigger": training.card.trigger, "class": training.card.class_word}
        words["caption"] = getattr(training.pictures, "example", "")
        prompt = put_words(next(iter(training.preset.sample_prompts), "{trigger}"), words)
        out.print(
            f"  {'try it:':<18}studio generate {quote(prompt)} --adapter {training.name}", soft_wrap=True, markup=False
        )


app.command()(generate)


@app.command()
def export(
    adapter: str,
    to: Annotated[str, typer.Option(help="diffusers, kohya, diff or checkpoint.")] = "diffusers",
    out_path: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of an approximation.")] = None,
    allow_approximate: Annotated[bool, typer.Option("--allow-approximate", help="Accept a measured error.")] = False,
    base: Annotated[str | None, typer.Option(help="Default: the adapter's own base.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for other programs, proven by reloading. Example: studio export my-cat --out lora/"""
    from studio.bases.registry import load_base
    from studio.exporting import export_adapter
    from studio.generation import parse_use

    use = parse_use(adapter)
    if out_path is None:
        raise RequestError("export needs a folder to write", "add --out FOLDER")
    loaded = load_base(base or use.base)
    report = export_adapter(
        use.adapter, loaded, to, out_path, rank=rank, allow_approximate=allow_approximate, force=force
    )
    facts = report.to_dict()
    if as_json:
        print_json(facts)
        return
    for warning in facts.get("warnings", ()):
        say(f"warning: {warning}", style="yellow")
    out.print(f"{facts['status']}: {facts['format']} in {out_path}", soft_wrap=True, markup=False)


app.command()(merge)
app.command()(inspect)


@app.command()
def check(
    preset: Annotated[str, typer.Option(help="A preset's name, or a file.")] = "subject",
    data: Annotated[str | None, typer.Option(help="Folder of pictures, clips or recordings.")] = None,
    base: Annotated[str | None, typer.Option(help="Another base.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any field.")] = None,
    as_json: Json = False,
) -> None:
    """Look at data, settings, memory and export; train nothing. Example: studio check --data photos/"""
    from studio.preflight import preflight
    from studio.training import Order

    report = preflight(Order(preset, data, base, settings=tuple(settings or ())))
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        if isinstance(value, list):
            for line in value:
                out.print(f"{key}: {line}", soft_wrap=True, markup=False)
        else:
            out.print(f"{key}: {value}", soft_wrap=True, markup=False)


app.command()(evaluate)
app.command()(sticker)
app.command()(compare)
app.command()(bench)
app.command()(convert)
app.command()(ui)


@app.command()
def presets(name: Annotated[str, typer.Argument()] = "", as_json: Json = False) -> None:
    """List presets, or show one. Example: studio presets subject"""
    from studio.preset import make_preset, preset_files, read_preset

    if name:
        content = make_preset(read_preset(name))
        if as_json:
            print_json(content.model_dump(mode="json"))
        else:
            files = preset_files()
            out.print(files[name].read_text() if name in files else content.to_yaml(), markup=False)
        return
    rows = [(key, make_preset(read_preset(key))) for key in preset_files()]
    if as_json:
        print_json({key: preset.model_dump(mode="json") for key, preset in rows})
        return
    print_table(
        ["preset", "base", "method", "steps", "for"],
        [(k, p.base, p.method.kind, p.steps, p.description) for k, p in rows],
    )


@app.command()
def bases(as_json: Json = False) -> None:
    """List the bases that have a name. Example: studio bases"""
    from studio.bases.registry import bases as list_bases

    rows = list_bases()
    if as_json:
        print_json(rows)
        return
    shown = [{**row, "bytes": file_size(row["bytes"]) if row["bytes"] else ""} for row in rows]
    print_table([*rows[0]], [list(row.values()) for row in shown], "family")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods with their settings. Example: studio methods --json"""
    from studio.method import methods as list_methods

    found = list_methods()
    if as_json:
        print_json({kind: cls.model_json_schema() for kind, cls in found.items()})
        return
    print_table(
        ["method", "what", "paper"], [(k, (c.__doc__ or "").splitlines()[0], c.paper) for k, c in found.items()]
    )


@app.command()
def runs(as_json: Json = False) -> None:
    """List trainings, newest first. Example: studio runs"""
    from studio.inspecting import describe_run
    from studio.library import run_folders

    rows = [describe_run(folder) for folder in run_folders()]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        say("no runs yet; try: studio train --preset subject")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, missing parts and the fix for each. Example: studio doctor"""
    from studio.doctor import diagnose

    rows = diagnose()
    if as_json:
        print_json(rows)
    else:
        print_table(["part", "state", "found", "fix"], [list(row.values()) for row in rows])


@library_app.callback()
def library_list(context: typer.Context, as_json: Json = False) -> None:
    """The adapters on this machine. Example: studio library"""
    if context.invoked_subcommand:
        return
    from studio.library import entries

    rows = entries()
    if as_json:
        print_json([{"name": e.name, "path": str(e.path), "bytes": e.path.stat().st_size, **e.facts} for e in rows])
    elif rows:
        print_table(
            ["name", "size", "note", "run"],
            [(e.name, file_size(e.path.stat().st_size), e.facts.get("note", ""), e.facts.get("run", "")) for e in rows],
        )
    else:
        say("the library is empty; try: studio train --preset subject")


library_app.command("slots")(slots)


@library_app.command("remove")
def library_remove(name: str) -> None:
    """Delete an adapter. Example: studio library remove my-cat"""
    from studio.library import remove

    remove(name)


@library_app.command("rename")
def library_rename(name: str, new: str) -> None:
    """Rename an adapter. Example: studio library rename my-cat tom"""
    from studio.library import rename

    rename(name, new)


@library_app.command("note")
def library_note(name: str, text: str) -> None:
    """Attach a note. Example: studio library note my-cat "best at 0.8" """
    from studio.library import note

    note(name, text)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code. An error is one line on stderr; `--debug` shows where it arose."""
    debug = "--debug" in arguments
    try:
        code = app([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="studio")
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except (StudioError, UsageError, OSError) as error:
        if debug:
            raise
        shown = _as_studio_error(error)
        print_error(shown)
        return shown.exit_code


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def _as_studio_error(error: Any) -> StudioError:
    if isinstance(error, StudioError):
        return error
    if isinstance(error, UsageError):
        return RequestError(error.format_message(), _usage_hint(error))
    return StudioError(f"{error.strerror or error}: '{error.filename or ''}'", "run with --debug to see where")


def _usage_hint(error: Any) -> str:
    return f"see: {error.ctx.command_path} --help" if error.ctx else "see: studio --help"
