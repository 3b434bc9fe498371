"""Generate: a prompt, adapters with their strengths, pictures; and everything drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from studio import library
from studio.drawing import Engine, pictures_dir
from studio.errors import RequestError
from ui import pieces, settings
from ui.adapters import adapter_choices, checked, make_sliders, sliders
from ui.errors import plain
from ui.registry import Page
from ui.sweep import AXES, EXAMPLES, Sweep, sweep_of

MOST_ADAPTERS = 4
MOST_PICTURES = 16
HISTORY = 60
WIDE = 384  # pixels from which a picture needs more room
ENGINE = Engine()


def history() -> list[tuple[str, str]]:
    """The pictures drawn last, newest first."""
    folders = sorted(pictures_dir().glob("*"), reverse=True) if pictures_dir().is_dir() else []
    pictures = [path for folder in folders[:HISTORY] for path in sorted(folder.glob("*.png"))]
    return [(str(path), path.parent.name.split("-", 2)[-1].rsplit("-", 1)[0]) for path in pictures[:HISTORY]]


def request_of(values: tuple[Any, ...]) -> dict[str, Any]:
    """What the page asks the drawing process for. Raises RequestError."""
    prompt, negative, base, names, *rest = values
    strengths, (_, seed, count, steps, guidance, width, height, wait, *_) = rest[:MOST_ADAPTERS], rest[MOST_ADAPTERS:]
    if not str(prompt or "").strip():
        raise RequestError("the prompt is empty", "say what to draw, for example: a dog, on a blue background")
    names = checked(names)
    return {
        "prompt": prompt.strip(), "negative": negative or "", "base": base or None, "seed": int(seed or 0),
        "adapters": [f"{name}:{weight}" for name, weight in zip(names, strengths, strict=False)],
        "steps": int(steps) if steps else None, "guidance": float(guidance) if guidance is not None else None,
        "count": min(max(1, int(count or 1)), MOST_PICTURES), "width": int(width) if width else None,
        "height": int(height) if height else None, "wait": bool(wait),
    }  # fmt: skip


NOTHING = gr.skip()


@plain
def draw(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Pictures as they come: (gallery, preview, sentence, next seed, history, sweep)."""
    request = request_of(values)
    x, xs, y, ys, without = values[-5:]
    sweep = sweep_of(x, xs, y, ys, without, request["adapters"])
    if sweep is not None:
        request["cells"] = sweep.cells(request)
    total = len(request.get("cells", ())) or request["count"]
    pictures: list[tuple[str, str]] = []
    warnings: list[str] = []
    notes: list[str] = []

    def shown(gallery: Any = NOTHING, preview: Any = NOTHING, said: Any = NOTHING, *rest: Any) -> tuple[Any, ...]:
        return gallery, preview, said, *rest, *[NOTHING] * (3 - len(rest))

    yield shown(_shown([]), gr.update(visible=False), pieces.say("Starting to draw."), NOTHING, NOTHING, "")
    for answer in ENGINE.draw(request):
        if "error" in answer:
            raise RequestError(answer["error"], answer.get("hint", ""))
        if "warning" in answer:
            warnings.append(f"Note: {answer['warning']}.")
        elif "note" in answer:
            notes = [answer["note"]]
            yield shown(said=_progress([*warnings, *notes], ""))
        elif "preview" in answer:
            yield shown(preview=gr.update(visible=True, value=_loaded(answer["preview"])))
        elif "step" in answer:
            where = f"Picture {answer['number'] + 1} of {total}, step {answer['step']} of {answer['steps']}"
            part = (answer["number"] + answer["step"] / answer["steps"]) / total
            yield shown(said=_progress([*warnings, *notes], where, part))
        elif "picture" in answer:
            pictures.append((answer["picture"], f"seed {answer['seed']}"))
            if sweep is None:
                yield shown(drawn(pictures), gr.update(visible=False))
            else:
                yield shown(
                    NOTHING, gr.update(visible=False), NOTHING, NOTHING, NOTHING, _swept(sweep, pictures, total)
                )
    locked, seed = values[4 + MOST_ADAPTERS], request["seed"]
    done = pieces.say(" ".join([f"{len(pictures)} drawn.", *warnings]), "good" if pictures else "")
    following = seed if locked or sweep is not None else seed + request["count"]
    yield shown(NOTHING, gr.update(visible=False), done, following, _shown(history()))


def _swept(sweep: Sweep, pictures: list[tuple[str, str]], total: int) -> str:
    found: list[Path | None] = [Path(path) for path, _ in pictures]
    return pieces.picture_grid(sweep.columns, sweep.grid([*found, *[None] * (total - len(found))]), large=total <= 16)


def _shown(pictures: list[tuple[str, str]]) -> Any:
    """A gallery takes no room while it is empty; large pictures get more of it."""
    return gr.update(value=list(pictures), visible=bool(pictures))


def drawn(pictures: list[tuple[str, str]]) -> Any:
    """The pictures of this drawing: two in a row if they are large, one alone as large as the page."""
    wide = bool(pictures) and _width(pictures[0][0]) > WIDE
    columns = min(2, len(pictures)) if wide else 4
    return gr.update(value=list(pictures), visible=bool(pictures), columns=columns)


def _width(path: str) -> int:
    from PIL import Image

    with Image.open(path) as picture:  # the studio's own
        return picture.width


def _loaded(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.copy()


def _progress(notes: list[str], where: str, part: float = 0.0) -> str:
    bar = f"<progress max='1' value='{part:.3f}' aria-label='{pieces.text(where)}'></progress>" if where else ""
    return f"<div class='run'>{pieces.say(' '.join(notes))}{bar}<p class='lead'>{pieces.text(where)}</p></div>"


# -- restoring ---------------------------------------------------------------------------------------------------


@plain
def restore_from(file: str | None) -> list[Any]:
    """The settings that a picture of the studio was drawn with, read from the picture itself."""
    if not file:
        return [gr.skip()] * (12 + MOST_ADAPTERS)
    found = pieces.thumbnails([Path(file)])[Path(file)]
    if "error" in found:
        raise RequestError(f"the picture {found['error']}")
    facts = found["facts"]
    if "prompt" not in facts:
        raise RequestError("this picture does not say how it was made", "pictures drawn by the studio do")
    known = {entry.name for entry in library.entries()}
    uses = [use for use in facts.get("adapters", ()) if isinstance(use, dict)][:MOST_ADAPTERS]
    missing = [str(use.get("name")) for use in uses if use.get("name") not in known]
    if missing:
        gr.Warning(f"Not in the library: {', '.join(missing)}", title="Adapters left out")
    uses = [use for use in uses if use.get("name") in known]
    strengths = [float(use.get("weight", 1)) for use in uses] + [1.0] * (MOST_ADAPTERS - len(uses))
    names = [use["name"] for use in uses]
    gr.Info("Generate draws the same picture again.", title="Settings restored")
    return [
        facts["prompt"], facts.get("negative", ""), facts.get("base"),
        gr.update(value=names, choices=adapter_choices()), *sliders(names, *strengths),
        True, facts.get("seed", 0), 1, facts.get("steps"), facts.get("guidance"), facts.get("width"),
        facts.get("height"), None,
    ]  # fmt: skip


def restore_chosen(event: gr.SelectData) -> list[Any]:
    shown = history()
    index = event.index if isinstance(event.index, int) else -1
    return restore_from(shown[index][0] if 0 <= index < len(shown) else None)


def opened() -> list[Any]:
    return [gr.update(choices=adapter_choices()), _shown(history())]


def build() -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.HTML(pieces.heading("Generate", "Say what to draw. With an adapter, use its word."))
    with gr.Column(elem_classes="section"):
        prompt = gr.Textbox(
            label="Prompt", lines=2, placeholder="a dog, on a blue background", elem_classes="prompt", elem_id="prompt",
            max_length=2000,
        )  # fmt: skip
        with gr.Row():
            adapters = gr.Dropdown(
                [], label="Adapters", info=f"Up to {MOST_ADAPTERS}, together.", multiselect=True,
                max_choices=MOST_ADAPTERS, scale=2, elem_id="adapters",
            )  # fmt: skip
            count = gr.Number(1, label="Pictures", precision=0, minimum=1, maximum=MOST_PICTURES, min_width=90)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            lock = gr.Checkbox(True, label="Keep the seed", info="Off: it moves on.", min_width=120)
        with gr.Row():
            strengths = make_sliders(MOST_ADAPTERS)
        with gr.Accordion("Advanced", open=False):
            with gr.Row():
                base = gr.Dropdown(
                    [("the adapter's, else sticker", ""), *settings.base_choices()], value="", label="Base",
                    allow_custom_value=True,
                )  # fmt: skip
                negative = gr.Textbox(label="Not to draw")
            with gr.Row():
                steps = gr.Number(
                    None, label="Steps", info="Empty: the base's own.", precision=0, minimum=1, maximum=1000
                )
                guidance = gr.Number(None, label="Guidance", info="Empty: the base's own.")
                width = gr.Number(None, label="Width", info="Pixels. Empty: the base's own.", precision=0)
                height = gr.Number(None, label="Height", info="Pixels. Empty: the base's own.", precision=0)
            wait = gr.Checkbox(label="Wait for a running training instead of pausing it for each picture")
        with gr.Accordion("Sweep: a grid over strength, seed, steps or guidance", open=False), gr.Row():
            axes = []
            for label in ("Columns", "Rows"):
                axis = gr.Dropdown(AXES, value="", label=label, min_width=180)
                numbers = gr.Textbox(label=f"Values of the {label.lower()}", min_width=180, info="With commas between.")
                axis.input(lambda kind: EXAMPLES.get(kind, ""), axis, numbers, **quiet)
                axes += [axis, numbers]
            without = gr.Checkbox(True, label="A column without adapters", min_width=180)
        with gr.Row():
            go = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
            stop = gr.Button("Stop", size="lg", scale=0, min_width=120)
    said = gr.HTML()
    with gr.Row():
        preview = gr.Image(
            label="Being drawn", visible=False, height=260, interactive=False, buttons=[], min_width=220, scale=1,
        )  # fmt: skip
        gallery = gr.Gallery(
            label="Pictures",
            columns=4,
            height="auto",
            object_fit="contain",
            buttons=["download", "fullscreen"],
            scale=3,
            visible=False,
            elem_id="pictures",
        )
    sheet = gr.HTML()
    with gr.Accordion("Drawn before: choose one to restore its settings", open=True):
        before = gr.Gallery(
            label="History", show_label=False, columns=10, height="auto", object_fit="cover", fit_columns=False,
            allow_preview=False,
            buttons=[], visible=False,
        )  # fmt: skip
        file = gr.File(label="Or drop a picture that the studio drew", file_types=[".png", ".jpg", ".webp"], height=150)
    knobs = [prompt, negative, base, adapters, *strengths, lock, seed, count, steps, guidance, width, height]
    drawing = gr.on(
        [go.click, prompt.submit], draw, [*knobs, wait, *axes, without], [gallery, preview, said, seed, before, sheet],
        show_progress="hidden", api_name="draw", concurrency_limit=4,
    )  # fmt: skip
    stop.click(lambda: ENGINE.cancel(), None, None, cancels=[drawing], **quiet)
    adapters.change(sliders, [adapters, *strengths], strengths, **quiet)
    file.upload(restore_from, file, [*knobs, file], **quiet)
    before.select(restore_chosen, None, [*knobs, file], **quiet)
    gr.on(None, opened, None, [adapters, before], **quiet)


PAGE = Page("Generate", "generate", 40, build)
