"""Clips: read with times and transparency, key frames, folders used whole; and stickers that move."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from studio.bases.sticker_video import alpha
from studio.data import motions, stickers
from studio.data.clips import Clip, key_frames, look_at, scan_clips, walk
from studio.errors import DataError

needs_font = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")


def frames(count, size=(24, 24)):
    made = []
    for i in range(count):
        picture = Image.new("RGBA", size, (0, 0, 0, 0))
        ImageDraw.Draw(picture).rectangle([i, 2, i + 4, 10], fill=(250, 30 * (i % 8), 20, 255))
        made.append(picture)
    return made


def save(path, pictures, durations, **options):
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    times = [100, 200, 300, 50]
    save(clips / "a.gif", frames(4), times, disposal=2)
    save(clips / "b.png", frames(4), times, disposal=1, blend=0)
    save(clips / "c.webp", frames(4), times, lossless=True)
    frames(1)[0].save(clips / "d.png")
    (clips / "e").mkdir()
    for i, picture in enumerate(frames(3)):
        picture.save(clips / "e" / f"{i:02d}.png")
    (clips / "a.txt").write_text("a square, moving\n")
    (clips / "e" / "caption.txt").write_text("three frames")
    return clips


def test_every_format_is_read_with_its_times_and_transparency(folder):
    expected = [np.asarray(f) for f in frames(4)]
    for name in ("a.gif", "b.png", "c.webp"):
        found = list(walk(folder / name))
        assert [ms for _, ms in found] == [100, 200, 300, 50]
        for (picture, _), truth in zip(found, expected, strict=True):
            pixels = np.asarray(picture)
            assert np.array_equal(pixels[..., 3], truth[..., 3])
            assert np.abs(pixels.astype(int) - truth)[truth[..., 3] > 0].max() <= 4


def test_a_folder_is_used_whole_with_its_captions(folder):
    found = scan_clips(folder, most_frames=8, caption="a sticker")
    assert [c.path.name for c in found.clips] == ["a.gif", "b.png", "c.webp", "d.png", "e"]
    assert [c.caption for c in found.clips] == [
        "a square, moving",
        "a sticker",
        "a sticker",
        "a sticker",
        "three frames",
    ]
    assert [len(c.kept) for c in found.clips] == [4, 4, 4, 1, 3]
    assert [c.loop for c in found.clips] == [True, True, True, False, False]
    assert found.dropped == []
    assert "5 clips used, 0 left out; 16 of 16 frames" in found.report()[0]


def test_clips_of_every_length_are_kept(tmp_path):
    for n in range(1, 13):
        save(tmp_path / f"{n:02d}.webp", frames(n), 100, lossless=True)
    found = scan_clips(tmp_path, most_frames=8)
    assert [len(c.kept) for c in found.clips] == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]


def test_key_frames_keep_the_first_the_order_and_the_time(tmp_path):
    path = save(tmp_path / "long.webp", frames(20), 50, lossless=True)
    clip = look_at(path, "", 6)
    assert clip.total == 20
    assert clip.kept[0] == 0
    assert list(clip.kept) == sorted(set(clip.kept))
    assert len(clip.kept) == 6
    assert sum(clip.durations) == 20 * 50
    loaded = clip.load(lambda p: alpha.fitted(p, (16, 16)))
    assert loaded.size == (16, 16)
    assert len(loaded.frames) == 6
    assert loaded.fps == pytest.approx(6.0)


def test_key_frames_are_the_first_of_each_group_of_like_frames():
    features = np.repeat(np.eye(4, 256, dtype=np.float32), [5, 1, 7, 3], axis=0)
    assert key_frames(features, 4) == (0, 5, 6, 13)
    assert key_frames(features[:3], 4) == (0, 1, 2)
    assert len(key_frames(np.zeros((50, 256), np.float32), 8)) == 8


def test_frames_of_mixed_sizes_are_fitted_into_the_first(tmp_path):
    for name, size in (("01", (16, 16)), ("02", (40, 20)), ("03", (7, 30))):
        Image.new("RGBA", size, (200, 0, 0, 255)).save(tmp_path / f"{name}.png")
    frames = look_at(tmp_path, "", 8).load().frames
    assert [frame.size for frame in frames] == [(16, 16)] * 3
    assert [frame.getbbox() for frame in frames] == [(0, 0, 16, 16), (0, 4, 16, 12), (6, 0, 10, 16)]


def test_ten_thousand_frames_are_thinned_in_moderate_time():
    rng = np.random.default_rng(0)
    chosen = key_frames(rng.random((10_000, 256), dtype=np.float32), 8)
    assert len(chosen) == 8
    assert chosen[0] == 0


def test_broken_files_are_left_out_and_named(folder):
    (folder / "f.gif").write_bytes(b"")
    (folder / "g.webp").write_bytes((folder / "c.webp").read_bytes()[:60])
    (folder / "h.png").write_text("no picture")
    (folder / "i.gif").write_bytes((folder / "a.gif").read_bytes())
    (folder / "i.txt").write_bytes(b"\xff\xfe\x00bad")
    found = scan_clips(folder, 8)
    assert [c.path.name for c in found.clips] == ["a.gif", "b.png", "c.webp", "d.png", "e"]
    reasons = dict(found.dropped)
    assert set(reasons) == {"f.gif", "g.webp", "h.png", "i.gif"}
    assert "empty" in reasons["f.gif"]
    assert "caption" in reasons["i.gif"]
    assert any("left out: f.gif" in line for line in found.report())


def test_folders_without_clips_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        scan_clips(tmp_path / "nothing", 8)
    with pytest.raises(DataError, match="holds no clip"):
        scan_clips(tmp_path, 8)


def test_a_clip_knows_its_rate_and_length():
    clip = Clip.at_rate(frames(5), 8.0)
    assert clip.durations == (125,) * 5
    assert clip.seconds == pytest.approx(0.625)
    assert clip.fps == pytest.approx(8.0)
    assert clip.sheet().size == (120, 24)


# -- stickers that move ----------------------------------------------------------------------------------------------


def fox():
    return next(g for g in stickers.glyphs("train") if g.name == "fox")


def track(motion, count=16, fps=16.0, **options):
    """Per frame: centre x and y, area, and the mass of alpha, all as fractions of the canvas."""
    clip = motions.render(motions.Act(fox(), motion, **options), 64, count, fps)
    rows = []
    for frame in clip.frames:
        a = np.asarray(frame)[..., 3] / 255
        y, x = np.mgrid[0:64, 0:64] / 64
        rows.append((*((a * axis).sum() / a.sum() for axis in (x, y)), (a > 0.02).mean(), a.mean()))
    return np.array(rows).T


@needs_font
def test_motions_are_what_their_names_say():
    x, y, area, mass = track("bounce")
    assert np.ptp(y) > 0.15 > 0.03 > np.ptp(x)
    x, y, *_ = track("slide", phase=0.0)
    assert (np.diff(x) > 0).all()
    assert np.ptp(y) < 0.02
    x, y, *_ = track("orbit")
    radius = np.hypot(x - x.mean(), y - y.mean())
    assert radius.mean() == pytest.approx(0.17, abs=0.02)
    assert np.std(radius) < 0.02
    *_, area, mass = track("pulse")
    assert area.max() / area.min() > 2
    *_, area, mass = track("fade")
    assert mass.max() / mass.min() > 2
    assert np.ptp(area) < 0.02
    x, *_ = track("shake")
    assert (np.sign(np.diff(x)) != np.sign(np.diff(x))[0]).any()
    still = track("")
    assert np.ptp(still, axis=1).max() == 0


@needs_font
@pytest.mark.parametrize("motion", motions.MOTIONS)
def test_a_whole_cycle_ends_where_it_began_and_moves_in_between(motion):
    clip = motions.render(motions.Act(fox(), motion, phase=0.1), 64, 9, 8.0)
    pixels = [np.asarray(f.convert("RGBa")).astype(int) for f in clip.frames]
    assert np.abs(pixels[8] - pixels[0]).max() <= 2
    assert any(np.abs(p - pixels[0]).max() > 60 for p in pixels[1:8])


@needs_font
def test_speed_and_extent_do_what_they_say():
    quick, slow = (track("bounce", speed=s, count=32, fps=16.0)[1] for s in ("quickly", "slowly"))
    turns = [np.count_nonzero(np.diff(np.sign(np.diff(y))) != 0) for y in (quick, slow)]
    assert turns[0] >= 3 * turns[1]
    assert np.ptp(track("orbit", extent="a lot")[0]) > 2 * np.ptp(track("orbit", extent="a little")[0])


@needs_font
def test_a_key_always_draws_the_same_clip_and_its_caption_tells_it():
    for number in range(40):
        clip, caption, act = motions.draw_clip((5, number), 32, 4)
        again, same, _ = motions.draw_clip((5, number), 32, 4)
        assert [f.tobytes() for f in clip.frames] == [f.tobytes() for f in again.frames]
        assert caption == same
        assert act.glyph.name in caption
        assert motions.MOTIONS[act.motion][0] in caption
        assert act.speed in caption
        assert act.extent in caption
        assert not motions.is_held_out(act.glyph, act.motion)
        _, _, held = motions.draw_clip((5, number), 32, 4, held_out=True)
        assert motions.is_held_out(held.glyph, held.motion)
    clip, caption, act = motions.draw_clip((5, 1), 32, 1)
    assert act.motion == ""
    assert len(clip.frames) == 1


def test_held_out_pairs_are_of_known_glyphs_and_known_motions():
    known = stickers.glyphs("train")
    pairs = [(g, m) for g in known for m in motions.MOTIONS]
    held = [pair for pair in pairs if motions.is_held_out(*pair)]
    assert 0.09 < len(held) / len(pairs) < 0.16
    assert {m for _, m in held} == set(motions.MOTIONS)
    trained = {g.name for g, m in pairs if not motions.is_held_out(g, m)}
    assert trained == {g.name for g in known}
