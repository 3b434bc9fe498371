"""Studies of clip bases: arms x seeds, each a base trained by a preset with settings of its own, and one table.

What RDTF claims is asked here: the curriculum, the dual mask, the interaction over space and time, and a whole network
from scratch against an adapter on the same image base. One YAML file in `presets/studies/`, told by its `arms`.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from studio.bases.registry import load_base
from studio.comparing.jobs import Job, flat
from studio.files import slugify, write_atomically
from studio.training import Order, resolve


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arm(_Part):
    """A way of training."""

    name: str = Field(description="How the table calls it.")
    settings: dict[str, Any] = Field({}, description="Fields of the preset for this arm.")
    seconds: float | None = Field(None, gt=0, description="Processor time in place of steps. Default: the study's.")


class Measured(_Part):
    """How a base is measured; see `studio.evaluate.motion_card`."""

    clips: int = Field(40, ge=1, description="Clips of each question.")
    distance_clips: int = Field(0, ge=0, description="Clips of the S-FVD; 0: none.")
    steps: int = Field(12, ge=1, description="Sampling steps.")


class MotionStudy(_Part):
    """What is compared with what."""

    description: str = Field("", description="The question, in one line.")
    preset: str = Field("base-sticker-motion", description="What every training starts from.")
    settings: dict[str, Any] = Field({}, description="Fields of that preset, changed for all arms.")
    arms: tuple[Arm, ...] = Field(min_length=1, description="What is compared; the first is the baseline.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of the trainings.")
    seconds: float | None = Field(None, gt=0, description="Processor time of a training, in place of its steps.")
    evaluation: Measured = Measured()

    @field_validator("arms")
    @classmethod
    def _names_differ(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        names = [slugify(arm.name) for arm in arms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two arms are called '{twice}', apart from marks")
        return arms


@dataclass
class MotionJob(Job):
    """One arm with one seed."""

    def commands(self) -> list[list[str]]:
        preset_file = self.folder / "presets" / f"{self.name}.yaml"
        write_atomically(preset_file, self.order["preset"].to_yaml())
        how: Measured = self.order["evaluation"]
        command = [sys.executable, "-m", "studio.comparing.motion_arm", "--preset", str(preset_file)]
        command += ["--run", str(self.run_folder), "--out", str(self.card_path)]
        command += ["--clips", str(how.clips), "--distance-clips", str(how.distance_clips)]
        command += ["--sampling-steps", str(how.steps)]
        seconds = self.order["seconds"]
        return [[*command, "--seconds", str(seconds)] if seconds else command]


def motion_jobs(study: MotionStudy, folder: Path) -> list[Job]:
    """All jobs of a study, seeds outermost. Raises PresetError for an arm that cannot be."""
    jobs: list[Job] = []
    bases: dict[str, tuple[str, str]] = {}
    for seed in study.seeds:
        for arm in study.arms:
            settings = flat({**study.settings, **arm.settings, "seed": seed})
            preset, _ = resolve(Order(study.preset, settings=settings))
            if preset.base not in bases:
                identity = load_base(preset.base).identity()
                bases[preset.base] = identity.architecture, identity.values
            seconds = arm.seconds or study.seconds
            told = [preset.model_dump(mode="json"), study.evaluation.model_dump(), seconds, bases[preset.base]]
            mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
            order = {"preset": preset, "evaluation": study.evaluation, "seconds": seconds}
            name = f"{slugify(arm.name)}--{seed}"
            jobs.append(MotionJob(name, "training", {"arm": arm.name, "seed": seed}, mark, folder, order=order))
    return jobs


# -- the table ---------------------------------------------------------------------------------------------------

#: figure -> (heading, digits, whether more is better)
COLUMNS = {
    "picture_gain": ("picture to clip, dB over copying", "+.2f", True),
    "between_gain": ("interpolation, dB over blending", "+.2f", True),
    "picture_motion": ("motion right, picture", ".2f", True),
    "between_motion": ("motion right, interpolation", ".2f", True),
    "text_motion": ("motion right, text", ".2f", True),
    "s_fvd": ("S-FVD", ".2f", False),
    "s_fvd_floor": ("S-FVD of true renderings", ".2f", False),
    "validation_loss": ("validation loss", ".4f", False),
}
#: two-sided 95 % points of Student's t by degrees of freedom; beyond, the normal's
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def publish_motions(study: MotionStudy, name: str, jobs: Sequence[Job], out: Path, command: str) -> dict[str, Any]:
    """Writes `results.json` and `results.md` from whatever results there are, and returns the former's content."""
    results = [result for result in (job.result() for job in jobs) if result is not None]
    content = {
        "format": 1,
        "study": name,
        "description": study.description,
        "command": command,
        "date": date.today().isoformat(),
        "complete": len(results) == len(jobs),
        "jobs": len(jobs),
        "settings": study.model_dump(mode="json"),
        "results": results,
    }
    write_atomically(out / "results.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "results.md", page(study, content))
    return content


def page(study: MotionStudy, content: dict[str, Any]) -> str:
    results = content["results"]
    there = [key for key in COLUMNS if any(key in result["card"]["figures"] for result in results)]
    lines = [
        f"# {content['study']}",
        "",
        study.description,
        "",
        f"`{content['command']}`, {content['date']}; {len(results)} of {content['jobs']} trainings. Mean over seeds "
        "+- half of the 95 % interval (Student's t); no interval for one seed.",
        "",
        _row(["arm", "seeds", "steps", "CPU seconds", *(COLUMNS[key][0] for key in there)]),
        _row(["---"] * (len(there) + 4)),
    ]
    for arm in study.arms:
        own = [result for result in results if result["arm"] == arm.name]
        if own:
            cost = [_mean([r["card"]["training"].get(key) for r in own], ",.0f") for key in ("step", "seconds")]
            cells = [_mean([r["card"]["figures"].get(key) for r in own], COLUMNS[key][1]) for key in there]
            lines.append(_row([arm.name, str(len(own)), *cost, *cells]))
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None], digits: str) -> str:
    found = [float(value) for value in values if value is not None]
    if not found:
        return ""
    mean = format(statistics.mean(found), digits)
    if len(found) < 2:
        return mean
    half = STUDENT.get(len(found) - 1, 1.96) * statistics.stdev(found) / math.sqrt(len(found))
    return f"{mean} +- {format(half, digits.lstrip('+'))}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
