"""The judge of the sticker world: that it knows its world, and that what is measured with it is what it says."""

import json
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from studio.bases.sticker import build_sticker
from studio.data.stickers import (
    COLOURS,
    TINTS,
    Ground,
    Scene,
    Thing,
    draw_scene,
    font_path,
    glyphs,
    render,
    vocabulary,
)
from studio.errors import DataError, MissingPart, PresetError
from studio.evaluate import sticker_card
from studio.evaluate.judge import HEADS, Judge, load_judge, save_judge
from studio.evaluate.similarity import drift, similarity
from studio.fit import fit
from studio.keyed import numpy_generator
from studio.preset import make_preset, read_preset
from studio.run import Run

needs_font = pytest.mark.skipif(font_path() is None, reason="the emoji font (fonts-noto-color-emoji) is not installed")


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def rendered(key, glyph, resolution=128):
    rng = numpy_generator("test_judge", key)
    scene = draw_scene(rng, (glyph,))
    return render(scene, resolution, rng), scene


# -- the network -----------------------------------------------------------------------------------------------


def test_bundled_judge_knows_every_trained_glyph_and_is_small(judge):
    assert judge.glyphs == tuple(glyph.name for glyph in glyphs("train"))
    assert 0.4e6 < sum(p.numel() for p in judge.parameters()) < 0.75e6
    folder = sticker_card.assets_dir() / "judge"
    assert (folder / "judge.safetensors").stat().st_size < 1.5e6


@needs_font
@pytest.mark.parametrize("resolution", [64, 128])
def test_judge_reads_unseen_renderings(judge, resolution):
    known = glyphs("train")
    drawn = [rendered(i, known[(i * 7) % len(known)], resolution) for i in range(100)]
    verdict = judge.judge([picture for picture, _ in drawn])
    wanted = judge.labels([scene for _, scene in drawn])
    right = {head: float((verdict.answers(head) == wanted[head]).float().mean()) for head in wanted}
    assert right["glyph"] >= 0.9, right
    assert right["tint"] >= 0.9, right
    assert min(right[head] for head in ("size", "position", "ground", "pattern")) >= 0.95, right


@needs_font
def test_features_do_not_depend_on_the_batch(judge):
    pictures = [rendered(i, glyph)[0] for i, glyph in enumerate(glyphs("held-out")[:5])]
    together = judge.judge(pictures)
    alone = [judge.judge([picture]) for picture in pictures]
    torch.testing.assert_close(together.features, torch.cat([v.features for v in alone]), rtol=0, atol=2e-5)
    torch.testing.assert_close(together.features.norm(dim=-1), torch.ones(5))
    in_twos = judge.judge(pictures, batch=2)
    torch.testing.assert_close(together.features, in_twos.features, rtol=0, atol=2e-5)


def test_saved_judge_is_the_same_judge(judge, tmp_path):
    save_judge(judge, tmp_path)
    again = load_judge(tmp_path)
    assert again.glyphs == judge.glyphs
    assert again.facts == judge.facts
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), judge.parameters(), strict=True))


def test_saving_keeps_only_the_first_glyphs(tmp_path):
    torch.manual_seed(0)
    wide = Judge([f"glyph {i}" for i in range(10)])
    save_judge(wide, tmp_path, 4)
    narrow = load_judge(tmp_path)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert narrow.glyphs == wide.glyphs[:4]
    torch.testing.assert_close(
        narrow(pixels).logits["glyph"], wide(pixels).logits["glyph"][:, :4], rtol=1e-2, atol=1e-2
    )


def test_damaged_or_missing_judge_is_a_plain_error(judge, tmp_path):
    with pytest.raises(MissingPart, match="cannot be read"):
        load_judge(tmp_path / "nowhere")
    save_judge(judge, tmp_path)
    weights = tmp_path / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MissingPart, match="cannot be read"):
        load_judge(tmp_path)


def test_judge_refuses_no_pictures_and_unknown_glyphs(judge):
    with pytest.raises(DataError, match="no picture"):
        judge.judge([])
    stranger = glyphs("held-out")[0]
    with pytest.raises(DataError, match=stranger.name):
        judge.labels([Scene((Thing(stranger),))])


def test_labels_tell_the_scene(judge):
    dog = next(glyph for glyph in glyphs("train") if glyph.name == "dog")
    scene = Scene((Thing(dog, "blue", "small"),), Ground("red", "dotted", "white"), "at the top")
    labels = {head: int(value) for head, value in judge.labels([scene]).items()}
    assert judge.glyphs[labels.pop("glyph")] == "dog"
    told = {head: HEADS[head][value] for head, value in labels.items()}
    assert told == {"tint": "blue", "size": "small", "position": "at the top", "ground": "red", "pattern": "dotted"}


# -- its training ----------------------------------------------------------------------------------------------


@needs_font
def test_training_a_judge_lowers_its_loss_and_writes_a_loadable_one(tmp_path):
    content = read_preset("sticker-judge")
    content |= {"steps": 8, "batch_size": 8, "validate_every": 0, "warmup_steps": 0, "ema_decay": 0.0}
    preset = make_preset(content | {"mixed_precision": "no"})
    run = Run(tmp_path / "run")
    run.prepare()
    task = preset.method.task(None, preset, run)
    events = list(fit(task, preset, run, Accelerator(cpu=True)))
    losses = [event.data["loss"] for event in events if event.kind == "step"]
    assert sum(losses[-3:]) < sum(losses[:3])
    folder = run.newest_checkpoint() / "judge"
    assert load_judge(folder).glyphs == tuple(glyph.name for glyph in glyphs("train"))
    assert torch.equal(task.losses(3, 0, range(2)), task.losses(3, 0, range(2)))


def test_judge_refuses_to_train_on_a_folder_of_pictures(tmp_path):
    preset = make_preset({"method": {"kind": "judge"}})
    with pytest.raises(PresetError, match="draws its own data"):
        preset.method.task(None, preset, Run(tmp_path))


# -- an adapter's measures -------------------------------------------------------------------------------------


@needs_font
def test_similarity_of_a_picture_with_itself_is_one(judge):
    picture = rendered(0, glyphs("held-out")[0])[0]
    features = judge.judge([picture]).features
    assert similarity(features, features) == pytest.approx(1, abs=1e-5)


@needs_font
def test_similarity_knows_an_unseen_subject_on_other_grounds(judge):
    strangers = glyphs("held-out")[:12]
    sets = {
        kind: [judge.judge([rendered((kind, g.name, i), g)[0] for i in range(4)]).features for g in strangers]
        for kind in ("reference", "drawn")
    }
    table = torch.tensor([[similarity(d, r) for r in sets["reference"]] for d in sets["drawn"]])
    assert (table.argmax(1) == torch.arange(12)).float().mean() >= 0.9
    off = table[~torch.eye(12, dtype=torch.bool)]
    assert table.diagonal().mean() - off.mean() > 0.3


@needs_font
def test_drift_of_identical_pictures_is_zero_and_of_others_is_not(judge):
    known = glyphs("train")
    before = judge.judge([rendered(i, glyph)[0] for i, glyph in enumerate(known[:6])]).features
    after = judge.judge([rendered(i, glyph)[0] for i, glyph in enumerate(known[6:12])]).features
    assert drift(before, before) == pytest.approx(0, abs=1e-5)
    assert drift(before, after) > 0.15
    with pytest.raises(DataError, match="6 and 5"):
        drift(before, after[:5])


# -- a base's card ---------------------------------------------------------------------------------------------


@needs_font
def test_card_of_an_untrained_base_is_near_chance_and_renderings_are_not(judge):
    base = build_sticker(0)
    seen = []
    choices = glyphs("train")[:12]
    options = {"choices": choices, "steps": 1, "guidance": 1.0, "batch": 5, "psnr_pictures": 4}
    card = sticker_card.measure_base(base, judge, 1, **options, on_progress=lambda done, total: seen.append(done))
    assert seen == [5, 10, 12]
    assert card["pictures"] == 12
    assert {"glyph", "glyph top-5", *HEADS} <= set(card["scores"])
    glyph = card["scores"]["glyph"]
    assert glyph["chance"] == pytest.approx(1 / len(judge.glyphs), abs=1e-4)
    assert glyph["generated"] <= 0.2
    assert glyph["renderings"] >= 0.8
    assert card["autoencoder_psnr_db"]["train"] < 20
    json.dumps(card)


@needs_font
def test_card_is_the_same_for_the_same_seed_whatever_the_batch(judge):
    base = build_sticker(0)
    keys = [("k", i) for i in range(3)]
    prompts = ["a dog", "a red apple, on a blue background", "a cat"]
    one = sticker_card.draw_batches(base, prompts, keys, 1, steps=1)
    three = sticker_card.draw_batches(base, prompts, keys, 3, steps=1)
    for a, b in zip(one, three, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 2


def test_psnr_is_forty_decibels_for_an_error_of_a_hundredth():
    truth = torch.zeros(2, 3, 4, 4)
    off = torch.stack([truth[0] + 0.02, truth[1]])  # the scale is 2 wide
    torch.testing.assert_close(sticker_card.psnr_db(off, truth), torch.tensor([40.0, 100.0]))


def test_sheet_has_eight_pictures_a_row_each_with_its_prompt():
    base = build_sticker(0)
    prompts = sticker_card.sheet_prompts()[:10]
    sheet = sticker_card.sample_sheet(base, prompts, steps=1)
    width, height = 128 + 6, 128 + 4 * 11 + 6
    assert sheet.size == (8 * width + 6, 2 * height + 6)
    caption = np.asarray(sheet)[6 + 128 + 2 : 6 + 128 + 44, 6 : 6 + 128]
    assert (caption < 128).any()
    assert (np.asarray(sheet)[6 + height : 6 + height + 128, 2 * width + 6 :] == 255).all()  # the second row has two


def test_sheet_prompts_are_sentences_of_the_world():
    prompts = sticker_card.sheet_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    names = "|".join(sorted((re.escape(glyph.name) for glyph in glyphs("train")), key=len, reverse=True))
    colours, tint = "|".join(COLOURS), f"(?:(?:{'|'.join(TINTS)}) )?"
    ground = rf"(?:, on an? (?:{colours})(?: and (?:{colours}) (?:striped|dotted|checkered))? background)?"
    opening = r"(?:a sticker of |a picture of )?"
    single = rf"an? (?:small |large )?{tint}(?:{names})(?: (?:on the left|on the right|at the top|at the bottom))?"
    thing = rf"an? {tint}(?:{names})"
    pair = rf"{thing} (?:on the left of|on the right of|above|below) {thing}"
    for prompt in prompts:
        assert re.fullmatch(rf"{opening}(?:{single}|{pair}){ground}", prompt), prompt
        assert set(prompt.replace(",", "").split()) <= set(vocabulary()), prompt


def test_program_says_plainly_that_a_folder_holds_no_base(tmp_path, capsys):
    assert sticker_card.main([str(tmp_path), "--out", str(tmp_path / "card")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "card").exists()
