"""Presets: strict, typed, changed by --set, with the nearest key in every refusal."""

import pytest

from studio.errors import PresetError
from studio.preset import Preset, apply_settings, make_preset, parse_setting, preset_files, read_preset
from studio.training import Order, resolve

MINIMAL = {"method": {"kind": "lora"}}


@pytest.mark.parametrize("name", preset_files())
def test_every_preset_is_valid_and_says_what_it_is_for(name):
    preset = make_preset(read_preset(name))
    assert preset.description
    assert preset_files()[name].read_text().startswith("#")


@pytest.mark.parametrize("name", preset_files())
def test_a_resolved_preset_is_a_preset_again(name, tmp_path):
    preset = make_preset(read_preset(name))
    (tmp_path / "again.yaml").write_text(preset.to_yaml())
    assert make_preset(read_preset(str(tmp_path / "again.yaml"))) == preset


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ({**MINIMAL, "learning_rat": 1}, "learning_rat", "learning_rate"),
        ({"method": {"kind": "lora", "rnk": 3}}, "method.rnk", "rank"),
        ({**MINIMAL, "data": {"resolutoin": 64}}, "data.resolutoin", "resolution"),
        ({**MINIMAL, "data": {"prior": {"weigth": 1}}}, "data.prior.weigth", "weight"),
        ({"method": {"kind": "lroa"}}, "lroa", "lora"),
        ({**MINIMAL, "steps": "many"}, "steps", ""),
        ({**MINIMAL, "steps": 0}, "steps", ""),
        ({**MINIMAL, "lr_schedule": "cosin"}, "lr_schedule", ""),
        ({"steps": 3}, "method", ""),
    ],
)
def test_a_wrong_preset_is_refused_naming_the_fault_and_the_nearest_key(content, message, hint):
    with pytest.raises(PresetError) as caught:
        make_preset(content)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_set_reaches_every_depth_and_reads_yaml():
    settings = [
        "method.rank=4",
        "data.prior.pictures=2",
        "sample_prompts=[a, b]",
        "learning_rate=1e-3",
        "data.path=x=y",
    ]
    preset = make_preset(apply_settings(MINIMAL, map(parse_setting, settings)))
    assert preset.method.rank == 4
    assert preset.data.prior.pictures == 2
    assert preset.sample_prompts == ("a", "b")
    assert preset.learning_rate == 1e-3
    assert preset.data.path == "x=y"


@pytest.mark.parametrize("setting", ["steps", "=3", "steps.sub=1", "method.rank=big", "data.resolution=[1]"])
def test_a_wrong_setting_is_refused(setting):
    with pytest.raises(PresetError):
        make_preset(apply_settings({"steps": 5, **MINIMAL}, [parse_setting(setting)]))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(PresetError) as caught:
        read_preset("base-stiker")
    assert "base-sticker" in caught.value.hint


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_preset_is_refused(text, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(PresetError):
        read_preset(str(path))


def test_method_replaces_kind_and_learning_rate_and_keeps_the_layers():
    preset, changes = resolve(Order("subject", method="lora"))
    assert preset.method.kind == "lora"
    assert preset.method.target_modules == make_preset(read_preset("subject")).method.target_modules
    assert any(line.startswith("method: orthogonal -> lora") for line in changes)


@pytest.mark.parametrize("name", [name for name in preset_files() if make_preset(read_preset(name)).other_bases])
def test_what_a_preset_changes_for_other_bases_is_taken_with_another_base_and_only_then(name):
    original = make_preset(read_preset(name))
    own, _ = resolve(Order(name))
    other, changes = resolve(Order(name, base="sdxl", settings=["steps=7"]))
    assert own.batch_size == original.batch_size
    assert other.batch_size == original.other_bases["batch_size"]
    changed = [key for key in ("batch_size", "learning_rate") if original.other_bases[key] != getattr(original, key)]
    assert any(line.startswith(f"{changed[0]}: ") for line in changes)
    assert other.steps == 7  # what was asked for counts more
    assert own.other_bases == other.other_bases == own.learning_rates == other.learning_rates == {}


def test_a_preset_may_start_from_another(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{extends: subject, steps: 7, method: {kind: dora}}")
    mine, subject = make_preset(read_preset(str(file))), make_preset(read_preset("subject"))
    assert (mine.steps, mine.method.kind) == (7, "dora")
    assert mine.data == subject.data
    file.write_text("{extends: subjct, steps: 7}")
    with pytest.raises(PresetError) as caught:
        read_preset(str(file))
    assert "subject" in caught.value.hint


def test_another_method_takes_the_rate_that_the_preset_has_for_it_on_its_own_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{method: {kind: lora}, learning_rate: 1.0, learning_rates: {dora: 0.5}, other_bases: {steps: 3}}")
    assert resolve(Order(str(file), method="dora"))[0].learning_rate == 0.5
    assert resolve(Order(str(file), method="dora", base="sdxl"))[0].learning_rate is None
    assert resolve(Order(str(file), method="flora"))[0].learning_rate is None
    assert resolve(Order(str(file)))[0].learning_rate == 1.0


def test_learning_rate_warms_up_and_falls():
    preset = Preset(method={"kind": "lora"}, steps=100, warmup_steps=10, lr_schedule="cosine", learning_rate=1.0)
    rates = [preset.learning_rate_at(step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == 1.0 == rates[10]
    assert rates[99] < 0.001
