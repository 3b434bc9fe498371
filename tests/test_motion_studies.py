"""Studies of clip bases: arms and seeds become trainings that stop and go on, and a table with intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from studio.comparing import motion_arm
from studio.comparing.motions import MotionStudy, motion_jobs, page
from studio.comparing.schedule import alone_in, run_jobs
from studio.comparing.study import read_study, study_files
from studio.data import stickers
from studio.errors import PresetError
from studio.evaluate.motion_distance import frechet

needs_font = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")
CONTENT = {
    "preset": "",
    "arms": [{"name": "whole"}, {"name": "by time", "seconds": 0.001, "settings": {"method.train": "temporal"}}],
    "seeds": [0],
    "evaluation": {"clips": 2, "distance_clips": 2, "steps": 1},
}


def study_of(folder, base):
    preset = {
        "description": "pico",
        "base": str(base),
        "method": {"kind": "rdtf"},
        "data": {"source": "motions", "resolution": 16, "frames": 8, "pool": 4},
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "validate_every": 3,
    }
    (folder / "pico.yaml").write_text(json.dumps(preset))
    (folder / "study.yaml").write_text(yaml.safe_dump({**CONTENT, "preset": str(folder / "pico.yaml")}))
    return read_study(str(folder / "study.yaml"))[1]


@needs_font
def test_a_study_trains_its_arms_for_steps_or_a_time_and_tables_them(tmp_path, tiny_base_folder):
    study = study_of(tmp_path, tiny_base_folder)
    jobs = motion_jobs(study, tmp_path / "work")
    with alone_in(tmp_path / "work") as lock:
        outcomes = {o.job.name: o for o in run_jobs(jobs, 2, tmp_path / "home", lock)}
    assert all(outcome.result for outcome in outcomes.values()), [o.error for o in outcomes.values()]
    whole, timed = (job.result()["card"] for job in jobs)
    assert (whole["training"]["step"], timed["training"]["step"]) == (3, 0)
    assert whole["training"]["num_trainable_params"] > timed["training"]["num_trainable_params"]
    assert {"picture_gain", "between_gain", "text_motion", "s_fvd", "s_fvd_floor"} <= set(whole["figures"])
    content = {"study": "s", "command": "c", "date": "d", "jobs": 2, "results": [job.result() for job in jobs]}
    assert "| by time | 1 | 0 |" in page(study, content)
    assert [job.result() for job in motion_jobs(study, tmp_path / "work")] == [job.result() for job in jobs]
    # To be measured again, a finished arm is not trained again.
    assert motion_arm.train("no preset is read", jobs[0].run_folder, 0) == jobs[0].run_folder / "base"


@needs_font
def test_an_arm_that_was_stopped_goes_on(tmp_path, tiny_base_folder):
    study_of(tmp_path, tiny_base_folder)
    run = tmp_path / "run"
    motion_arm.train(str(tmp_path / "pico.yaml"), run, 1e-6)
    assert json.loads((run / "spent.json").read_text())["step"] == 0
    (run / "spent.json").write_text(json.dumps({"seconds": 5.0, "step": 0, "done": False}))
    assert motion_arm.train(str(tmp_path / "pico.yaml"), run, 0).parent.name == "step-3"
    spent = json.loads((run / "spent.json").read_text())
    assert spent["done"]
    assert spent["seconds"] > 5


def test_intervals_are_students_over_seeds():
    study = MotionStudy.model_validate({"arms": [{"name": "a"}]})
    cards = [{"figures": {"picture_gain": value}, "training": {"step": 4, "seconds": 2.0}} for value in (1.0, 2.0, 3.0)]
    results = [{"arm": "a", "seed": i, "card": card} for i, card in enumerate(cards)]
    content = {"study": "s", "command": "c", "date": "d", "jobs": 3, "results": results}
    assert "| a | 3 | 4 +- 0 | 2 +- 0 | +2.00 +- 2.48 |" in page(study, content)  # 4.30 / sqrt(3)


def test_frechet_distance_is_the_formula_for_normal_distributions():
    rng = np.random.default_rng(0)
    one = torch.from_numpy(rng.normal(size=(40_000, 3)) @ np.diag([1.0, 2.0, 0.5]))
    other = torch.from_numpy(rng.normal(size=(40_000, 3)) @ np.diag([3.0, 2.0, 0.5]) + [0.0, 1.0, 0.0])
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet(one, other) == pytest.approx((3 - 1) ** 2 + 1, rel=0.05)
    assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-6)


@pytest.mark.parametrize("name", ["motions", "motions-screening"])
def test_the_studies_of_clip_bases_resolve(name, tmp_path):
    study = read_study(name)[1]
    jobs = motion_jobs(study, tmp_path)
    assert len(jobs) == len(study.arms) * len(study.seeds)
    assert len({job.fingerprint for job in jobs}) == len(jobs)
    assert jobs[0].order["preset"].method.curriculum == "adaptive"
    assert Path(study_files()[name]).is_file()


def test_a_study_with_a_wrong_arm_is_refused(tmp_path):
    for content, word in (({"arms": [{"name": "a", "setting": {}}]}, "arms"), ({"arms": []}, "arms")):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(PresetError, match=word):
            read_study(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text(
        yaml.safe_dump({"arms": [{"name": "a", "settings": {"method.curriculm": "none"}}]})
    )
    with pytest.raises(PresetError, match="curriculm"):
        motion_jobs(read_study(str(tmp_path / "bad.yaml"))[1], tmp_path)
