"""From JSON schemas to widgets. Names, tooltips and limits are stated once, in the pydantic classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import yaml

from studio.errors import PresetError, nearest

WORDS = {"lr": "learning rate", "ema": "EMA", "snr": "SNR", "dco": "DCO", "rslora": "rsLoRA"}


@dataclass(frozen=True)
class Field:
    """A setting. `kind` is bool, int, float, text, choice, choices, lines (a list of texts) or yaml (anything else)."""

    key: str
    kind: str
    description: str = ""
    default: Any = None
    optional: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # must be larger than this
    below: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        words = self.key.rsplit(".", 1)[-1].split("_")
        text = " ".join(WORDS.get(word, word) for word in words)
        return text[:1].upper() + text[1:]

    @property
    def hint(self) -> str:
        """The tooltip, with the limits."""
        return " ".join(part for part in (self.description, self.limits()) if part)

    def limits(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"From {self.minimum:g} to {self.maximum:g}."
        parts = [
            (self.minimum, "At least {:g}."),
            (self.above, "Above {:g}." if self.above else "Above 0."),
            (self.maximum, "At most {:g}."),
            (self.below, "Below {:g}."),
        ]
        ruled_out = self.minimum == 0
        return " ".join(
            text.format(value)
            for value, text in parts
            if value is not None and not (ruled_out and text.startswith("At least"))
        )


def fields_of(schema: dict[str, Any], prefix: str = "", root: dict[str, Any] | None = None) -> list[Field]:
    """The settings of a schema, nested ones by their dotted path. What is fixed, such as `kind`, is left out."""
    root = root or schema
    found: list[Field] = []
    for name, node in schema.get("properties", {}).items():
        resolved = _resolved(node, root)
        if "const" in resolved or (name == "kind" and "enum" not in resolved):
            continue
        if resolved.get("type") == "object" and "properties" in resolved:
            found += fields_of(resolved, f"{prefix}{name}.", root)
        else:
            found.append(_field(f"{prefix}{name}", resolved, root))
    return found


def _resolved(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        target: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = {**target, **{k: v for k, v in node.items() if k != "$ref"}}
    return node


def _field(key: str, node: dict[str, Any], root: dict[str, Any]) -> Field:
    options = [_resolved(option, root) for option in node.get("anyOf", ())]
    real = [option for option in options if option.get("type") != "null"]
    inner = real[0] if len(real) == 1 else {} if options else node
    items = _resolved(inner.get("items", {}), root) if isinstance(inner.get("items"), dict) else {}
    kinds = {"boolean": "bool", "integer": "int", "number": "float", "string": "text"}
    kind = kinds.get(inner.get("type", ""), "yaml")
    choices: tuple[Any, ...] = ()
    if "enum" in inner:
        kind, choices = "choice", tuple(inner["enum"])
    elif "enum" in items:
        kind, choices = "choices", tuple(items["enum"])
    elif inner.get("type") == "array" and items.get("type") == "string" and "prefixItems" not in inner:
        kind = "lines"
    return Field(
        key,
        kind,
        node.get("description", inner.get("description", "")),
        node.get("default"),
        len(real) < len(options),
        inner.get("minimum"),
        inner.get("maximum"),
        inner.get("exclusiveMinimum"),
        inner.get("exclusiveMaximum"),
        choices,
    )


# -- widgets -----------------------------------------------------------------------------------------------------


def widget(field: Field, **options: Any) -> Any:
    """The component for a setting, with its default in it."""
    value = shown(field, field.default)
    common = {"label": field.label, "info": field.hint or None, "value": value, **options}
    if field.kind == "bool":
        return gr.Checkbox(**common)
    if field.kind == "choice":
        return gr.Dropdown(choices=list(field.choices), **common)
    if field.kind == "choices":
        return gr.CheckboxGroup(choices=list(field.choices), **common)
    placeholder = "automatic" if field.optional else None
    lines = {"lines": 3, "yaml": 2}.get(field.kind, 1)
    return gr.Textbox(lines=lines, max_lines=8, placeholder=placeholder, **common)


def shown(field: Field, value: Any) -> Any:
    """A value as its widget holds it."""
    if field.kind in ("bool", "choice"):
        return value
    if field.kind == "choices":
        return list(value or ())
    if value is None:
        return ""
    if field.kind == "lines":
        return "\n".join(value)
    if field.kind == "yaml":
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def value_of(field: Field, text: Any) -> Any:
    """What a widget says. Raises PresetError, naming the setting and its limits."""
    if field.kind == "choices":
        return list(text or ())
    if field.kind in ("bool", "choice"):
        return text
    text = str(text if text is not None else "")
    if field.kind == "lines":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if field.kind == "yaml":
        try:
            return yaml.safe_load(text or ("null" if field.optional else "{}"))
        except yaml.YAMLError:
            raise PresetError(f"'{field.label}' cannot be read", "write it as YAML, for example [1, 2]") from None
    if field.kind == "text":
        return text if text or not field.optional else None
    if not text.strip():
        if field.optional:
            return None
        raise PresetError(f"'{field.label}' is empty", f"{field.default} is the default")
    return _number(field, text.strip())


def _number(field: Field, text: str) -> int | float:
    try:
        value = int(text) if field.kind == "int" else float(text)
    except ValueError:
        kind = "a whole number" if field.kind == "int" else "a number"
        raise PresetError(f"'{field.label}' must be {kind}, and is '{text}'") from None
    low, high = (
        value < field.minimum if field.minimum is not None else field.above is not None and value <= field.above,
        value > field.maximum if field.maximum is not None else field.below is not None and value >= field.below,
    )
    if low or high or value != value:
        raise PresetError(f"'{field.label}' cannot be {text}", field.limits())
    return value


# -- whole documents ---------------------------------------------------------------------------------------------


def get(content: dict[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted path."""
    place: Any = content
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return default
        place = place[part]
    return place


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value


def unknown_key(content: dict[str, Any], fields: Sequence[Field], also: Sequence[str] = ()) -> None:
    """Raises PresetError for the first key of a document that no setting has, naming the nearest."""
    known = {field.key for field in fields} | set(also)
    for key in _paths(content, known):
        if key not in known:
            raise PresetError(f"unknown key '{key}'", nearest(key, known))


def _paths(content: dict[str, Any], known: set[str], prefix: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        deeper = isinstance(value, dict) and key not in known
        found += _paths(value, known, f"{key}.") if deeper and value else [key]
    return found
