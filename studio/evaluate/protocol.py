"""Protocols: which pictures an adapter is measured by. One YAML file each, in `presets/protocols/` or anywhere.

`extends` names another whose fields count where a protocol has none of its own.

The pictures are of three sorts. *Settings* show what was learned where it was not seen before. *Unrelated* prompts are
drawn without and with the adapter from the same noise: what differs is drift. One prompt is *repeated* over seeds: what
differs is diversity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio.adapter import Card
from studio.data.captions import put_words
from studio.errors import PresetError, nearest, reason_of
from studio.method import describe
from studio.paths import presets_dir


class Setting(BaseModel):
    """A prompt, and what its picture must show. `shows` maps a question of the judge to the right answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(description="{trigger} and {class} are filled in.")
    shows: dict[Literal["glyph", "tint", "size", "position", "ground", "pattern"], str] = Field(
        {}, description="What the bundled judge should answer."
    )
    reference: str = Field("", description="The picture to compare with, a file among the references. Default: all.")


class Protocol(BaseModel):
    """What is drawn to measure an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    teaches: Literal["subject", "style"] = Field("subject", description="What an adapter of this protocol teaches.")
    settings: tuple[Setting, ...] = Field(min_length=1, description="What was learned, in settings of all kinds.")
    unrelated: tuple[str, ...] = Field(min_length=1, description="Prompts that have nothing to do with it.")
    repeated: str = Field("{trigger}", description="One prompt to draw over several seeds.")
    repeats: int = Field(8, ge=2, le=1000, description="How many seeds.")

    def filled(self, trigger: str, class_word: str) -> Protocol:
        """With the words in the prompts."""

        def fill(text: str) -> str:
            return put_words(text, {"trigger": trigger, "class": class_word})

        settings = tuple(s.model_copy(update={"prompt": fill(s.prompt)}) for s in self.settings)
        return self.model_copy(
            update={
                "settings": settings,
                "unrelated": tuple(map(fill, self.unrelated)),
                "repeated": fill(self.repeated),
            }
        )

    @property
    def pairs(self) -> bool:
        """Whether every setting has a reference of its own."""
        return all(setting.reference for setting in self.settings)

    @property
    def pictures(self) -> int:
        """How many pictures are drawn with an adapter."""
        return len(self.settings) + len(self.unrelated) + self.repeats


def protocol_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((presets_dir() / "protocols").glob("*.yaml"))}


def read_protocol(name: str) -> Protocol:
    """A protocol by name or file. Raises PresetError with the nearest name or key."""
    known = protocol_files()
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise PresetError(f"there is no protocol '{name}'", nearest(name, known))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "extends" in content:
            content = {**read_protocol(content.pop("extends")).model_dump(), **content}
        return Protocol.model_validate(content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"the protocol '{path}' cannot be read: {reason_of(error)}") from None
    except ValidationError as error:
        message, hint = describe(error, Protocol)
        raise PresetError(f"the protocol '{path}': {message}", hint) from None


def default_protocol(card: Card, sticker_world: bool) -> str:
    """The name of the protocol that fits an adapter: by its captions, a style or a subject."""
    if not sticker_world:
        return "photo-subject"
    data: dict[str, Any] = card.preset.get("data", {})
    prompts = (str(data.get("caption", "")), *map(str, card.preset.get("sample_prompts", ())))
    names_a_style = any(f"{{trigger}} {word}" in prompt for prompt in prompts for word in ("style", "picture"))
    return "sticker-style" if names_a_style else "sticker-subject"
