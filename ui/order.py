"""What a person asks to be generated: the form of each medium, kept with the browser's draft, and the request it makes.

A base brings its medium: a medium has a form as soon as some base makes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.schemas import schemas
from studio.thumbnails import make_thumbnails
from ui import fields, form, pieces, settings
from ui.adapters import adapter_choices, checked, family_of
from ui.draft import Draft
from ui.form import Field
from ui.sweep import AXES, EXAMPLES, sweep_of

MOST_ADAPTERS = 4
MOST_REGIONS = 4
MOST_GIVEN = 8
GIVEN_SIDE = 1024  # pixels
TITLES = {"image": "Image", "video": "Video", "audio": "Music"}
NOUNS = {"image": "picture", "video": "clip", "audio": "sound"}
TRY = {"image": "a dog, on a blue background", "video": "a fox bouncing", "audio": "a calm melody"}
OWN = "Empty: the base's own."

COUNT = Field("count", "int", "How many, with seeds that count up.", default=1, minimum=1, maximum=16)
SEED = Field("seed", "int", "The same seed gives the same again.", default=0, minimum=0)
LOCK = Field("keep_the_seed", "bool", "Off: the next one starts after the last.", default=True)
STEPS = Field("steps", "int", OWN, optional=True, minimum=1, maximum=1000)
GUIDANCE = Field("guidance", "float", f"How closely the prompt is followed. {OWN}", optional=True)
NEGATIVE = Field("negative", "text", "What should not be in it.", optional=True)
SIZE = (
    Field("width", "int", f"Pixels. {OWN}", optional=True, minimum=16, maximum=8192),
    Field("height", "int", f"Pixels. {OWN}", optional=True, minimum=16, maximum=8192),
)
CLIP = (
    Field("frames", "int", OWN, optional=True, minimum=1, maximum=64),
    Field("fps", "float", f"Frames a second. {OWN}", optional=True, minimum=1, maximum=60),
    Field("loop", "bool", "It ends where it began, and plays in a circle.", default=True),
)
SECONDS = Field("seconds", "float", f"Length. {OWN}", optional=True, minimum=0.1, maximum=600)
SIGNS = (
    Field("beats", "text", "A tempo and a metre, 96 bpm 4/4, or counts: 1@0.5 2@1.1. Empty: not told.", optional=True),
    Field("chords", "text", "Am Dm E7, spread evenly, or with seconds: Am@0 F@2.5. Empty: not told.", optional=True),
)  # of bases that are told them beside the words
KNOBS = {
    "image": (NEGATIVE, STEPS, GUIDANCE, *SIZE),
    "video": (NEGATIVE, STEPS, GUIDANCE, *SIZE),
    "audio": (NEGATIVE, STEPS, GUIDANCE),
}
FIRST = {"image": (), "video": CLIP, "audio": (SECONDS,)}  # knobs that are not under Advanced


def media() -> list[str]:
    """What bases say they make, in the order of the tabs."""
    made = {row["medium"] for row in schemas()["bases"]}
    return [medium for medium in TITLES if medium in made]


def bases_here(medium: str) -> list[str]:
    return [row["name"] for row in schemas()["bases"] if row["medium"] == medium and row["offline"]]


def hears_signs(name: str) -> bool:
    """Whether a base, by name or folder, is a Mustango, which is told beats and chords."""
    if row := next((row for row in schemas()["bases"] if row["name"] == name), None):
        return bool(row.get("family") == "mustango")
    try:
        return "MustangoPipeline" in (Path(name).expanduser() / "model_index.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


@dataclass(frozen=True)
class Order:
    """A form as it stands. `boxes` are regions: left, top, right, bottom in fractions of the picture."""

    draft: Draft
    medium: str
    values: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()

    def get(self, name: str, default: Any = "") -> Any:
        return self.values.get(name, default)

    def shown(self, knob: Field) -> Any:
        return self.values.get(knob.key, form.shown(knob, knob.default))

    def number(self, knob: Field) -> Any:
        return form.value_of(knob, self.shown(knob))

    @property
    def signs(self) -> tuple[Field, ...]:
        """The knobs for beats and chords, if the base that will play hears them."""
        if self.medium != "audio":
            return ()
        if not self.get("base") and self.adapters:
            return SIGNS if family_of(self.adapters[0]) == "mustango" else ()
        return SIGNS if hears_signs(str(self.get("base") or "") or next(iter(bases_here("audio")), "")) else ()

    def keep(self) -> Order:
        told = {"values": self.values, "adapters": self.adapters, "boxes": self.boxes}
        self.draft.save_form(told, f"generate-{self.medium}")
        return self


def order_of(draft: Draft, medium: str) -> Order:
    """The form as it was left."""
    kept = draft.form(f"generate-{medium}")
    boxes = tuple(tuple(map(float, box)) for box in kept.get("boxes", ()))
    return Order(draft, medium, dict(kept.get("values", {})), tuple(kept.get("adapters", ())), boxes)


def changed(order: Order, values: dict[str, Any]) -> Order:
    """The form with what the browser says now. Raises RequestError for boxes that are none."""
    values = {**order.values, **values}
    added = str(values.pop("add", "") or "")
    adapters = order.adapters
    if added and added not in adapters and len(adapters) < MOST_ADAPTERS:
        adapters = (*adapters, added)
    boxes = _boxes(values.pop("boxes")) if "boxes" in values else order.boxes
    if values.get("x") and not values.get("xs"):
        values["xs"] = EXAMPLES[values["x"]]
    if values.get("y") and not values.get("ys"):
        values["ys"] = EXAMPLES[values["y"]]
    return replace(order, values=values, adapters=adapters, boxes=boxes)


def without(order: Order, what: str, which: str) -> Order:
    """The form without an adapter, a region or a given frame."""
    if what == "adapter":
        return replace(order, adapters=tuple(name for name in order.adapters if name != which))
    if what == "region":
        at = int(which) if which.isdigit() else -1
        values = {k: v for k, v in order.values.items() if not k.startswith("region:")}
        kept = [i for i in range(len(order.boxes)) if i != at]
        for new, old in enumerate(kept):
            values |= {
                k.replace(f"region:{old}:", f"region:{new}:"): v
                for k, v in order.values.items()
                if k.startswith(f"region:{old}:")
            }
        return replace(order, values=values, boxes=tuple(order.boxes[i] for i in kept))
    for path in given_files(order):
        if path.name == which:
            path.unlink(missing_ok=True)
    return order


def _boxes(told: Any) -> tuple[tuple[float, ...], ...]:
    try:
        boxes = tuple(tuple(float(v) for v in box) for box in json.loads(str(told or "[]")))
    except (ValueError, TypeError):
        raise RequestError("the regions cannot be read", "reload the page") from None
    fits = all(len(b) == 4 and 0 <= b[0] < b[2] <= 1 and 0 <= b[1] < b[3] <= 1 for b in boxes)
    if not fits or len(boxes) > MOST_REGIONS:
        raise RequestError(f"a region leaves the picture, or there are more than {MOST_REGIONS}", "reload the page")
    return boxes


# -- given frames ------------------------------------------------------------------------------------------------


def given_files(order: Order) -> list[Path]:
    folder = order.draft.folder / "given"
    return sorted(folder.glob("*.webp")) if folder.is_dir() else []


def give_frames(order: Order, files: Sequence[Path]) -> list[str]:
    """Takes pictures in as frames of a clip, decoded apart and written anew. Returns what was left out, and why."""
    folder, left_out = order.draft.folder / "given", []
    made = make_thumbnails(list(files), folder / "new", GIVEN_SIDE)
    for path in files:
        facts, number = made[str(path)], len(given_files(order))
        if "error" in facts or number >= MOST_GIVEN:
            left_out.append(f"'{path.name}' {facts.get('error', f'is more than {MOST_GIVEN} pictures')}")
            continue
        taken = {p.stem for p in given_files(order)}
        free = next(f"{i:02d}" for i in range(100) if f"{i:02d}" not in taken)
        Path(facts["thumbnail"]).rename(folder / f"{free}.webp")
    return left_out


# -- the request -------------------------------------------------------------------------------------------------


def request_of(order: Order) -> dict[str, Any]:
    """What the drawing process is asked for. Raises RequestError, PresetError."""
    prompt = str(order.get("prompt")).strip()
    if not prompt:
        raise RequestError("the prompt is empty", f"say what to make, for example: {TRY[order.medium]}")
    for sign in order.signs:
        if told := str(order.get(sign.key)).strip():
            prompt += f" | {sign.key}: {told}"
    names = checked(order.adapters)
    knobs = {knob.key: order.number(knob) for knob in (COUNT, SEED, *FIRST[order.medium], *KNOBS[order.medium])}
    request = {
        **knobs, "prompt": prompt, "base": _base(order), "negative": knobs.get("negative") or "",
        "adapters": [f"{name}:{_weight(order, f'weight:{name}'):g}" for name in names],
        "wait": bool(order.get("wait", False)),
    }  # fmt: skip
    if order.medium == "image" and order.boxes:
        request["regions"] = [_region(order, i, box) for i, box in enumerate(order.boxes)]
    if order.medium == "video" and (files := given_files(order)):
        request["given"] = {_frame(order, path): str(path) for path in files}
    sweep = sweep_of(
        order.get("x"), order.get("xs"), order.get("y"), order.get("ys"), order.get("bare", True), request["adapters"]
    )
    if sweep is not None:
        request["cells"] = sweep.cells(request)
    return request


def _base(order: Order) -> str | None:
    """The base that is asked for; without adapters the first of its medium that is here, else the worker decides."""
    chosen = str(order.get("base") or "")
    used = [*order.adapters, *(order.get(f"region:{i}:adapter") for i in range(len(order.boxes)))]
    if chosen or any(used):
        return chosen or None
    here = bases_here(order.medium)
    if not here:
        raise RequestError(
            f"no base that makes a {NOUNS[order.medium]} is on this machine", "choose one under Advanced"
        )
    return here[0]


def _region(order: Order, number: int, box: Sequence[float]) -> dict[str, Any]:
    name, prompt = str(order.get(f"region:{number}:adapter")), str(order.get(f"region:{number}:prompt")).strip()
    if not prompt:
        raise RequestError(f"region {number + 1} has no prompt", "say what is in it, or remove it")
    weight = _weight(order, f"region:{number}:weight")
    return {"box": list(box), "prompt": prompt, "adapter": f"{checked([name])[0]}:{weight:g}" if name else ""}


def _frame(order: Order, path: Path) -> str:
    knob = Field(f"frame:{path.name}", "int", default=int(path.stem), minimum=0, maximum=63)
    return str(order.number(knob))


def _weight(order: Order, key: str) -> float:
    knob = Field(key, "float", default=1.0, minimum=-5, maximum=5)
    return float(form.value_of(replace(knob, key="strength"), str(order.get(key, 1.0))))


# -- the form ----------------------------------------------------------------------------------------------------


def html(order: Order) -> str:
    prompt = (
        f"<div class='field wide'><label for='p-{order.medium}'>Prompt</label><textarea class='prompt' rows='2' "
        f"id='p-{order.medium}' data-edit='prompt' maxlength='2000' placeholder='{pieces.text(TRY[order.medium])}'>"
        f"{pieces.text(order.get('prompt'))}</textarea></div>"
    )
    knobs = [
        fields.control(knob, order.shown(knob)) for knob in (*FIRST[order.medium], *order.signs, COUNT, SEED, LOCK)
    ]
    return (
        fields.row(prompt) + _adapters(order) + fields.row(*knobs) + _given(order) + _regions(order) + _advanced(order)
        + _sweep(order) + "<div class='buttons'>"
        + f"<button type='button' class='button primary big' data-click='generate' id='generate-{order.medium}'>"
        + f"Generate</button>{fields.button('stop', 'Stop', '', 'Stop what is being made')}</div>"
    )  # fmt: skip


def _adapters(order: Order) -> str:
    choices = [c for c in adapter_choices(order.medium) if c[1] not in order.adapters]
    sliders = [_slider(order, name) for name in order.adapters]
    if len(order.adapters) < MOST_ADAPTERS:
        label = "Add an adapter" if choices or order.adapters else "Adapters: the library has none for these bases yet"
        sliders.append(fields.select("add", label, [("choose ...", ""), *choices], "", "Use its word in the prompt."))
    return fields.row(*sliders)


def _slider(order: Order, name: str) -> str:
    weight = float(order.get(f"weight:{name}", 1))
    off = fields.button(f"drop:adapter:{name}", "Take it off", "quiet", f"Take {name} off")
    return f"<div class='field'>{fields.slider(f'weight:{name}', f'Strength of {name}', weight, 0, 2)}{off}</div>"


def _advanced(order: Order) -> str:
    own = "the adapter's, else " + (bases_here(order.medium) or ["none: choose one"])[0]
    listed = [(own, ""), *settings.base_choices(order.medium)]
    base = str(order.get("base") or "")
    known = base in {name for _, name in listed}
    parts = [fields.select("base", "Base", [*listed, *([] if known else [(base, base)])], base)]
    parts += [fields.control(knob, order.shown(knob)) for knob in KNOBS[order.medium]]
    wait = Field("wait", "bool", "Else it is paused for each one, and the page says so.")
    parts.append(fields.checkbox("wait", "Wait while something trains", bool(order.get("wait", False)), wait.hint))
    size = "" if order.medium == "audio" else ", size"
    return fields.more(f"advanced-{order.medium}", f"Advanced: base, steps, guidance{size}", fields.row(*parts))


def _sweep(order: Order) -> str:
    parts = []
    for axis, label in (("x", "Columns"), ("y", "Rows")):
        kind = str(order.get(axis) or "")
        parts.append(fields.select(axis, label, AXES, kind))
        if kind:
            parts.append(
                fields.line(f"{axis}s", f"Values of the {label.lower()}", order.get(f"{axis}s"), "With commas.")
            )
    parts.append(fields.checkbox("bare", "A column without adapters", bool(order.get("bare", True))))
    title = "Sweep: a grid over strength, seed, steps or guidance"
    return fields.more(f"sweep-{order.medium}", title, fields.row(*parts))


def _given(order: Order) -> str:
    """The pictures that are frames of the clip already, each with its place."""
    if order.medium != "video" or not (files := given_files(order)):
        return ""
    urls = pieces.own_pictures(files)
    boxes = "".join(
        f"<div class='photo'><img src='{urls[path]}' alt='given frame'>"
        + fields.line(f"frame:{path.name}", "Frame", order.get(f"frame:{path.name}", int(path.stem)), mode="numeric")
        + fields.button(f"drop:given:{path.name}", "Remove", "quiet", "Remove this frame") + "</div>"
        for path in files
    )  # fmt: skip
    return fields.more("given", "Frames that are given", f"<div class='photos'>{boxes}</div>", open_=True)


def _regions(order: Order) -> str:
    """A canvas to draw boxes on, and what each of them shows."""
    if order.medium != "image":
        return ""
    tones = [f"--tone:var(--curve-{i + 2})" for i in range(MOST_REGIONS)]
    boxes = "".join(
        f"<button type='button' class='box' data-box='{i}' aria-label='region {i + 1}: arrow keys move it, with Shift "
        f"they change its size, Delete removes it' style='{tones[i]};left:{100 * x0:g}%;top:{100 * y0:g}%;"
        f"width:{100 * (x1 - x0):g}%;height:{100 * (y1 - y0):g}%'><b>{i + 1}</b><i></i></button>"
        for i, (x0, y0, x1, y1) in enumerate(order.boxes)
    )
    rows = "".join(_region_row(order, i, tones[i]) for i in range(len(order.boxes)))
    told = pieces.text(json.dumps(order.boxes))
    rows = rows or (
        "<p class='lead'>Drag on the canvas: each box is drawn by its own adapter from its own prompt, and the prompt "
        f"above fills the rest.</p><p>{fields.button('region', 'Add a left and a right half')}</p>"
    )
    ratio = _side(order, "width") / _side(order, "height")
    canvas = (
        f"<div><div class='canvas' role='group' aria-label='Regions of the picture' style='aspect-ratio:{ratio:.3f}'>"
        f"{boxes}</div><input type='hidden' data-edit='boxes' value='{told}'></div>"
    )
    inside = f"<div class='regions'>{canvas}<div>{rows}</div></div>"
    return fields.more("regions", "Regions: several concepts, each in its place", inside, open_=bool(order.boxes))


def _side(order: Order, name: str) -> int:
    told = str(order.get(name) or "")
    other = str(order.get("height" if name == "width" else "width") or "")
    return max(1, int(told)) if told.isdigit() and other.isdigit() else 1


def _region_row(order: Order, number: int, tone: str) -> str:
    key = f"region:{number}"
    used = str(order.get(f"{key}:adapter") or "")
    choices = [("none: the base itself", ""), *adapter_choices(order.medium)]
    head = (
        f"<div class='head'><b>Region {number + 1}</b>"
        f"{fields.button(f'drop:region:{number}', 'Remove', 'quiet', f'Remove region {number + 1}')}</div>"
    )
    parts = [
        fields.line(f"{key}:prompt", "What is in it", order.get(f"{key}:prompt"), placeholder="a mycat, on blue"),
        fields.select(f"{key}:adapter", "Adapter", choices, used),
    ]
    if used:
        parts.append(fields.slider(f"{key}:weight", "Strength", float(order.get(f"{key}:weight", 1)), 0, 2))
    return f"<div class='region' style='{tone}'>{head}{fields.row(*parts)}</div>"


# -- restoring ---------------------------------------------------------------------------------------------------


def restored(order: Order, facts: dict[str, Any]) -> tuple[Order, list[str]]:
    """The form that makes a work again, from what its file says; and the adapters that the library lacks."""
    known = {name for _, name in adapter_choices()}
    uses = [use for use in facts.get("adapters") or () if isinstance(use, dict)]
    regions = [r for r in facts.get("regions") or () if isinstance(r, dict) and isinstance(r.get("box"), list)]
    told = [*(use.get("name") for use in uses), *(region.get("adapter") for region in regions)]
    values: dict[str, Any] = {"prompt": str(facts.get("prompt", "")), LOCK.key: True, "count": "1"}
    for knob in (SEED, *FIRST[order.medium], *KNOBS[order.medium]):
        value = facts.get(knob.key, knob.default)
        values[knob.key] = bool(value) if knob.kind == "bool" else form.shown(knob, value)
    values |= {f"weight:{use.get('name')}": use.get("weight", 1) for use in uses}
    for number, region in enumerate(regions[:MOST_REGIONS]):
        adapter = region.get("adapter") if region.get("adapter") in known else ""
        values |= {f"region:{number}:prompt": str(region.get("prompt", "")), f"region:{number}:adapter": adapter or "",
                   f"region:{number}:weight": region.get("weight", 1)}  # fmt: skip
    base = str(facts.get("base") or "")
    values["base"] = "" if base in bases_here(order.medium)[:1] else base
    worn = tuple(dict.fromkeys(str(use["name"]) for use in uses if use.get("name") in known))[:MOST_ADAPTERS]
    boxes = _boxes(json.dumps([region["box"] for region in regions[:MOST_REGIONS]]))
    return replace(order, values=values, adapters=worn, boxes=boxes), [
        str(name) for name in told if name and name not in known
    ]
