"""Studies: methods x lessons x seeds, as data. One YAML file each, in `presets/studies/` or anywhere.

A *lesson* is what is taught: a held-out glyph of the sticker world, a style, or somebody's folder. A *cell* is a method
with its settings. Every cell learns every lesson with every seed; `sums` wear several of a cell's adapters at once,
`merges` make one of them in several ways, and `pruning` sets the base's smallest weights to zero, without any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from studio.data.melodies.modes import MODES
from studio.data.stickers import COLOURS, TINTS
from studio.errors import PresetError, StudioError, nearest, reason_of
from studio.evaluate.protocol import read_protocol
from studio.files import slugify
from studio.method import describe
from studio.paths import presets_dir


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Style(_Part):
    """How a style changes a thing of the sticker world."""

    kind: Literal["tint", "outline"] = Field(description="All in shades of one colour, or a drawing of lines.")
    colour: str = Field("purple", description="The colour.")

    @model_validator(mode="after")
    def _known_colour(self) -> Style:
        known = TINTS if self.kind == "tint" else tuple(COLOURS)
        if self.colour not in known:
            raise ValueError(f"'{self.colour}' is no colour for it: {nearest(self.colour, known)}")
        return self


class Tune(_Part):
    """A mode of the melody world, as lines of one instrument or of all that its tradition has."""

    mode: str = Field(description="A raga, a makam, major or minor.")
    instrument: str = Field("", description="Who plays. Default: all in turn.")
    pieces: int = Field(24, ge=4, le=1000, description="How many pieces are learned from.")
    compared: int = Field(24, ge=4, le=1000, description="How many others are compared with.")
    seconds: float = Field(6.0, ge=1, le=60, description="Length of each.")

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        tradition_of(mode)
        return mode

    @property
    def tradition(self) -> str:
        return tradition_of(self.mode)


def tradition_of(mode: str) -> str:
    """Which music has a mode. Raises ValueError, naming the nearest."""
    found = next((tradition for tradition, modes in MODES.items() if mode in modes), None)
    if found is None:
        raise ValueError(f"there is no mode '{mode}': {nearest(mode, [m for modes in MODES.values() for m in modes])}")
    return found


class Folder(_Part):
    """Somebody's own pictures or recordings."""

    pictures: str = Field(description="What to learn from.")
    references: str = Field(description="Other pictures of the same, to compare with.")
    class_word: str = Field("", description="What kind of thing it is.")


class Cell(_Part):
    """A method with its settings."""

    name: str = Field(description="How tables call it.")
    method: dict[str, Any] = Field(
        description="As in a preset. '{index}' stands for the lesson's place in the study, from 0, '{number}' from 1."
    )
    preset: str = Field("", description="What its trainings start from, for a base of its own. Default: the study's.")
    settings: dict[str, Any] = Field({}, description="Other fields of the preset for this cell alone.")
    lessons: tuple[str, ...] = Field((), description="Only these lessons. Default: the study's.")
    seeds: tuple[int, ...] = Field((), description="Only these seeds. Default: the study's.")


class Sums(_Part):
    """Several adapters of one cell worn at once, each subject measured beside the others."""

    cells: tuple[str, ...] = Field(description="Which cells.")
    lessons: tuple[str, ...] = Field(description="The concepts, in this order; the first K of them are summed.")
    sizes: tuple[int, ...] = Field((2, 4, 8), description="K.")
    weights: tuple[float, ...] = Field((1.0,), description="The strength of each.")
    seeds: tuple[int, ...] = Field((0,), description="Seeds of the trainings.")
    measured: int = Field(2, ge=1, description="How many of the K are measured, from the first.")


class Way(_Part):
    """A way to make one adapter of several: a strategy of `studio merge` with its settings."""

    name: str = Field("", description="How tables call it. Default: the strategy's name.")
    strategy: str = Field(description="Of `studio merge --list`.")
    weight: float = Field(1.0, description="The strength of each adapter.")
    options: dict[str, Any] = Field({}, description="Settings of the strategy.")

    @property
    def title(self) -> str:
        return self.name or self.strategy


class Merges(_Part):
    """Concepts merged in several ways: who is still recognised, and what it does to the base."""

    cells: tuple[str, ...] = Field(description="Which cells.")
    lessons: tuple[str, ...] = Field(description="The concepts, in this order; the first K of them are merged.")
    sizes: tuple[int, ...] = Field((2, 4, 8), description="K.")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="Seeds of the trainings.")
    ways: tuple[Way, ...] = Field(min_length=1, description="How they are merged.")
    pictures: int = Field(4, ge=1, le=12, description="How many pictures of each concept.")
    scenes: int = Field(32, ge=1, description="Generic renderings that the base's loss is taken on, two noises each.")
    pairs: int = Field(0, ge=0, description="How many pairs of neighbours in `lessons` are drawn in one picture.")

    @field_validator("ways")
    @classmethod
    def _known_ways(cls, ways: tuple[Way, ...]) -> tuple[Way, ...]:
        from studio.merging.strategy import strategy_named

        for way in ways:
            try:
                strategy_named(way.strategy).options(way.options)
            except StudioError as error:
                raise ValueError(f"the way '{way.title}': {error.message} ({error.hint})") from None
        if len({way.title for way in ways}) < len(ways):
            raise ValueError("two ways have one name")
        return ways


class Pruning(_Part):
    """The base with its smallest weights set to zero, for what SaRA says of them."""

    shares: tuple[float, ...] = Field((0.1, 0.2), description="Shares of all weights of the denoiser, in (0, 1).")
    glyphs: int = Field(96, ge=1, description="How many trained glyphs are asked for.")


class Evaluation(_Part):
    """How adapters are measured; see `studio evaluate`."""

    steps: int = Field(25, ge=1, description="Sampling steps.")
    batch: int = Field(8, ge=1, description="Pictures drawn at a time.")
    protocol: str = Field("", description="Default: what fits the lesson.")
    metrics: tuple[str, ...] = Field((), description="judge, palette, clip, dino. Default: what fits the base.")
    clip: str = Field("", description="Folder of a CLIP model.")
    dino: str = Field("", description="Folder of a DINO model.")
    sounds: int = Field(12, ge=2, description="Music: how many sounds are played.")
    seconds: float = Field(6.0, ge=1, description="Music: how long they are.")
    clap: str = Field("", description="Music: folder of a CLAP model.")


class Study(_Part):
    """What is compared with what."""

    description: str = Field("", description="The question, in one line.")
    preset: str = Field(description="What every training starts from.")
    settings: dict[str, Any] = Field({}, description="Fields of that preset, changed for all cells.")
    subjects: dict[str, str] = Field({}, description="Held-out glyphs, each with the nearest known thing.")
    styles: dict[str, Style] = Field({}, description="Styles by name.")
    tunes: dict[str, Tune] = Field({}, description="Modes of music, by name of the lesson.")
    folders: dict[str, Folder] = Field({}, description="Lessons of one's own, by name.")
    taught: tuple[str, ...] | None = Field(
        None, description="What a cell is measured on that names no lessons. Default: all lessons; []: none."
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of the trainings.")
    cells: tuple[Cell, ...] = Field(min_length=1, description="What is compared; the first is the baseline.")
    sums: tuple[Sums, ...] = Field((), description="Sums of concepts.")
    merges: tuple[Merges, ...] = Field((), description="Concepts merged in several ways.")
    pruning: Pruning | None = Field(None, description="Zeroed weights.")
    evaluation: Evaluation = Evaluation()

    @field_validator("cells")
    @classmethod
    def _names_differ(cls, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        names = [slugify(cell.name) for cell in cells]  # as their files are called
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two cells are called '{twice}', apart from marks")
        return cells

    @property
    def lessons(self) -> list[str]:
        """All lessons by name, in the study's order."""
        return [*self.subjects, *self.styles, *self.tunes, *self.folders]

    def taught_to(self, cell: Cell) -> tuple[str, ...]:
        """What a cell learns for the comparison; sums and merges may want more."""
        return cell.lessons or (tuple(self.lessons) if self.taught is None else self.taught)

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        if not self.lessons:
            raise ValueError("there is nothing to learn: give subjects, styles, tunes or folders")
        groups: tuple[Sums | Merges, ...] = (*self.sums, *self.merges)
        lists = [self.taught or (), *(cell.lessons for cell in self.cells), *(group.lessons for group in groups)]
        named = [name for names in lists for name in names]
        if strange := next((name for name in named if name not in self.lessons), None):
            raise ValueError(f"there is no lesson '{strange}': {nearest(strange, self.lessons)}")
        cells = [cell.name for cell in self.cells]
        if strange := next((name for group in groups for name in group.cells if name not in cells), None):
            raise ValueError(f"there is no cell '{strange}': {nearest(strange, cells)}")
        for group in groups:
            if max(group.sizes) > len(group.lessons):
                raise ValueError(f"{max(group.sizes)} concepts together need as many lessons")
        return self


def study_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((presets_dir() / "studies").glob("*.yaml"))}


def read_study(name: str) -> tuple[str, Any]:
    """A study's name and content, by name or file: a Study, or of clip bases a MotionStudy.

    Raises PresetError with the nearest name or key.
    """
    from studio.comparing.motions import MotionStudy

    known = study_files()
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise PresetError(f"there is no study '{name}'", nearest(name, known))
    kind: type[Study] | type[MotionStudy] = Study
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = MotionStudy if isinstance(content, dict) and "arms" in content else Study
        study = kind.model_validate(content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"the study '{path}' cannot be read: {reason_of(error)}") from None
    except ValidationError as error:
        message, hint = describe(error, kind)
        raise PresetError(f"the study '{path}': {message}", hint) from None
    if isinstance(study, Study) and study.evaluation.protocol:
        read_protocol(study.evaluation.protocol)
    return path.stem, study
