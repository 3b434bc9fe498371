"""Studies: that a cell is what its file says, that work is never done twice or lost, and that tables add up."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from studio.comparing.bare_base import zero_smallest
from studio.comparing.jobs import Job, cell_preset, flat, make_jobs
from studio.comparing.lessons import Lesson, make_lesson
from studio.comparing.plots import HEIGHT, LEFT, WIDTH, Axis, Point, _Frame, scatter
from studio.comparing.publish import publish
from studio.comparing.schedule import alone_in, run_jobs, seconds_left
from studio.comparing.study import Study, read_study, study_files
from studio.comparing.table import Summary, paired_difference, summary, tables
from studio.comparing.together import two_in_one
from studio.data.stickers import font_path
from studio.errors import PresetError, RequestError

ROOT = Path(__file__).parent.parent
needs_font = pytest.mark.skipif(font_path() is None, reason="the emoji font (fonts-noto-color-emoji) is not installed")


def a_study(**changes):
    cells = [{"name": "lora", "method": {"kind": "lora"}}, {"name": "b", "method": {"kind": "orthogonal", "rank": 4}}]
    content = {"preset": "subject-lora", "subjects": {"hedgehog": "hamster"}, "cells": cells, **changes}
    return Study.model_validate(content)


def a_lesson(index=0):
    return Lesson("hedgehog", index, "subject", Path("p"), Path("r"), "zovuki", "sticker-subject", "a {trigger}")


# -- studies and cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in study_files() if isinstance(read_study(name)[1], Study)])
def test_every_cell_of_every_study_is_a_preset(name):
    _, study = read_study(name)
    assert study.description
    assert study_files()[name].read_text().startswith("#")
    for cell in study.cells:
        preset = cell_preset(study, cell, a_lesson(2), seed=1)
        assert (preset.seed, preset.data.trigger, preset.method.kind) == (1, "zovuki", cell.method["kind"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cels": []}, ["cels", "cells"]),
        ({"cells": [{"name": "a", "method": {"kind": "lora"}}] * 2}, ["two cells", "'a'"]),
        ({"cells": [{"name": "a", "method": {"kind": "lora"}, "lessons": ["hedgehg"]}]}, ["hedgehg", "hedgehog"]),
        ({"sums": [{"cells": ["lor"], "lessons": ["hedgehog"], "sizes": [1]}]}, ["lor", "lora"]),
        ({"sums": [{"cells": ["lora"], "lessons": ["hedgehog"]}]}, ["8 concepts"]),
        ({"styles": {"x": {"kind": "tint", "colour": "purpel"}}}, ["purpel", "purple"]),
        ({"subjects": {}}, ["nothing to learn"]),
    ],
)
def test_a_wrong_study_is_refused_naming_the_fault(tmp_path, changes, words):
    cells = [{"name": "lora", "method": {"kind": "lora"}}]
    content = {"preset": "subject-lora", "subjects": {"hedgehog": "hamster"}, "cells": cells, **changes}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(PresetError) as caught:
        read_study(str(tmp_path / "s.yaml"))
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"


def test_a_wrong_cell_is_named_before_anything_is_trained():
    study = a_study(cells=[{"name": "odd one", "method": {"kind": "lora", "rnk": 4}}])
    with pytest.raises(PresetError, match=r"odd one.*rnk"):
        cell_preset(study, study.cells[0], a_lesson(), 0)


def test_a_cell_changes_the_studys_settings_and_those_the_presets():
    cell = {"name": "a", "method": {"kind": "lora", "rank": 2, "rank_pattern": {"*to_q": 3}}, "settings": {"steps": 7}}
    study = a_study(settings={"steps": 5, "batch_size": 3, "data": {"flip": True}}, cells=[cell])
    preset = cell_preset(study, study.cells[0], a_lesson(), 4)
    assert (preset.steps, preset.batch_size, preset.data.flip, preset.seed) == (7, 3, True, 4)
    assert (preset.method.rank, preset.method.rank_pattern) == (2, {"*to_q": 3})
    assert flat({"a": {"b": 1}, "c": "x"}) == ("a.b=1", 'c="x"')


def test_a_lessons_place_in_the_study_fills_slots_and_supports():
    method = {"kind": "orthogonal", "basis": "slots", "slot": "{index}"}
    study = a_study(cells=[{"name": "a", "method": method}])
    assert cell_preset(study, study.cells[0], a_lesson(3), 0).method.slot == 3
    study = a_study(cells=[{"name": "a", "method": {"kind": "sara", "support": ["{number}", 8, 0]}}])
    assert cell_preset(study, study.cells[0], a_lesson(3), 0).method.support == (4, 8, 0)


# -- lessons ---------------------------------------------------------------------------------------------------


@needs_font
def test_lessons_are_the_same_pictures_every_time_and_references_show_the_same_thing(tmp_path):
    from studio.evaluate.card import read_references
    from studio.evaluate.judge import bundled_judge
    from studio.evaluate.protocol import read_protocol
    from studio.evaluate.similarity import similarity

    study = a_study(subjects={"hedgehog": "hamster", "banjo": "guitar"}, styles={"ink": {"kind": "outline"}})
    first, again = (make_lesson(study, "hedgehog", tmp_path / place) for place in ("one", "two"))
    for folder in ("pictures", "references"):
        names = sorted(path.name for path in getattr(first, folder).iterdir())
        assert names
        for name in names:
            assert (getattr(first, folder) / name).read_bytes() == (getattr(again, folder) / name).read_bytes()
    assert {path.name for path in first.references.iterdir()} == {f"{i}.png" for i in range(8)} | {
        f"{i}.txt" for i in range(8)
    }
    protocol, judge = read_protocol("sticker-subject"), bundled_judge()
    other = make_lesson(study, "banjo", tmp_path / "one")

    def seen(folder):
        return judge.judge(read_references(folder, protocol)).features

    assert similarity(seen(first.pictures), seen(first.references)) > 0.8
    assert similarity(seen(first.pictures), seen(other.references)) < 0.4
    style = make_lesson(study, "ink", tmp_path / "one")
    paired = read_protocol(style.protocol)
    assert paired.pairs
    assert len(read_references(style.references, paired)) == len(paired.settings)
    with pytest.raises(PresetError, match="hedgehok") as caught:
        make_lesson(a_study(subjects={"hedgehok": ""}), "hedgehok", tmp_path)
    assert "hedgehog" in caught.value.hint


# -- the base alone --------------------------------------------------------------------------------------------


def test_zeroing_takes_the_smallest_weights_of_all_layers_and_no_others():
    from studio.bases.stable_diffusion import StableDiffusion

    base = StableDiffusion.tiny()
    before = torch.cat([p.detach().flatten().clone() for p in base.denoiser.parameters()])
    already = int((before == 0).sum())
    threshold = zero_smallest(base, 0.3)
    after = torch.cat([p.detach().flatten() for p in base.denoiser.parameters()])
    gone = (after == 0) & (before != 0)
    assert abs(int(gone.sum()) + already - 0.3 * len(before)) <= 1
    assert float(before[gone].abs().max()) == pytest.approx(threshold)
    assert float(before[~gone & (before != 0)].abs().min()) > threshold
    assert torch.equal(after[~gone], before[~gone])


# -- doing the work --------------------------------------------------------------------------------------------


@dataclass
class Program(Job):
    """A job that is one line of Python; OUT in it is the path of the card."""

    line: str = ""

    def commands(self):
        self.card_path.parent.mkdir(parents=True, exist_ok=True)
        program = f"import os, sys, time\nOUT = {str(self.card_path)!r}\n{self.line}"
        return [[sys.executable, "-S", "-c", program]]


WRITES = "open(OUT, 'w').write('{\"figures\": {}}')"


def program(folder, name, line=WRITES, needs=(), mark="1"):
    return Program(name, "training", {}, mark, folder, tuple(needs), line=line)


def work(folder, jobs, at_once=1, stop=lambda: False):
    with alone_in(folder) as lock:
        return {o.job.name: o for o in run_jobs(jobs, at_once, folder / "home", lock, stop)}


def test_what_has_a_result_is_not_done_again_and_a_torn_or_foreign_one_is(tmp_path):
    counted = WRITES + "; open(OUT + '.count', 'a').write('x')"
    jobs = [program(tmp_path, name, counted) for name in ("a", "b", "c")]
    assert set(work(tmp_path, jobs)) == {"a", "b", "c"}
    assert work(tmp_path, jobs) == {}
    whole = jobs[1].result_path.read_text()
    jobs[1].result_path.write_text(whole[: len(whole) // 2])  # as a full disk tears it
    jobs[2] = program(tmp_path, "c", counted, mark="2")  # its settings have changed
    assert set(work(tmp_path, jobs)) == {"b", "c"}
    counts = [Path(f"{job.card_path}.count").read_text() for job in jobs]
    assert counts == ["x", "xx", "xx"]


def test_a_failed_job_is_told_with_its_error_and_what_needs_it_fails_too(tmp_path):
    bad = "sys.stderr.write('error: no such thing\\n'); sys.exit(2)"
    jobs = [program(tmp_path, "bad", bad), program(tmp_path, "after", needs=["bad"]), program(tmp_path, "fine")]
    outcomes = work(tmp_path, jobs)
    assert "no such thing" in outcomes["bad"].error
    assert "exit 2" in outcomes["bad"].error
    assert outcomes["after"].result is None
    assert "needs" in outcomes["after"].error
    assert outcomes["fine"].result is not None


def test_needs_come_first_and_no_more_than_asked_run_at_once(tmp_path):
    lines = "open(OUT + '.log', 'w').write(f'{time.time()} ')\ntime.sleep(0.4)\n" + WRITES
    lines += "\nopen(OUT + '.log', 'a').write(f'{time.time()} ' + os.environ.get('OMP_NUM_THREADS', ''))"
    jobs = [program(tmp_path, name, lines) for name in "abc"]
    jobs.insert(0, program(tmp_path, "last", lines, needs=["a", "b", "c"]))
    work(tmp_path, jobs, at_once=2)
    told = {job.name: Path(f"{job.card_path}.log").read_text().split() for job in jobs}
    spans = {name: (float(parts[0]), float(parts[1])) for name, parts in told.items()}
    assert spans["last"][0] >= max(spans[name][1] for name in "abc")
    moments = [begin for begin, _ in spans.values()]
    assert max(sum(b <= t < e for b, e in spans.values()) for t in moments) == 2
    assert all(parts[2] == "1" for parts in told.values())  # one thread each


def test_stopping_asks_the_running_ones_to_end_and_starts_no_more(tmp_path):
    catches = "import signal\nsignal.signal(15, lambda *_: (open(OUT + '.asked', 'w').close(), sys.exit(143)))\n"
    slow = program(tmp_path, "slow", catches + "open(OUT + '.up', 'w').close()\ntime.sleep(60)")
    jobs, up = [slow, program(tmp_path, "never")], Path(f"{slow.card_path}.up")
    began = time.monotonic()
    assert work(tmp_path, jobs, stop=up.exists) == {}
    assert time.monotonic() - began < 20
    assert Path(f"{slow.card_path}.asked").exists()
    assert jobs[1].result() is None


def test_two_comparisons_do_not_work_in_one_folder(tmp_path):
    with alone_in(tmp_path), pytest.raises(RequestError, match="another comparison"), alone_in(tmp_path):
        pass


def test_a_folder_stays_locked_while_a_killed_comparisons_children_work(tmp_path):
    worker = (
        "import sys, os\nfrom pathlib import Path\nimport tests.test_comparing as t\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "job = t.program(folder, 'a', \"open(OUT + '.up', 'w').close(); time.sleep(4); \" + t.WRITES)\n"
        "t.work(folder, [job], stop=lambda: Path(f'{job.card_path}.up').exists() and os.kill(os.getpid(), 9))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", worker], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    with pytest.raises(RequestError, match="another comparison"), alone_in(tmp_path):
        pass
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with alone_in(tmp_path):
                break
        except RequestError:
            time.sleep(0.3)
    assert program(tmp_path, "a").card_path.exists()


def test_the_time_left_is_reckoned_from_what_is_done(tmp_path):
    jobs = [program(tmp_path, name) for name in "abcd"]
    assert seconds_left(jobs, 1) is None
    for job in jobs[:2]:
        job.card_path.parent.mkdir(parents=True)
        job.card_path.write_text("{}")
        job.store(30.0)
    assert seconds_left(jobs, 1) == 60
    assert seconds_left(jobs, 2) == 30


# -- the whole way, on a pico base -----------------------------------------------------------------------------


@pytest.fixture
def pico_study(tmp_path, pictures, tiny_base_folder):
    protocol = {"settings": [{"prompt": "a {trigger}"}], "unrelated": ["a dog"], "repeated": "{trigger}", "repeats": 2}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(protocol))
    folder = {"pictures": str(pictures), "references": str(pictures)}
    settings = {"base": str(tiny_base_folder), "steps": 2, "batch_size": 2, "checkpoint_every": 1}
    content = {
        "description": "A pico study",
        "preset": "subject-lora",
        "settings": settings,
        "folders": {"blob": folder},
        "seeds": [0],
        "cells": [{"name": "lora r2", "method": {"kind": "lora", "rank": 2}}],
        "evaluation": {"steps": 1, "protocol": str(tmp_path / "p.yaml"), "metrics": ["palette"]},
    }
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_study_is_trained_measured_and_published_and_a_lost_result_costs_no_training(
    pico_study, tmp_path, capsys, home
):
    from studio.cli import run

    command = ["compare", str(pico_study), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert run([*command, "--list"]) == 0
    assert "1 jobs, 0 done" in capsys.readouterr().out
    assert run(command) == 0, capsys.readouterr().err
    told = capsys.readouterr().err
    assert "1 of kind training" in told
    assert "left" in told
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| lora r2 |" in page
    assert "*base alone*" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"results.json", "quality-drift-subjects.png"}
    written = (tmp_path / "out" / "results.json").read_text()
    assert str(tmp_path / "work") not in written  # no folders of this machine in what is published
    results = json.loads(written)
    assert results["complete"]
    assert not (home / "library").exists()  # the user's own library and ledger stay as they are
    _, study = read_study(str(pico_study))
    (job,) = make_jobs(study, tmp_path / "work" / "pico")
    adapter = (job.run_folder / "adapter.safetensors").stat().st_mtime_ns
    job.result_path.write_text("{")
    assert run(command) == 0
    assert (job.run_folder / "adapter.safetensors").stat().st_mtime_ns == adapter
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["results"][0]["card"]["figures"] == results["results"][0]["card"]["figures"]


def test_what_a_result_depends_on_changes_its_fingerprint_and_where_it_lies_does_not(pico_study, tmp_path):
    def mark(folder="work", **changes):
        content = yaml.safe_load(pico_study.read_text())
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content | changes))
        return make_jobs(read_study(str(tmp_path / "x.yaml"))[1], tmp_path / folder)[0].fingerprint

    own, settings = mark(), yaml.safe_load(pico_study.read_text())["settings"]
    assert mark("elsewhere") == own
    assert mark(description="other words") == own
    assert mark(settings={**settings, "steps": 3}) != own
    assert mark(evaluation={"steps": 2, "metrics": ["palette"]}) != own
    (tmp_path / "pictures" / "0.txt").write_text("another caption")
    assert mark() != own


def test_sums_wear_the_others_beside_and_come_after_their_trainings(pico_study, pictures, tmp_path):
    content = yaml.safe_load(pico_study.read_text())
    own = content["folders"]["blob"]
    content["folders"] = {"blob": own, "other": own}
    content |= {"taught": ["blob"], "sums": [{"cells": ["lora r2"], "lessons": ["blob", "other"], "sizes": [2]}]}
    content["sums"][0]["weights"] = [0.6]
    pico_study.write_text(yaml.safe_dump(content))
    jobs = {job.name: job for job in make_jobs(read_study(str(pico_study))[1], tmp_path / "work")}
    trainings = ["lora-r2--blob--0", "lora-r2--other--0"]  # the second only for the sum
    assert list(jobs) == [*trainings, "sum2-0_6--lora-r2--blob--0", "sum2-0_6--lora-r2--other--0"]
    summed = jobs["sum2-0_6--lora-r2--other--0"]
    assert summed.needs == tuple(trainings)
    (command,) = summed.commands()
    assert f"{jobs[trainings[1]].run_folder}:0.6" in command
    assert command[command.index("--beside") + 1] == f"{jobs[trainings[0]].run_folder}:0.6"


MERGES = {"cells": ["lora r2"], "lessons": ["blob", "other"], "sizes": [2], "seeds": [0], "ways": [{"strategy": "sum"}]}


def merge_study(path, **changes):
    content = yaml.safe_load(path.read_text())
    own = content["folders"]["blob"]
    content["folders"] = {"blob": own, "other": own}
    path.write_text(yaml.safe_dump(content | {"taught": [], "merges": [MERGES | changes]}))
    return read_study(str(path))[1]


def test_concepts_of_merges_are_only_taught_and_come_before_what_is_made_of_them(pico_study, tmp_path):
    jobs = {job.name: job for job in make_jobs(merge_study(pico_study, pairs=1), tmp_path / "work")}
    taught = ["lora-r2--blob--0", "lora-r2--other--0"]
    assert list(jobs) == [*taught, "alone--lora-r2--0", "concepts2--lora-r2--0", "pairs2--lora-r2--0"]
    assert [job.kind for job in jobs.values()] == ["taught", "taught", "concepts", "concepts", "pairs"]
    assert all(jobs[name].needs == tuple(taught) for name in list(jobs)[2:])
    assert all("evaluate" not in command for name in taught for command in jobs[name].commands())
    marks = {name: job.fingerprint for name, job in jobs.items()}
    other_way = merge_study(pico_study, pairs=1, ways=[{"strategy": "sum", "weight": 0.6}])
    moved = {job.name: job.fingerprint for job in make_jobs(other_way, tmp_path / "elsewhere")}
    assert {name for name in marks if marks[name] != moved[name]} == {"concepts2--lora-r2--0", "pairs2--lora-r2--0"}


@pytest.mark.parametrize(
    ("ways", "words"),
    [
        ([{"strategy": "summ"}], ["summ", "sum"]),
        ([{"strategy": "ties", "options": {"densty": 0.2}}], ["densty", "density"]),
        ([{"strategy": "sum"}, {"strategy": "sum", "weight": 0.5}], ["one name"]),
    ],
)
def test_a_wrong_way_to_merge_is_refused_naming_the_fault(pico_study, ways, words):
    with pytest.raises(PresetError) as caught:
        merge_study(pico_study, ways=ways)
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"


@needs_font
def test_concepts_are_measured_alone_merged_and_in_one_picture(pico_study, tmp_path, home):
    """Adapters that have learned next to nothing: all ways draw the same, and none moves the base."""
    from studio.cli import run
    from studio.comparing.together import main

    settings = yaml.safe_load(pico_study.read_text())["settings"] | {"steps": 1, "learning_rate": 1e-20}
    study = merge_study(pico_study, pairs=1, pictures=1, scenes=2).model_copy(update={"settings": settings})
    jobs = {job.name: job for job in make_jobs(study, tmp_path / "work")}
    for job in (job for job in jobs.values() if job.kind == "taught"):
        (command,) = job.commands()
        assert run(command[3:]) == 0
        assert job.store(1.0)["card"]["training"]["steps"] == 1
    for name in list(jobs)[2:]:
        (command,) = jobs[name].commands()
        assert main(command[3:]) == 0
        stored = jobs[name].store(1.0)
        assert jobs[name].result() == stored
        assert jobs[name].card_path.with_name("grid.png").exists()
    alone = jobs["alone--lora-r2--0"].result()["card"]["ways"]["alone"]
    fused = jobs["concepts2--lora-r2--0"].result()["card"]["ways"]["sum"]
    assert (alone["loss_rise"], fused["loss_rise"]) == pytest.approx((0, 0), abs=1e-6)
    assert fused["similarity"] == pytest.approx(alone["similarity"], abs=1e-4)
    paired = jobs["pairs2--lora-r2--0"].result()["card"]["ways"]
    assert set(paired) == {"sum", "regions"}
    made = {table.title: table for table in tables(study, [job.result() for job in list(jobs.values())[2:]])}
    assert [row[0] for row in made["Concepts merged: lora r2"].rows] == ["alone", "sum"]
    assert [row[1] for row in made["Two concepts in one picture"].rows] == ["sum", "regions"]
    content = publish(study, "pico", list(jobs.values()), tmp_path / "out", "x")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"concepts2--lora-r2--0.png", "merged-lora-r2.png"}
    assert str(tmp_path) not in json.dumps(content["results"])


def test_rates_of_two_in_one_picture():
    """(half, concept) cosines: both in place; swapped; one of them alone, everywhere; nobody."""
    pictures = [[[0.9, 0], [0, 0.9]], [[0, 0.9], [0.9, 0]], [[0.9, 0], [0.9, 0]], [[0, 0], [0, 0]]]
    rates = two_in_one(torch.tensor(pictures))
    assert rates["in_place"] == pytest.approx(3 / 8)
    assert rates["both_in_place"] == pytest.approx(1 / 4)
    assert rates["swapped"] == pytest.approx(3 / 8)
    assert rates["missing"] == pytest.approx(3 / 8)


# -- tables and plots ------------------------------------------------------------------------------------------


def result(cell, lesson, seed, similarity, kind="training", **facts):
    figures = {"judge_similarity": similarity, "judge_similarity_base": 0.2, "judge_similarity_references": 0.9}
    card = {"figures": {**figures, "drift": 0.1}, "training": {"num_trainable_params": 1000}, "base": "sticker"}
    told = {"job": f"{cell}{lesson}{seed}", "kind": kind, "cell": cell, "lesson": lesson, "seed": seed}
    return {**told, "lesson_kind": "subject", "card": card, **facts}


def test_mean_and_spread_are_over_seeds_and_lessons_and_differences_are_paired():
    assert summary([1.0, 3.0]) == Summary(2.0, 2**0.5, 2)
    assert summary([]) is None
    easy, hard = [("x", 0, 0.5), ("y", 0, 0.1)], [("x", 0, 0.6), ("y", 0, 0.2)]
    own = [result("b", *row) for row in hard]
    paired = paired_difference(own, [result("a", *row) for row in easy], "judge_similarity")
    assert paired.mean == pytest.approx(0.1)
    assert paired.spread == pytest.approx(0, abs=1e-9)  # lessons differ by 0.4, methods by 0.1 on each


def test_tables_hold_floors_ceilings_and_every_cell_but_no_trainings_made_for_sums():
    study = a_study(subjects={"x": "", "y": "", "z": ""}, taught=["x", "y"])
    rows = [("lora", "x", 0, 0.5), ("lora", "y", 0, 0.7), ("b", "x", 0, 0.6), ("b", "y", 0, 0.8), ("b", "z", 0, 0.0)]
    summed = result("b", "x", 0, 0.3, kind="sum", concepts=2, weight=1.0)
    made = {t.title.split()[0]: t for t in tables(study, [*(result(*row) for row in rows), summed])}
    cells = {row[0]: row for row in made["Subjects"].rows}
    column = made["Subjects"].head.index("similarity")
    assert cells["*base alone*"][column] == "0.200"
    assert cells["*references*"][column] == "0.900"
    assert cells["lora"][column] == "0.600 ± 0.141"
    assert cells["b"][column] == "0.700 ± 0.141"
    assert cells["b"][-2].startswith("+0.100")
    assert cells["b"][-1] == "2"
    assert made["Concepts"].rows == [["b", "0.600", "0.300"]]
    assert made["Similarity"].rows[0] == ["lora", "0.500", "0.700", ""]
    lines = made["Subjects"].markdown().splitlines()
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:] if line)


def test_a_plot_has_each_point_where_its_values_are():
    points = [
        Point("low", Summary(100, 0, 1), Summary(0.2, 0.05, 3)),
        Point("high", Summary(1e6, 0, 1), Summary(0.8, 0, 1)),
    ]
    drawn = scatter("t", Axis("parameters", logarithmic=True), Axis("similarity"), points, {"floor": 0.1})
    assert drawn.size == (WIDTH, HEIGHT)
    from studio.comparing.plots import COLOURS, LEGEND

    plot = np.asarray(drawn.crop((LEFT, 0, WIDTH - LEGEND + 8, HEIGHT))).astype(int)

    def centre(colour):
        y, x = np.nonzero((abs(plot - colour) < 8).all(-1))
        return x.mean(), y.mean()

    low, high = centre(COLOURS[0]), centre(COLOURS[1])
    assert low[0] < 100
    assert high[0] > 400
    assert low[1] > high[1] + 150


def test_names_of_levels_at_one_height_stand_side_by_side():
    points = [Point("only", Summary(1, 0, 1), Summary(0.5, 0, 1))]
    frame = _Frame("t", Axis("x"), Axis("y"), points, {"one": 0.0, "the other": 0.01, "far": 1.0})
    frame.draw()
    one, other, far = frame.labels
    assert other[2] < one[0]
    assert far[2] == one[2]


# -- music -----------------------------------------------------------------------------------------------------


def test_a_study_of_music_plays_its_lessons_trains_on_two_bases_and_publishes(tmp_path):
    from studio.bases.musicgen import MusicGen
    from studio.bases.mustango import Mustango

    recipes = {}
    for base in (MusicGen, Mustango):
        name = base.__name__.lower()
        base.tiny().pipe.save_pretrained(tmp_path / name)
        recipes[name] = tmp_path / f"of-{name}.yaml"
        recipes[name].write_text(f"base: {tmp_path / name}\nmethod: {{kind: music-linear, bottleneck: 4}}\nsteps: 2\n")
    tunes = {"hicaz": {"mode": "Hicaz", "pieces": 4, "compared": 4, "seconds": 1}}
    method = {"kind": "music-linear", "bottleneck": 4}
    cells = [{"name": "linear", "method": method}]
    cells += [{"name": "mustango", "method": method, "preset": str(recipes["mustango"])}]
    content = {
        "preset": str(recipes["musicgen"]),
        "tunes": tunes,
        "cells": cells,
        "seeds": [0],
        "settings": {"data.seconds": 1},
    }
    study = Study.model_validate({**content, "evaluation": {"sounds": 2, "seconds": 1}})
    jobs = make_jobs(study, tmp_path / "work")
    assert [job.facts["lesson_kind"] for job in jobs] == ["makam", "makam"]
    again = make_jobs(study, tmp_path / "work")
    assert [job.fingerprint for job in again] == [job.fingerprint for job in jobs]  # the same pieces every time
    with alone_in(tmp_path / "work") as lock:
        outcomes = list(run_jobs(jobs, 1, tmp_path / "home", lock))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    publish(study, "tunes", jobs, tmp_path / "out", "studio compare tunes")
    page = (tmp_path / "out" / "results.md").read_text()
    assert "## Makams" in page
    assert "held-out loss" in page
    assert "mode right" in page
    assert "*musicgen alone*" in page
    assert "*mustango alone*" in page
    assert str(tmp_path / "musicgen") not in page


def test_an_unknown_mode_of_a_study_names_the_nearest():
    with pytest.raises(ValueError, match="Hicaz"):
        a_study(tunes={"h": {"mode": "Hicas"}})
