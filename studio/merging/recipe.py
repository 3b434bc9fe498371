"""What is merged and how: a typed recipe, from YAML or from the command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from studio.deltas.coding import Code
from studio.errors import RequestError, reason_of
from studio.method import describe, matches


class Part(BaseModel):
    """One adapter of a merge and its strength."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: str = Field(description="Name in the library, file, or folder of PEFT.")
    weight: float = Field(1.0, allow_inf_nan=False, description="Strength; may be negative.")
    blocks: dict[str, float] = Field(
        {},
        description="Factors on the strength for parts of the model: names with * and ?; the first that fits counts.",
    )

    @field_validator("blocks")
    @classmethod
    def _finite(cls, value: dict[str, float]) -> dict[str, float]:
        if any(factor != factor or abs(factor) == float("inf") for factor in value.values()):
            raise ValueError("factors must be finite")
        return value

    def at(self, site: str) -> float:
        """The strength at a site."""
        return self.weight * next((factor for pattern, factor in self.blocks.items() if within(site, pattern)), 1.0)


def within(site: str, pattern: str) -> bool:
    """Whether a pattern names the site, or a part of the model that holds it: `mid_block`, `unet.up_blocks.1`."""
    return matches(site, pattern) or matches(site, f"{pattern}.*") or fnmatch.fnmatchcase(site, f"{pattern}.*")


class Recipe(BaseModel):
    """A whole merge. The same recipe over the same files gives the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: tuple[Part, ...] = Field(min_length=1, description="What is merged.")
    strategy: str = Field("auto", description="How; auto takes gram where the files have sketches, else sum.")
    options: dict[str, Any] = Field({}, description="The strategy's own settings.")
    rank: int | Literal["auto"] | None = Field(
        None, description="Highest rank of a layer; auto: the smallest within the tolerance."
    )
    tolerance: float | None = Field(None, ge=0, lt=1, description="Relative error that a lower rank may cost.")
    base: str | None = Field(None, description="The base, where files of other programs or a strategy need it.")
    calibrate: bool = Field(False, description="Record the layers' inputs anew with the base, for gram.")
    compress: str | None = Field(None, description="int8 or ternary:DENSITY: low-rank layers in few bits, with a loss.")
    seed: int = Field(0, ge=0, description="Seed of strategies that drop numbers at random.")

    @field_validator("adapters", mode="before")
    @classmethod
    def _names_and_weights(cls, value: Any) -> Any:
        """Accepts `{name: weight}` and `{name: {weight: ..., blocks: ...}}` beside a list of parts."""
        if not isinstance(value, dict):
            return [{"adapter": part} if isinstance(part, str) else part for part in value or ()]
        return [
            {"adapter": name, **(part if isinstance(part, dict) else {"weight": part})} for name, part in value.items()
        ]

    @field_validator("compress")
    @classmethod
    def _known_code(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Code.parse(value)
            except RequestError as error:
                raise ValueError(f"{error.message}: {error.hint}") from None
        return value

    @field_validator("rank")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("a rank is 1 or more")
        return value


def make_recipe(content: Any) -> Recipe:
    """A recipe from plain data. Raises RequestError that names the nearest key."""
    if not isinstance(content, dict):
        raise RequestError("a recipe is a table of settings", "it begins with 'adapters:'")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        message, hint = describe(error, Recipe, prefix="")
        raise RequestError(f"the recipe is wrong: {message}", hint) from None


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; names of files in it are looked for beside it too. Raises RequestError."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RequestError(f"cannot read the recipe '{path}': {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"'{path}' is not YAML: {reason_of(error)}") from None
    recipe = make_recipe(content)
    parts = tuple(part.model_copy(update={"adapter": _beside(path, part.adapter)}) for part in recipe.adapters)
    return recipe.model_copy(update={"adapters": parts})


def _beside(recipe: Path, name: str) -> str:
    candidate = recipe.parent / name
    return str(candidate) if not Path(name).exists() and candidate.exists() else name


def parse_parts(texts: Sequence[str]) -> list[dict[str, Any]]:
    """`NAME|FILE[:WEIGHT]` of the command line. Raises RequestError."""
    parts = []
    for text in texts:
        name, colon, number = text.rpartition(":")
        if colon and not (Path(text).exists() or "/" in number):
            try:
                parts.append({"adapter": name, "weight": float(number)})
            except ValueError:
                raise RequestError(f"'{number}' in '{text}' is no weight", "for example my-cat:0.8") from None
        else:
            parts.append({"adapter": text})
    return parts
