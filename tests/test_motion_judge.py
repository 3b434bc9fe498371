"""The judge of motions and the card it writes: what is compared with what, and that it learns from renderings."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from studio.base import Request
from studio.bases.sticker_video.family import StickerVideo
from studio.data import motions, stickers
from studio.data.clips import Clip
from studio.errors import DataError, MissingPart
from studio.evaluate import motion_card
from studio.evaluate.motion_judge import CLASSES, SIDE, MotionJudge, load_motion_judge, save_motion_judge, seen
from studio.training import Order, plan
from trainers.motion_judge import rendered, spoilt

needs_font = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")


def solid(values, side=8, alpha=255):
    return Clip(tuple(Image.new("RGBA", (side, side), (v, v, v, alpha)) for v in values), (100,) * len(values))


def test_the_judge_sees_transparency_and_light_whatever_the_size():
    clip = Clip((Image.new("RGBA", (100, 100), (255, 0, 0, 128)), Image.new("RGBA", (100, 100), (9, 9, 9, 0))), (9, 9))
    picture = seen([clip])
    assert picture.shape == (1, 2, 2, SIDE, SIDE)
    assert picture[0, 0, 0].mean().item() == pytest.approx(128 / 255)
    assert picture[0, 0, 1].mean().item() == pytest.approx(128 / 255 / 3, abs=1e-3)
    assert picture[0, 1].abs().max() == 0


def test_a_saved_judge_answers_alike_and_is_small(tmp_path):
    torch.manual_seed(0)
    judge = MotionJudge({"seed": 0})
    judge.load_state_dict({name: value.half().float() for name, value in judge.state_dict().items()})
    save_motion_judge(judge, tmp_path)
    again = load_motion_judge(tmp_path)
    x = torch.rand(2, 8, 2, SIDE, SIDE)
    assert torch.equal(judge(x), again(x))
    assert judge(torch.rand(1, 5, 2, SIDE, SIDE)).shape == (1, len(CLASSES))  # any number of frames
    assert (tmp_path / "judge.safetensors").stat().st_size < 2**20
    (tmp_path / "judge.json").write_text(json.dumps({"facts": {}, "motions": ["", "jump"]}))
    with pytest.raises(MissingPart, match="other motions"):
        load_motion_judge(tmp_path)
    with pytest.raises(DataError, match="one frame"):
        again.judge([solid([1])])


@needs_font
def test_the_judge_is_trained_by_its_preset_on_pairs_that_validation_never_shows(tmp_path):
    settings = ("batch_size=8", "validate_every=6", "checkpoint_every=6", "data.frames=4", "warmup_steps=0")
    events = list(plan(Order("motion-judge", run=tmp_path / "run", steps=6, settings=settings)).events())
    losses = [event.data["loss"] for event in events if event.kind == "step"]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    judge = load_motion_judge(next((tmp_path / "run").glob("checkpoints/*/judge")))
    assert 0 <= judge.facts["right_on_held_out"] <= 1
    for held_out in (False, True):
        clip, label = rendered(("t", 1), 4, still=0.0, held_out=held_out)
        _, _, act = motions.draw_clip(("t", 1), 64, 4, held_out=held_out)
        assert CLASSES[label] == act.motion
        assert motions.is_held_out(act.glyph, act.motion) == held_out
        assert len(clip.frames) == 4


@needs_font
def test_what_stands_still_is_told_apart_and_spoiling_keeps_shape_and_range():
    clip, label = rendered(("t", 2), 4, still=0.999)
    assert CLASSES[label] == ""
    assert len({frame.tobytes() for frame in clip.frames}) == 1
    picture = seen([rendered(("t", 3), 4, still=0.0)[0]])[0]
    worse = spoilt(picture, torch.Generator().manual_seed(0))
    assert worse.shape == picture.shape
    assert 0 <= worse.min() <= worse.max() <= 1
    assert not torch.equal(worse, picture)


def test_the_trivial_clip_blends_between_given_frames_and_repeats_beyond():
    clip = solid([0, 200, 100, 50, 200])
    blend = motion_card.guessed(clip, (0, 2, 4))
    assert [frame.getpixel((0, 0))[0] for frame in blend.frames] == [0, 50, 100, 150, 200]
    copy = motion_card.guessed(clip, (0,))
    assert [frame.getpixel((0, 0))[0] for frame in copy.frames] == [0, 0, 0, 0, 0]
    half = Clip((Image.new("RGBA", (4, 4), (200, 0, 0, 255)),) * 2 + (Image.new("RGBA", (4, 4)),), (9,) * 3)
    faded = motion_card.guessed(half, (0, 2)).frames[1].getpixel((0, 0))
    assert faded == (200, 0, 0, 128)  # premultiplied, so the colour does not darken


def test_gains_count_only_frames_that_were_not_given():
    truth, near, far = solid([0, 100, 100]), solid([255, 110, 90]), solid([0, 151, 100])
    found = motion_card.compared([truth] * 3, [near] * 3, [far] * 3, (0,))
    assert found["psnr"] == pytest.approx(-10 * np.log10(0.75 * (10 / 255) ** 2), abs=0.01)
    assert found["gain"] == pytest.approx(10 * np.log10(51**2 / 200), abs=0.02)
    assert found["interval"] == [found["gain"]] * 2


@needs_font
def test_a_card_tells_gains_and_motions_of_any_clip_base(tmp_path):
    base = StickerVideo.tiny()
    card, shown = motion_card.measure_clips(base, MotionJudge(), 2, steps=1, frames=8)
    assert card["picture to clip"]["given frames exact"]
    assert card["interpolation"]["given frames exact"]
    assert 0 <= card["text to clip"]["motion right"] <= 1
    assert sum(total for _, total in card["text to clip"]["by motion"].values()) == 2
    sheet, strip = motion_card.sheet(shown), shown[0][1].sheet()
    left, top = motion_card.GAP, motion_card.GAP + motion_card.TITLE
    assert sheet.crop((left, top, left + strip.width, top + strip.height)).tobytes() == strip.tobytes()
    moving = motion_card.moving_sheet(shown)
    ours = shown[1][1].frames[3]
    corner = (ours.width + motion_card.GAP, 0, 2 * ours.width + motion_card.GAP, ours.height)
    assert len(moving.frames) == 8
    assert moving.frames[3].crop(corner) == Image.alpha_composite(Image.new("RGBA", ours.size, "white"), ours)
    truths = motion_card.held_out_clips(10, 16, 4, 0)
    assert [truth.motion for truth in truths] == list(motions.MOTIONS)
    again = base.generate(Request([truths[0].caption], [0], steps=1, frames=8))
    assert len(again[0].frames) == 8
