"""Stickers for platforms: every limit holds on the file that was read again, whatever the clip."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from studio.data.clip_files import distinct, save_clip
from studio.data.clips import Clip, walk
from studio.errors import DataError, RequestError
from studio.stickers_out.fitting import fit_clip, write_sticker
from studio.stickers_out.limits import TARGETS


def moving(count=6, side=64, ms=125, loop=True):
    frames = []
    for i in range(count):
        picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse([4 + 5 * i, 10, 30 + 5 * i, 40], fill=(220, 60 + 20 * i, 60, 255))
        frames.append(picture)
    return Clip(tuple(frames), (ms,) * count, loop)


def noise(count, side):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (side, side, 4), dtype=np.uint8), "RGBA") for _ in range(count)]
    return Clip(tuple(frames), (100,) * count)


def held(count=3):
    return Clip(moving(1).frames * count, (200,) * count)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["moving", "held", "long"])
def test_every_target_keeps_its_limits_on_the_file_read_again(name, kind, tmp_path):
    limits = TARGETS[name]
    clip = {"moving": moving(), "held": held(), "long": moving(9, 64, 2000, False)}[kind]
    if kind == "held" and limits.ending == ".gif":
        pytest.skip("a GIF may merge equal frames; no limit counts them")
    path = tmp_path / f"s{limits.ending}"
    facts = write_sticker(clip, limits, path).facts
    frames = list(walk(path))
    seconds = sum(ms for _, ms in frames) / 1000
    assert facts["bytes"] == path.stat().st_size <= (limits.most_bytes or 10**9)
    assert limits.canvas is None or frames[0][0].size == limits.canvas
    assert limits.most_seconds is None or seconds <= limits.most_seconds
    assert limits.least_frames <= len(frames) <= (limits.most_frames or 10**9)
    assert facts["transparent"]
    if name == "line":
        assert seconds in (1, 2, 3, 4)
        assert 1 <= facts["loops"] <= 4
        assert facts["loops"] * seconds <= 4


@pytest.mark.parametrize("name", ["line", "discord"])
def test_noise_is_pressed_under_the_cap(name, tmp_path):
    limits = TARGETS[name]
    facts = write_sticker(noise(8, limits.canvas[0]), limits, tmp_path / "n.png").facts
    assert facts["bytes"] <= limits.most_bytes
    assert "colours" in facts["quality"]


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_no_frame_ghosts_through_the_next(ending, tmp_path):
    clip = moving()
    save_clip(clip, tmp_path / f"c{ending}", {})
    ghosts = 0
    for (picture, _), truth in zip(walk(tmp_path / f"c{ending}"), clip.frames, strict=True):
        clear = np.asarray(truth)[..., 3] == 0
        ghosts += int((np.asarray(picture)[..., 3][clear] > 1).sum())
    assert ghosts == 0


def test_webp_and_apng_keep_alpha_exactly(tmp_path):
    clip = Clip(tuple(f.resize((40, 40)) for f in moving().frames), (125,) * 6)
    for ending in (".png", ".webp"):
        save_clip(clip, tmp_path / f"c{ending}", {})
        for (picture, _), truth in zip(walk(tmp_path / f"c{ending}"), clip.frames, strict=True):
            assert np.array_equal(np.asarray(picture)[..., 3], np.asarray(truth)[..., 3])


def test_equal_neighbours_differ_by_a_corner_nobody_sees():
    clip = distinct(held(4))
    assert len({f.tobytes() for f in clip.frames}) == 2
    for frame in clip.frames:
        difference = np.abs(np.asarray(frame).astype(int) - np.asarray(held().frames[0]))
        assert difference.sum() <= 1


def test_a_looping_clip_shows_itself_when_it_stops():
    empty = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    full = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    turned = fit_clip(Clip((empty, full, empty), (100, 200, 300), True), TARGETS["webp"])
    assert turned.frames[0].tobytes() == full.tobytes()
    assert turned.durations == (200, 300, 100)
    kept = fit_clip(Clip((empty, full, empty), (100, 200, 300), False), TARGETS["webp"])
    assert kept.frames[0].tobytes() == empty.tobytes()


def test_stills_and_wrong_endings_are_refused(tmp_path):
    with pytest.raises(DataError, match="one frame"):
        write_sticker(moving(1), TARGETS["whatsapp"], tmp_path / "a.webp")
    with pytest.raises(RequestError, match=r"is a \.webp"):
        write_sticker(moving(), TARGETS["whatsapp"], tmp_path / "a.gif")
    with pytest.raises(RequestError, match="cannot write"):
        save_clip(moving(), tmp_path / "a.bmp", {})


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_a_clip_tells_of_its_making(ending, tmp_path):
    path = tmp_path / f"c{ending}"
    save_clip(moving(), path, {"prompt": "a fox", "seed": 3})
    with Image.open(path) as file:
        told = file.text["studio"] if ending == ".png" else None
        told = file.info["comment"].decode() if ending == ".gif" else told
        told = file.getexif()[0x010E] if ending == ".webp" else told
    assert json.loads(told) == {"prompt": "a fox", "seed": 3}
