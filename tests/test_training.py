"""Training end to end on a pico base: resume to the bit, processes, faults, what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from studio import library
from studio.adapter import load_adapter
from studio.customize import AdapterTask, Example
from studio.errors import NonFiniteLoss, RequestError
from studio.inspecting import describe_adapter
from studio.method import methods
from studio.run import Run
from studio.training import Order, plan, plan_resume

ROOT = Path(__file__).parent.parent
BUSY = (  # everything that could disturb a resumed run
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "method.dropout=0.3",
    "data.flip=true",
    "data.caption_dropout=0.3",
    "data.caption=a {trigger}",
    "data.prior.pictures=3",
    "data.prior.prompts=[a dog]",
    "ema_decay=0.9",
    "lr_schedule=cosine",
    "warmup_steps=2",
    "sample_steps=2",
    "sample_every=3",
    "validate_every=2",
    "checkpoint_every=4",
    "checkpoints_kept=9",
    "learning_rate=1e-2",
)


@pytest.fixture
def recipe(tmp_path, pictures, tiny_base_folder):
    """A preset file for the pico base and the drawn pictures."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"description: test\nbase: {tiny_base_folder}\nmethod: {{kind: lora, rank: 2}}\ndata: {{path: {pictures}}}\n"
        "steps: 8\nsample_prompts: ['{trigger}']\n"
    )
    return str(path)


def train(recipe, folder, *settings, stop_after=None, **order):
    """Runs a training to its end, or asks it to stop after a step; returns its events."""
    training = plan(Order(recipe, run=folder, settings=settings, **order))
    return collect(training, stop_after)


def collect(training, stop_after=None):
    events = []
    for event in training.events(lambda: bool(events) and stop_after is not None and events[-1].step >= stop_after):
        events.append(event)
    return events


def weights(folder):
    return load_file(folder / "adapter.safetensors")


def figures(events, kind):
    """The data of one kind of event by step, without what a clock says."""
    clock = ("samples_per_second", "peak_memory_gib")
    return {e.step: {k: v for k, v in e.data.items() if k not in clock} for e in events if e.kind == kind}


@pytest.mark.parametrize("kind", ["lora", "orthogonal"])
def test_stopping_and_resuming_equals_an_uninterrupted_run_bit_for_bit(recipe, tmp_path, kind):
    settings = tuple(s for s in BUSY if kind == "lora" or "dropout=0.3" not in s or "caption" in s)
    whole = train(recipe, tmp_path / "whole", *settings, method=kind)
    first = train(recipe, tmp_path / "halves", *settings, stop_after=5, method=kind)
    assert first[-1].kind == "stopped"
    second = collect(plan_resume(tmp_path / "halves"))
    assert second[-1].kind == "finished"
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    for what in ("step", "validation"):
        assert figures(whole, what) == figures(first, what) | figures(second, what)
    for sample in (tmp_path / "whole" / "samples").iterdir():
        assert sample.read_bytes() == (tmp_path / "halves" / "samples" / sample.name).read_bytes()


def test_a_killed_run_resumes_from_its_newest_checkpoint_to_the_same_bits(recipe, tmp_path):
    train(recipe, tmp_path / "whole", *BUSY)
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom studio.training import Order, plan\n"
        f"for e in plan(Order({recipe!r}, run=Path({str(tmp_path / 'killed')!r}), settings={BUSY!r})).events():\n"
        "    if e.kind == 'step' and e.step == 6: os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-500:]
    (tmp_path / "killed" / "events.jsonl").open("a").write('{"time": 1, "st')  # as a crash tears a line
    events = collect(plan_resume(tmp_path / "killed"))
    assert events[0].kind in ("warning", "progress", "resumed")
    assert next(e for e in events if e.kind == "resumed").step == 4
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [e["step"] for e in Run(tmp_path / "killed").history() if e["kind"] == "step"]
    assert steps == list(range(1, 9))


def test_sampling_and_validating_do_not_change_what_is_learned(recipe, tmp_path):
    noisy = ("sample_every=2", "validate_every=1", "sample_steps=2", "method.dropout=0.3", "data.validation=1")
    quiet = ("sample_every=0", "validate_every=0", "method.dropout=0.3", "data.validation=1")
    train(recipe, tmp_path / "noisy", *noisy)
    train(recipe, tmp_path / "quiet", *quiet)
    one, two = weights(tmp_path / "noisy"), weights(tmp_path / "quiet")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_equal_one_with_twice_the_batch(recipe, tmp_path):
    settings = ["data.flip=true", "checkpoint_every=3", "learning_rate=1e-2", "steps=5", "sketches=0"]
    train(recipe, tmp_path / "one", "batch_size=4", *settings)
    program = tmp_path / "two.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
        "from studio.training import Order, plan\n"
        f"order = Order({recipe!r}, run=Path({str(tmp_path / 'two')!r}), settings={['batch_size=2', *settings]!r})\n"
        "for event in plan(order).events():\n    pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29731",
        str(program),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", settings=("checkpoint_every=2", "steps=20")))
    with pytest.raises(NonFiniteLoss) as caught:
        for event in training.events():
            if event.kind == "step" and event.step == 5:
                with torch.no_grad():
                    training.base.denoiser.conv_in.weight.fill_(float("nan"))
    assert "step 6" in caught.value.message
    assert ".png" in caught.value.message
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "adapter.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_finished_run_leaves_everything_the_contract_names(recipe, tmp_path):
    events = train(recipe, tmp_path / "run", "sample_every=4", "sample_steps=2", "export=[diffusers]", name="my-cat")
    folder = tmp_path / "run"
    for name in ("preset.yaml", "events.jsonl", "adapter.safetensors", "report.html", "before-after.png"):
        assert (folder / name).exists(), name
    assert (folder / "exports" / "diffusers" / "pytorch_lora_weights.safetensors").exists()
    stored = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in stored if e["kind"] in ("started", "finished")] == ["started", "finished"]
    assert all({"time", "step", "kind"} <= e.keys() for e in stored)
    assert {"loss", "lr", "grad_norm", "samples_per_second", "peak_memory_gib"} <= next(
        e for e in stored if e["kind"] == "step"
    ).keys()
    assert events[-1].data["adapter"] == str(folder / "adapter.safetensors")
    assert library.find("my-cat").read_bytes() == (folder / "adapter.safetensors").read_bytes()
    card = load_adapter(folder / "adapter.safetensors").card
    assert (card.trigger, card.data_count, card.steps) == ("mycat", 4, 8)
    assert str(tmp_path) not in card.model_dump_json()
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "kind", [kind for kind, cls in methods().items() if getattr(cls, "trainable", False) and cls.has_weight_form]
)
def test_every_method_trains_from_a_request_to_a_report(recipe, tmp_path, kind):
    events = train(recipe, tmp_path / "run", "steps=2", method=kind)
    assert events[-1].kind == "finished"
    assert kind in (tmp_path / "run" / "report.html").read_text()
    assert describe_adapter(str(tmp_path / "run" / "adapter.safetensors"))["method"] == kind


def test_the_base_is_given_back_as_it_was(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", settings=("learned_words=2", "learned_words_lr=0.01")))
    before = {k: v.clone() for k, v in training.base.denoiser.state_dict().items()}
    words = len(training.base.pipe.tokenizer)
    collect(training)
    after = training.base.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(training.base.pipe.tokenizer) == words


def test_learned_words_are_trained_and_travel_in_the_file(recipe, tmp_path):
    train(recipe, tmp_path / "run", "learned_words=2", "learned_words_lr=0.01", name="blip")
    words = load_adapter(tmp_path / "run" / "adapter.safetensors").words["text_encoder"]
    assert list(words) == ["blip"]
    assert words["blip"].shape[0] == 2
    train(recipe, tmp_path / "start", "learned_words=2", "learned_words_lr=1e-12", name="blip")
    start = load_adapter(tmp_path / "start" / "adapter.safetensors").words["text_encoder"]["blip"]
    assert not torch.allclose(words["blip"], start, atol=1e-3)


def test_the_same_data_with_another_trigger_is_another_concept(recipe, tmp_path):
    for name in ("one", "other"):
        train(recipe, tmp_path / name, "steps=1", method="orthogonal", name=name)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    name = next(n for n in one if n.endswith("down"))
    assert not torch.equal(one[name], other[name])


def test_without_a_name_the_trigger_is_fresh_and_the_same_for_the_same_data(recipe, tmp_path):
    cards = [plan(Order(recipe, run=tmp_path / str(i))).card for i in range(2)]
    assert cards[0].trigger == cards[1].trigger
    assert cards[0].trigger.isalpha()
    assert len(cards[0].trigger) == 6


def test_a_prior_of_nothing_is_left_out_and_told(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", settings=["data.prior.pictures=3"]))
    assert training.preset.data.prior.pictures == 0
    assert any("data.class_word" in line for line in training.changes)
    training = plan(Order(recipe, run=tmp_path / "run", settings=["data.prior.pictures=3", "data.class_word=dog"]))
    assert training.preset.data.prior.pictures == 3


def test_a_resumed_run_keeps_its_name(recipe, tmp_path):
    train(recipe, tmp_path / "run", stop_after=3, name="my-blip")
    assert plan_resume(tmp_path / "run").name == "my-blip"


def test_a_run_is_never_written_over(recipe, tmp_path):
    train(recipe, tmp_path / "run", "steps=1")
    with pytest.raises(RequestError, match="already holds a run"):
        plan(Order(recipe, run=tmp_path / "run"))


def test_a_changed_schedule_is_not_resumed(recipe, tmp_path):
    train(recipe, tmp_path / "run", stop_after=3)
    preset = tmp_path / "run" / "preset.yaml"
    preset.write_text(preset.read_text().replace("steps: 8", "steps: 9"))
    with pytest.raises(RequestError, match="other settings"):
        collect(plan_resume(tmp_path / "run"))


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "", "x" * 200])
def test_a_name_that_is_no_name_is_refused_and_nothing_is_written(recipe, tmp_path, home, name):
    with pytest.raises(RequestError):
        plan(Order(recipe, name=name))
    assert not home.exists()


def test_checkpoints_are_rotated(recipe, tmp_path):
    train(recipe, tmp_path / "run", "checkpoint_every=1", "checkpoints_kept=3")
    assert [p.name for p in Run(tmp_path / "run").checkpoint_folders()] == ["step-6", "step-7", "step-8"]


def test_a_damaged_checkpoint_file_is_named_when_resuming(recipe, tmp_path):
    train(recipe, tmp_path / "run", stop_after=3)
    state = Run(tmp_path / "run").newest_checkpoint() / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"state\.safetensors"):
        collect(plan_resume(tmp_path / "run"))


def test_two_equal_runs_give_the_same_adapter_bytes(recipe, tmp_path):
    for name in ("one", "two"):
        train(recipe, tmp_path / name, "steps=3", name="same")
    assert (tmp_path / "one" / "adapter.safetensors").read_bytes() == (
        tmp_path / "two" / "adapter.safetensors"
    ).read_bytes()


def test_a_masked_loss_counts_what_the_mask_shows_and_keeps_its_size():
    left = torch.cat([torch.ones(1, 4, 2), torch.zeros(1, 4, 2)], -1)
    example = Example("x", [], "", (32, 32), masks=[left])
    plain = Example("y", [], "", (32, 32))
    error = torch.rand(2, 3, 4, 4)
    changed = error.clone()
    changed[0, :, :, 2:] += 5  # hidden by the mask
    one, other = (AdapterTask._masked(e, [example, plain], [0, 0]).mean((1, 2, 3)) for e in (error, changed))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one[0], error[0, :, :, :2].mean())
    torch.testing.assert_close(one[1], error[1].mean())


@pytest.mark.parametrize(
    "settings", [("mixed_precision=bf16",), ("gradient_checkpointing=true",), ("min_snr_gamma=5",)]
)
def test_other_precision_checkpointing_and_weights_train_too(recipe, tmp_path, settings):
    events = train(recipe, tmp_path / "run", "learning_rate=1e-2", "steps=4", *settings)
    assert events[-1].kind == "finished"
    assert any(value.abs().sum() > 0 for name, value in weights(tmp_path / "run").items() if name.endswith("up"))


def test_recomputing_activations_changes_nothing_that_is_learned(recipe, tmp_path):
    train(recipe, tmp_path / "plain", "steps=3", "method.dropout=0.2", "sketches=0")
    train(recipe, tmp_path / "saving", "steps=3", "method.dropout=0.2", "gradient_checkpointing=true", "sketches=0")
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
