"""Stickers for platforms: every limit holds on the file that was read again, whatever the clip."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from studio.cli import run
from studio.data.clip_files import distinct, save_clip, with_palette
from studio.data.clips import Clip, look_at, walk
from studio.data.video_files import shown_at
from studio.errors import DataError, MissingPart, RequestError
from studio.stickers_out.fitting import check, fit_clip, write_sticker
from studio.stickers_out.limits import TARGETS
from studio.stickers_out.packs import Pack, write_pack


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


def needs_video(limits):
    if limits.ending == ".webm":
        pytest.importorskip("av", reason="WebM needs the extra 'video'")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["moving", "held", "long"])
def test_every_target_keeps_its_limits_on_the_file_read_again(name, kind, tmp_path):
    limits = TARGETS[name]
    needs_video(limits)
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
    assert limits.least_frames <= len(frames)
    assert limits.rate is not None or len(frames) <= (limits.most_frames or 10**9)
    assert facts["transparent"]
    if name == "line":
        assert seconds in (1, 2, 3, 4)
        assert 1 <= facts["loops"] <= 4
        assert facts["loops"] * seconds <= 4
    if name == "telegram":
        assert (facts["codec"], facts["fps"], facts["audio"], facts["alpha"]) == ("vp9", 30.0, 0, True)


@pytest.mark.parametrize("name", ["line", "discord"])
def test_noise_is_pressed_under_the_cap(name, tmp_path):
    limits = TARGETS[name]
    facts = write_sticker(noise(8, limits.canvas[0]), limits, tmp_path / "n.png").facts
    assert facts["bytes"] <= limits.most_bytes
    assert "colours" in facts["quality"]


def test_telegram_takes_noise_and_ninety_frames_at_most(tmp_path):
    needs_video(TARGETS["telegram"])
    facts = write_sticker(noise(3, 256), TARGETS["telegram"], tmp_path / "n.webm").facts
    assert 100_000 < facts["bytes"] <= 256 * 1024
    assert facts["quality"].startswith("crf")
    many = fit_clip(moving(240, 16, 20), TARGETS["telegram"])
    assert len(shown_at(many, 30)) <= 90


def test_a_video_keeps_transparency_time_and_every_frame(tmp_path):
    needs_video(TARGETS["telegram"])
    clip = Clip(moving(4).frames, (100, 40, 200, 333), True)
    save_clip(clip, tmp_path / "c.webm", {"seed": 1})
    assert shown_at(clip, 30) == [0] * 3 + [1] + [2] * 6 + [3] * 10
    found = list(walk(tmp_path / "c.webm"))
    assert [ms for _, ms in found] == [33, 34, 33] * 6 + [33, 33]
    for (picture, _), index in zip(found, shown_at(clip, 30), strict=True):
        seen, truth = (np.asarray(p).astype(float)[..., 3] for p in (picture, clip.frames[index]))
        assert np.abs(seen - truth).mean() < 3
    looked = look_at(tmp_path / "c.webm", "a dot", 4)
    assert looked.total == 20
    assert sum(looked.durations) == sum(ms for _, ms in found)


def test_without_the_package_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(MissingPart) as read:
        list(walk(tmp_path / "a.mp4"))
    with pytest.raises(MissingPart) as written:
        write_sticker(moving(), TARGETS["telegram"], tmp_path / "a.webm")
    for error in (read.value, written.value):
        assert error.exit_code == 2
        assert "pip install 'av" in error.hint
    assert not (tmp_path / "a.webm").exists()


def test_what_is_no_video_is_told_in_one_line(tmp_path):
    needs_video(TARGETS["telegram"])
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(DataError, match="no video that can be read"):
        list(walk(tmp_path / "a.mp4"))


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


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_empty_frames_are_kept_too(ending, tmp_path):
    empty = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    full = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    save_clip(Clip((full, empty, empty, empty, full), (100,) * 5), tmp_path / f"c{ending}", {})
    found = [picture for picture, _ in walk(tmp_path / f"c{ending}")]
    assert [int(np.asarray(p)[..., 3].max()) > 2 for p in found] == [True, False, False, False, True]


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


# -- packs -----------------------------------------------------------------------------------------------------------


def clips_on_disk(folder, count):
    for index in range(count):
        save_clip(moving(5, 24 + index), folder / f"c{index}.webp", {})
    return [str(folder / f"c{index}.webp") for index in range(count)]


def test_a_whatsapp_pack_has_its_stickers_tray_icon_and_contents(tmp_path):
    told = ["--for", "whatsapp", "--pack", "My foxes", "--emoji", "🦊 😀", "--out", str(tmp_path / "pack")]
    assert run(["sticker", *clips_on_disk(tmp_path, 3), *told]) == 0
    contents = json.loads((tmp_path / "pack" / "contents.json").read_text())["sticker_packs"][0]
    assert contents["animated_sticker_pack"] is True
    assert contents["name"] == "My foxes"
    assert [s["image_file"] for s in contents["stickers"]] == ["01.webp", "02.webp", "03.webp"]
    assert all(s["emojis"] == ["🦊", "😀"] for s in contents["stickers"])
    for name in ("01.webp", "02.webp", "03.webp"):
        check(tmp_path / "pack" / name, TARGETS["whatsapp"])
    with Image.open(tmp_path / "pack" / contents["tray_image_file"]) as tray:
        assert tray.size == (96, 96)
        assert tray.convert("RGBA").getchannel("A").getextrema() == (0, 255)
    assert (tmp_path / "pack" / "tray.png").stat().st_size <= 50 * 1024


def test_a_line_pack_has_a_moving_main_picture_and_a_still_tab(tmp_path):
    clips = tuple(moving(5, 24 + index) for index in range(8))
    write_pack(Pack("Dots", "me", clips, ("🙂",)), "line", tmp_path / "pack")
    names = sorted(path.name for path in (tmp_path / "pack").iterdir())
    assert names == [*(f"0{i}.png" for i in range(1, 9)), "main.png", "tab.png"]
    with Image.open(tmp_path / "pack" / "main.png") as main, Image.open(tmp_path / "pack" / "tab.png") as tab:
        assert (main.size, main.n_frames >= 5) == ((240, 240), True)
        assert (tab.size, getattr(tab, "n_frames", 1)) == ((96, 74), 1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--for", "whatsapp", "--pack", "P"), "3 to 30"),
        (("--for", "line", "--pack", "P"), "8, 16, 24"),
        (("--for", "discord", "--pack", "P"), "no packs"),
        (("--for", "whatsapp"), "--pack"),
    ],
)
def test_packs_that_no_platform_takes_are_refused_and_nothing_is_written(tmp_path, arguments, word, capsys):
    assert run(["sticker", *clips_on_disk(tmp_path, 2), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_ground_with_a_faint_haze_is_clear_in_a_palette_too():
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(3):
        pixels = rng.integers(0, 256, (32, 32, 4), np.uint8)
        pixels[8:, :, 3] = np.where(rng.random((24, 32)) < 0.5, 0, 3)
        frames.append(Image.fromarray(pixels, "RGBA"))
    reduced = [np.asarray(frame.convert("RGBA")) for frame in with_palette(frames, 64)]
    assert all((frame[8:, :, 3] == 0).mean() > 0.9 for frame in reduced)
    opaque = [Image.new("RGB", (8, 8), colour).convert("RGBA") for colour in ("red", "green")]
    assert all(frame.convert("RGBA").getextrema()[3] == (255, 255) for frame in with_palette(opaque, 8))
