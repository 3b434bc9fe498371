"""The form of a preset, made from the schemas, and documents from its values.

`values` hold, by key, what each control shows: `base`, `kind` (of the method), the preset's fields by dotted path, and
each method's own as `KIND:FIELD`.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import yaml

from studio.errors import PresetError, nearest, reason_of
from studio.schemas import schemas
from ui import fields, form
from ui.form import Field

SIMPLE = ("steps", "learning_rate", "data.class_word", "data.caption")
HIDDEN = ("description", "base", "data.source", "data.path", "learning_rates", "other_bases")
MADE_BY_THE_STUDIO = ("Stickers:", "Melodies:", "Moving stickers:")  # settings of data that nobody brings
OF_MEDIUM = {"Sounds:": "audio", "Clips:": "video"}
OTHER = "another"  # a base that the list has not
GROUPS = {
    "Data and captions": lambda key: key.startswith("data."),
    "Samples, checkpoints, export": lambda key: key.startswith(("sample_", "checkpoint", "validate_", "export")),
    "Length, speed, precision": lambda key: True,
}


@lru_cache(maxsize=1)
def preset_fields() -> tuple[Field, ...]:
    found = form.fields_of(schemas()["preset"])
    return tuple(f for f in found if f.key not in HIDDEN and not f.description.startswith(MADE_BY_THE_STUDIO))


@lru_cache(maxsize=1)
def method_fields() -> dict[str, tuple[Field, ...]]:
    """The settings of each method that makes adapters."""
    found = {k: m for k, m in schemas()["methods"].items() if m["adapts"]}
    return {kind: tuple(form.fields_of(entry["schema"])) for kind, entry in found.items()}


def presets() -> dict[str, dict[str, Any]]:
    """The presets that teach from what a user brings, those of the shortest names first: subject, style, ..."""
    kinds, known = method_fields(), schemas()["presets"]
    names = sorted(known, key=lambda name: (name.count("-"), name != "subject", name))
    fits = {
        n: known[n]["method"]["kind"] in kinds and known[n]["data"]["source"] in ("pictures", "clips") for n in names
    }
    return {name: known[name] for name in names if fits[name]}


def first_preset() -> str:
    return "subject" if "subject" in presets() else next(iter(presets()))


def medium_of(content: dict[str, Any]) -> str:
    """What a preset's base makes, and so what it learns from: image, video or audio."""
    if content.get("data", {}).get("source") == "clips":
        return "video"
    if str(content.get("method", {}).get("kind", "")).startswith("music-"):
        return "audio"  # also where its base is not on this machine
    return next((row["medium"] for row in schemas()["bases"] if row["name"] == content.get("base")), "") or "image"


def base_choices(medium: str = "") -> list[tuple[str, str]]:
    """Bases of a medium, or all, as pairs of what is shown and the name; those on this machine first."""
    rows = [row for row in schemas()["bases"] if not medium or row["medium"] == medium]
    rows.sort(key=lambda row: not row["offline"])
    return [
        (f"{row['name']} - {row['kind'] if row['offline'] else 'is downloaded first'}", row["name"]) for row in rows
    ]


# -- values ------------------------------------------------------------------------------------------------------


def values_of(content: dict[str, Any]) -> dict[str, Any]:
    """What each control shows for a preset's content."""
    method = content["method"]
    found = {"base": content.get("base"), "kind": method["kind"]}
    found |= {f.key: form.shown(f, form.get(content, f.key, f.default)) for f in preset_fields()}
    return found | method_values(method["kind"], method)


def method_values(kind: str, method: dict[str, Any]) -> dict[str, Any]:
    """A method's own; of another one it takes over only which layers are changed."""
    same = method.get("kind") == kind
    given = method if same else {k: v for k, v in method.items() if k == "target_modules"}
    return {f"{kind}:{f.key}": form.shown(f, form.get(given, f.key, f.default)) for f in method_fields()[kind]}


def content_of(preset: str, values: dict[str, Any]) -> dict[str, Any]:
    """The whole preset that the form says. Raises PresetError for the first value that cannot be."""
    content = copy.deepcopy(presets().get(preset) or presets()[first_preset()])
    given = values_of(content) | values
    content["base"] = str(given["base"] or "").strip() or content["base"]
    if content["base"] == OTHER:
        raise PresetError("no base is named", "write a folder, a file or a hub's id under 'Which base'")
    for field in preset_fields():
        form.put(content, field.key, form.value_of(field, given[field.key]))
    kind = given["kind"]
    if kind not in method_fields():
        raise PresetError(f"unknown method '{kind}'", nearest(str(kind), method_fields()))
    given = method_values(kind, content["method"]) | given
    content["method"] = {"kind": kind}
    for field in method_fields()[kind]:
        form.put(content["method"], field.key, form.value_of(field, given[f"{kind}:{field.key}"]))
    return content


def values_for_base(preset: str, base: str) -> dict[str, Any]:
    """The values that change with a base: those where the preset treats another one than its own otherwise."""
    content = copy.deepcopy(presets()[preset])
    others: dict[str, Any] = content["other_bases"]
    if base != content["base"]:
        for key, value in others.items():
            form.put(content, key, value)
    values = values_of(content)
    for kind in method_fields():
        values |= method_values(kind, content["method"])
    touched = {key.replace("method.", f"{kind}:") for key in others for kind in method_fields()}  # whichever is chosen
    return {key: values[key] for key in touched if key in values}


def values_for_method(preset: str, kind: str) -> dict[str, Any]:
    """The values that change with a method: its own, and the learning rate that the preset has for it."""
    content = presets()[preset]
    same = content["method"]["kind"] == kind
    rate = content["learning_rate"] if same else content["learning_rates"].get(kind)
    return {"learning_rate": f"{rate:g}" if rate else "", **method_values(kind, content["method"])}


def to_yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def from_yaml(text: str) -> dict[str, Any]:
    """A preset's content, checked as far as the schemas go. Raises PresetError that names the fault."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PresetError(f"this is no YAML: {reason_of(error)}") from None
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


# -- the form ----------------------------------------------------------------------------------------------------


def html(preset: str, values: dict[str, Any], title: str) -> str:
    """The form as it stands: a few fields, the rest under Advanced."""
    medium = medium_of(presets()[preset])
    own = {f.key: f for f in preset_fields() if _belongs(f, medium)}
    simple = [fields.control(own[key], values[key]) for key in SIMPLE]
    rest = [f for f in own.values() if f.key not in SIMPLE]
    kind = values["kind"]
    mine = [fields.control(f, values[f"{kind}:{f.key}"], f"{kind}:{f.key}") for f in method_fields()[kind]]
    groups = fields.more("method", f"Method: {kind}", fields.row(*mine), open_=True)
    for name, belongs in GROUPS.items():
        chosen = [f for f in rest if belongs(f.key)]
        rest = [f for f in rest if f not in chosen]
        groups += fields.more(name, name, fields.row(*(fields.control(f, values[f.key]) for f in chosen)))
    named = fields.line(
        "title", "Name", title, "Its name in the library, and the word that calls it in a prompt.", "my-cat"
    )  # fmt: skip
    top = fields.row(named, *_base(medium, str(values["base"])), _method(kind))
    return top + fields.row(*simple) + fields.more("advanced", "Advanced", groups)


def _belongs(field: Field, medium: str) -> bool:
    """Settings of sounds are not shown for pictures."""
    return all(medium == wanted for start, wanted in OF_MEDIUM.items() if field.description.startswith(start))


def _base(medium: str, chosen: str) -> list[str]:
    choices = [*base_choices(medium), ("another: a folder, a file or a hub's id", OTHER)]
    listed = chosen in {name for _, name in choices}
    found = [fields.select("base", "Base", choices, chosen if listed else OTHER, "The model that learns.")]
    if not listed or chosen == OTHER:
        hint = "A folder, a .safetensors file, or a hub's id."
        found.append(fields.line("other_base", "Which base", "" if listed else chosen, hint))
    return found


def _method(kind: str) -> str:
    choices = [(f"{name} - {schemas()['methods'][name]['sentence']}"[:90], name) for name in method_fields()]
    return fields.select("kind", "Method", choices, kind, "How the base is changed.")
