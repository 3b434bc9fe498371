"""RDTF's trainer: masks of every task, the loss, the curriculum, and runs that resume as if never stopped."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from studio.bases.sticker_video.batches import batch_of, masked_loss
from studio.bases.sticker_video.building import PAPER_IMAGE
from studio.bases.sticker_video.family import StickerVideo
from studio.data import stickers
from studio.data.clip_pool import ClipPool, EncodedClip, long_tailed_lengths
from studio.errors import PresetError
from studio.preset import make_preset
from studio.run import Run
from studio.training import Order, plan, plan_resume
from trainers.rdtf.curriculum import LEVELS, STATIC, Curriculum, difficulty, draw_weights, kind_of
from trainers.rdtf.masks import TASKS, draw_mask, tasks_for

needs_font = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")


def masks_of(task, count, draws=40):
    rng = np.random.default_rng(count)
    return [np.array(draw_mask(task, count, rng).given) for _ in range(draws)]


# -- dual mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 17))
@pytest.mark.parametrize("task", TASKS)
def test_every_mask_has_its_tasks_shape_and_leaves_something_to_draw(task, count):
    for given in masks_of(task, count):
        places = np.flatnonzero(given)
        assert len(given) == count
        assert not given.all()
        if task == "text":
            assert len(places) == 0
        elif task in ("image", "text-image"):
            assert len(places) == 1
        elif task == "interpolation":
            assert len(places) >= 1
            assert len(set(np.diff(places))) <= 1
            assert set(np.diff(places)) <= {2, 3}
        elif task == "prediction":
            assert given[0]
            assert len(places) >= max(1, count // 2)
            assert places[-1] == len(places) - 1
        else:
            assert given[-1]
            assert count - places[0] == len(places)
            assert places[0] <= max(1, count // 2)


def test_a_still_has_only_its_text():
    assert tasks_for(1) == ("text",)
    assert draw_mask("text", 1, np.random.default_rng(0)).given == (False,)


def random_batch():
    squared = torch.rand(3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    given = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    return squared, valid, given


def test_masked_loss_equals_a_loop_over_frames():
    squared, valid, given = random_batch()
    expected = []
    for b in range(3):
        counted = [squared[b, :, f].mean() for f in range(4) if valid[b, f] and not given[b, f]]
        expected.append(sum(counted) / len(counted))
    assert torch.allclose(masked_loss(squared, valid, given), torch.stack(expected))


def test_a_clips_weight_does_not_depend_on_its_length_and_the_papers_does():
    squared = torch.ones(2, 1, 8, 1, 1)
    valid = torch.arange(8)[None] < torch.tensor([[8], [2]])
    given = torch.zeros_like(valid)
    assert masked_loss(squared, valid, given).tolist() == [1, 1]
    assert masked_loss(squared, valid, given, paper_compat=True).tolist() == [1, 0.25]


def test_paper_compat_is_the_published_mean_over_masked_tensors():
    squared, valid, given = random_batch()
    error = squared.sqrt() * valid[:, None, :, None, None]
    published = torch.nn.functional.mse_loss(error, torch.zeros_like(error))
    assert torch.allclose(masked_loss(squared, valid, given, paper_compat=True).mean(), published)


def test_padding_of_the_loss_may_hold_nan():
    squared, valid, given = random_batch()
    dirty = squared.masked_fill(~valid[:, None, :, None, None], float("nan")).requires_grad_(True)
    loss = masked_loss(dirty, valid, given)
    assert torch.equal(loss, masked_loss(squared, valid, given))
    loss.sum().backward()
    assert torch.isfinite(dirty.grad).all()


# -- curriculum ------------------------------------------------------------------------------------------------------


def fed(mode, losses, end=100):
    curriculum = Curriculum(mode, end)
    rng = np.random.default_rng(0)
    for step, loss in enumerate(losses):
        draw = curriculum.draw(step, 8, 0.1, rng)
        curriculum.observe(step, [draw], [0.1], [0.5], [loss])
    return curriculum


@pytest.mark.parametrize(("step", "column"), [(0, 0), (50, 1), (100, 2), (500, 2)])
def test_linear_weights_are_the_papers_table(step, column):
    for task in TASKS:
        assert Curriculum("linear", 100).weight(task, step) == pytest.approx(STATIC[kind_of(task)][column])


@pytest.mark.parametrize(("losses", "level"), [(range(50, 0, -1), 4), (range(1, 51), 0)])
def test_a_falling_loss_moves_to_hard_tasks_and_a_rising_one_to_easy_ones(losses, level):
    curriculum = fed("paper", [float(x) for x in losses])
    assert curriculum.level() == level
    for task in TASKS:
        kind = kind_of(task)
        assert curriculum.weight(task, 0) == pytest.approx(STATIC[kind][0] + LEVELS[kind][level])


def test_quantile_is_numpys_count_of_what_lies_below():
    curriculum = fed("paper", np.random.default_rng(1).random(300).tolist())
    values = np.array(curriculum.values)
    assert curriculum.quantile() == pytest.approx((values < values[-1]).sum() / (len(values) - 1))


def test_pid_value_is_the_papers_formula():
    losses = [0.5, 0.4, 0.7]
    curriculum = fed("paper", losses)
    assert curriculum.values[-1] == pytest.approx(5 * 0.7 + 3 * np.mean(losses) + 1.3 * 0.3)


def test_tasks_are_drawn_in_proportion_to_their_weights():
    curriculum, rng = Curriculum("linear", 100), np.random.default_rng(0)
    drawn = [curriculum.draw(100, 8, 0.0, rng).task for _ in range(4000)]
    weights = np.array([curriculum.weight(task, 100) for task in TASKS])
    expected = 4000 * weights / weights.sum()
    found = np.array([drawn.count(task) for task in TASKS])
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_difficulty_grows_with_what_is_left_open():
    rng = np.random.default_rng(0)
    text, image = draw_mask("text", 8, rng), draw_mask("text-image", 8, rng)
    between, ahead = draw_mask("interpolation", 8, rng), draw_mask("prediction", 8, rng)
    assert difficulty(text, 0.1) > difficulty(image, 0.1) > difficulty(between, 0.1)
    assert difficulty(text, 0.5) > difficulty(text, 0.1)
    assert difficulty(draw_mask("image", 8, np.random.default_rng(3)), 0.1) > difficulty(
        draw_mask("text-image", 8, np.random.default_rng(3)), 0.1
    )
    assert difficulty(ahead, 0.1) > 0


def test_competence_opens_hard_samples_and_none_starves():
    ranks = np.linspace(0, 1, 11)
    low, high = draw_weights(ranks, 0.2), draw_weights(ranks, 1.0)
    assert (low[:3] == 1).all()
    assert low[-1] == pytest.approx(0.05)
    assert (high == 1).all()
    assert Curriculum("adaptive", 100).competence(0) < Curriculum("adaptive", 100).competence(100)


def test_adaptive_draws_harder_samples_later():
    curriculum, rng = Curriculum("adaptive", 100), np.random.default_rng(0)
    for _ in range(200):
        curriculum.observe(1, [curriculum.draw(0, 8, 0.1, rng)], [0.1], [0.5], [1.0])
    early, late = (np.mean([difficulty(curriculum.draw(s, 8, 0.1, rng), 0.1) for _ in range(300)]) for s in (0, 100))
    assert early < late


@pytest.mark.parametrize("mode", ["none", "linear", "paper", "adaptive"])
def test_curriculum_survives_a_checkpoint_bit_for_bit(mode):
    losses = np.random.default_rng(2).random(120).tolist()
    whole, first = fed(mode, losses), fed(mode, losses)
    again = Curriculum(mode, 100)
    again.restore(json.loads(json.dumps(first.state())))
    one, two = ([c.draw(60, 8, 0.2, np.random.default_rng(i)) for i in range(50)] for c in (whole, again))
    assert one == two
    assert again.state() == whole.state()


# -- pool ------------------------------------------------------------------------------------------------------------


def toy_pool(lengths=(1, 3, 3, 5, 5, 5), refresh=2):
    def clip_of(index, version):
        return EncodedClip(torch.full((2, lengths[index], 1, 1), index + 10.0 * version), f"{index}", 8.0, False, 0.1)

    return ClipPool(lengths, clip_of, refresh, seed=7)


def test_a_bucketed_step_has_one_length_and_a_pool_is_a_function_of_seed_and_step():
    walked, jumped = toy_pool(), toy_pool()
    for step in range(12):
        clips = walked.draw(step, 0, range(4), bucketed=True)
        assert len({clip.count for clip in clips}) == 1
    again = jumped.draw(11, 0, range(4), bucketed=True)
    assert [c.caption for c in again] == [c.caption for c in clips]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, clips))


def test_every_clip_of_every_length_is_used_equally_often():
    pool = toy_pool()
    drawn = [c.caption for step in range(3000) for c in pool.draw(step, 0, range(1), bucketed=True)]
    counts = np.array([drawn.count(str(i)) for i in range(6)])
    assert pool.used == set(range(6))
    assert ((counts - 500) ** 2 / 500).sum() < 20.5


def test_lengths_have_a_share_of_stills_and_reach_the_longest():
    lengths = long_tailed_lengths(2000, 8, 0.25, seed=0)
    assert 0.2 < lengths.count(1) / 2000 < 0.3
    assert set(lengths) == set(range(1, 9))


def test_padded_batch_equals_bucketed_ones_in_loss():
    """The same two clips in one padded batch and alone, with the same noise: the same losses."""
    base = StickerVideo.tiny()
    base.pipe.unet.double()
    base.pipe.text_encoder.double()
    generator = torch.Generator().manual_seed(0)
    clips = [EncodedClip(torch.randn(8, n, 8, 8, generator=generator), "a cat", float(n), False, 0.1) for n in (3, 5)]
    draws = [draw_mask("text-image", c.count, np.random.default_rng(0)) for c in clips]
    noise = torch.randn(2, 8, 5, 8, 8, generator=generator, dtype=torch.float64)
    times = torch.tensor([300, 700])

    def losses(rows):
        clean, condition = batch_of([clips[i] for i in rows], [draws[i].given for i in rows])
        clean = clean.double()
        told = base.encode_prompts(["a cat"] * len(rows), (16, 16)) | condition.tensors()
        own = noise[list(rows), :, : clean.shape[2]]
        with torch.no_grad():
            out = base.predict(base.objective.noised(clean, own, times[list(rows)]), times[list(rows)], told)
        squared = (out - base.objective.target(clean, own, times[list(rows)])) ** 2
        return masked_loss(squared, condition.valid, condition.is_given)

    together, alone = losses([0, 1]), torch.cat([losses([0]), losses([1])])
    assert torch.allclose(together, alone, atol=1e-10)


# -- runs ------------------------------------------------------------------------------------------------------------


def small_preset(folder, tiny_base_folder, **method):
    content = {
        "description": "pico",
        "base": str(tiny_base_folder),
        "method": {"kind": "rdtf", "curriculum_end": 1.0, **method},
        "data": {"source": "motions", "resolution": 16, "frames": 4, "stills": 0.3, "pool": 8, "refresh": 1},
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "validate_every": 6,
    }
    make_preset(content)
    path = folder / "pico.yaml"
    path.write_text(json.dumps(content))
    return str(path)


@needs_font
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, tiny_base_folder):
    preset = small_preset(tmp_path, tiny_base_folder)
    whole = list(plan(Order(preset, run=tmp_path / "whole")).events())
    assert whole[-1].kind == "finished"
    steps = 0

    def stop():
        return steps >= 4

    for event in plan(Order(preset, run=tmp_path / "cut")).events(stop):
        steps = event.step
    assert event.kind == "stopped"
    list(plan_resume(tmp_path / "cut").events())
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "step-6" / "state.safetensors") for name in ("whole", "cut")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    states = [(tmp_path / n / "checkpoints" / "step-6" / "curriculum.json").read_text() for n in ("whole", "cut")]
    assert states[0] == states[1]
    losses = [e.data["loss"] for e in whole if e.kind == "step"]
    assert all(np.isfinite(losses))
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "Curriculum (adaptive)" in report
    assert "clips by number of frames" in report


@needs_font
def test_shifted_times_are_those_of_training_and_validation_stays_as_it_was(tmp_path, tiny_base_folder):
    def task(shift):
        planned = plan(Order(small_preset(tmp_path, tiny_base_folder, timestep_shift=shift), run=tmp_path / f"{shift}"))
        return planned.preset.method.task(planned.base, planned.preset, planned.run)

    uniform, shifted = task(1.0), task(9.0)
    clips = uniform.pool.draw(0, 0, range(2), True) * 20
    draws = [draw_mask("text", clip.count, np.random.default_rng(0)) for clip in clips]

    def level(task, training):
        return task._loss(clips, draws, [(0, number) for number in range(40)], training)[1].mean()

    assert level(shifted, True) > level(uniform, True) + 0.2
    assert level(shifted, False) == level(uniform, False)


@needs_font
@pytest.mark.parametrize(
    "method",
    [
        {"backbone": "stock_unet3d", "curriculum": "none"},
        {"backbone": "paper_unet", "text": "frozen"},
        {"batches": "padded", "curriculum": "paper", "train": "temporal"},
        {"alpha": False, "dual_mask": False, "condition_fill": "zero", "interaction": "conv", "text": "frozen"},
    ],
)
def test_every_variant_trains_and_the_saved_base_loads(method, tmp_path, tiny_base_folder, monkeypatch):
    from studio.base import Request
    from studio.bases.registry import load_base

    small = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4, "cross_attention_dim": 32}
    for key, value in small.items():
        monkeypatch.setitem(PAPER_IMAGE, key, value)
    preset = small_preset(tmp_path, tiny_base_folder, **method)
    finished = list(plan(Order(preset, run=tmp_path / "run", steps=2)).events())[-1]
    base = load_base(finished.data["base"])
    assert base.medium == "video"
    clip = base.generate(Request(["a fox bouncing"], [1], steps=2, frames=3, fps=6.0))[0]
    assert len(clip.frames) == 3
    assert clip.frames[0].mode == "RGBA"


@needs_font
def test_temporal_training_leaves_the_image_network_as_it_was(tmp_path, tiny_base_folder):
    training = plan(
        Order(small_preset(tmp_path, tiny_base_folder, train="temporal", text="frozen"), run=tmp_path / "r")
    )
    unet = training.base.pipe.unet
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    list(training.events())
    changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= unet.temporal_names()


def test_requests_that_cannot_be_trained_are_refused(tmp_path, tiny_base_folder):
    good = small_preset(tmp_path, tiny_base_folder)
    for settings, word in [
        (("data.source=pictures",), "clips"),
        (("data.source=clips",), "nothing to train on"),
        (("data.resolution=17",), "multiple"),
        (("method.backbone=stock_unet3d", "method.batches=padded"), "padding"),
        (("method.backbone=stock_unet3d", "method.train=temporal"), "time"),
        (("method.backbone=paper_unet",), "1024 wide, and that of .* is 32 wide"),
    ]:
        with pytest.raises(PresetError, match=word):
            list(plan(Order(good, run=tmp_path / "bad", settings=settings)).events())
    assert not Run(tmp_path / "bad").checkpoint_folders()
