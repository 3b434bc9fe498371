"""The form of a preset: one widget for each setting, made from the schemas, and documents from their values."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import gradio as gr
import yaml

from studio.errors import PresetError, nearest
from studio.schemas import schemas
from ui import form
from ui.form import Field

SIMPLE = ("steps", "learning_rate", "data.class_word", "data.caption")
HIDDEN = ("description", "base", "data.source", "data.path", "learning_rates", "other_bases")
GROUPS = {
    "Pictures and captions": lambda key: key.startswith("data."),
    "Samples, checkpoints, export": lambda key: key.startswith(("sample_", "checkpoint", "validate_", "export")),
    "Length, speed, precision": lambda key: True,
}


@lru_cache(maxsize=1)
def preset_fields() -> tuple[Field, ...]:
    found = form.fields_of(schemas()["preset"])
    return tuple(f for f in found if f.key not in HIDDEN and not f.description.startswith(("Stickers:", "Melodies:")))


@lru_cache(maxsize=1)
def method_fields() -> dict[str, tuple[Field, ...]]:
    """The settings of each method that makes adapters."""
    found = {k: m for k, m in schemas()["methods"].items() if m["adapts"]}
    return {kind: tuple(form.fields_of(entry["schema"])) for kind, entry in found.items()}


def presets() -> dict[str, dict[str, Any]]:
    """The presets that teach from a user's pictures, those of the shortest names first: subject, style, ..."""
    kinds, known = method_fields(), schemas()["presets"]
    names = sorted(known, key=lambda name: (name.count("-"), name != "subject", name))
    fits = {n: known[n]["method"]["kind"] in kinds and known[n]["data"]["source"] == "pictures" for n in names}
    return {name: known[name] for name in names if fits[name]}


def base_choices() -> list[tuple[str, str]]:
    rows = schemas()["bases"]
    return [
        (f"{row['name']} - {row['kind'] if row['offline'] else 'is downloaded first'}", row["name"]) for row in rows
    ]


# -- values ------------------------------------------------------------------------------------------------------


def keys() -> list[str]:
    """The name of every widget, in the order of the form."""
    own = [field.key for field in preset_fields()]
    return ["base", "kind", *own, *(f"{kind}:{f.key}" for kind, fields in method_fields().items() for f in fields)]


def values_of(content: dict[str, Any]) -> list[Any]:
    """What each widget shows for a preset's content; methods it does not use show their defaults."""
    method = content.get("method", {})
    found = [content.get("base"), method.get("kind")]
    found += [form.shown(field, form.get(content, field.key, field.default)) for field in preset_fields()]
    for kind, fields in method_fields().items():
        for field in fields:
            given = method if kind == method.get("kind") or field.key == "target_modules" else {}
            found.append(form.shown(field, form.get(given, field.key, field.default)))
    return found


def content_of(preset: str, values: list[Any]) -> dict[str, Any]:
    """The whole preset that the form says. Raises PresetError for the first value that cannot be."""
    given = dict(zip(keys(), values, strict=True))
    content = copy.deepcopy(presets().get(preset) or next(iter(presets().values())))
    content["base"] = str(given["base"] or "").strip() or content["base"]
    for field in preset_fields():
        form.put(content, field.key, form.value_of(field, given[field.key]))
    kind = given["kind"]
    if kind not in method_fields():
        raise PresetError(f"unknown method '{kind}'", nearest(str(kind), method_fields()))
    content["method"] = {"kind": kind}
    for field in method_fields()[kind]:
        form.put(content["method"], field.key, form.value_of(field, given[f"{kind}:{field.key}"]))
    return content


def values_for_base(preset: str, base: str) -> list[Any]:
    """What the widgets show for a base: values where the preset treats it otherwise than its own, else gr.skip()."""
    content = copy.deepcopy(presets()[preset])
    others: dict[str, Any] = content["other_bases"]
    if base != content["base"]:
        for key, value in others.items():
            form.put(content, key, value)
    touched = {key.replace("method.", f"{kind}:") for key in others for kind in method_fields()}  # whichever is chosen
    found = zip(keys(), values_of(content), strict=True)
    return [value if key in touched else gr.skip() for key, value in found]


def to_yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def from_yaml(text: str) -> dict[str, Any]:
    """A preset's content, checked as far as the schemas go. Raises PresetError that names the fault."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PresetError(f"this is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("method"), dict | str):
        raise PresetError("a preset is a list of 'key: value' lines, one of which is 'method'")
    if isinstance(content["method"], str):
        content["method"] = {"kind": content["method"]}
    kind = str(content["method"].get("kind"))
    if kind not in method_fields():
        raise PresetError(f"unknown method '{kind}'", nearest(kind, method_fields()))
    hidden = [f.key for f in form.fields_of(schemas()["preset"])]
    form.unknown_key({k: v for k, v in content.items() if k != "method"}, preset_fields(), [*hidden, "base"])
    form.unknown_key(content["method"], method_fields()[kind], ["kind"])
    return content


# -- widgets -----------------------------------------------------------------------------------------------------


def build() -> tuple[list[Any], dict[str, Any]]:
    """The widgets in the order of `keys`, and the group of each method's own."""
    own = {field.key: field for field in preset_fields()}
    made: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with gr.Row():
        made["base"] = gr.Dropdown(
            base_choices(), label="Base", info="The model that learns. A folder or a hub's id may be typed.",
            allow_custom_value=True, min_width=240,
        )  # fmt: skip
        kinds = [(f"{kind} - {schemas()['methods'][kind]['sentence']}"[:90], kind) for kind in method_fields()]
        made["kind"] = gr.Dropdown(kinds, label="Method", info="How the base is changed.", min_width=240)
    with gr.Row():
        for key in SIMPLE:
            made[key] = form.widget(own[key], min_width=200)
    with gr.Accordion("Advanced", open=False):
        for kind, fields in method_fields().items():
            with (
                gr.Accordion(f"Method: {kind}", open=True, visible=False) as groups[kind],
                gr.Row(elem_classes="fields"),
            ):
                for field in fields:
                    made[f"{kind}:{field.key}"] = form.widget(field, min_width=260)
        rest = [field for field in preset_fields() if field.key not in SIMPLE]
        for title, belongs in GROUPS.items():
            mine = [field for field in rest if belongs(field.key)]
            rest = [field for field in rest if field not in mine]
            with gr.Accordion(title, open=False), gr.Row(elem_classes="fields"):
                for field in mine:
                    made[field.key] = form.widget(field, min_width=260)
    return [made[key] for key in keys()], groups
