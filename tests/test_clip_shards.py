"""Shards of clips: each once a round, the same at its place whatever came before, damage named and passed by."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from studio.data.clip_pool import EncodedClip
from studio.data.clip_shards import ShardStream, StreamPool
from studio.errors import DataError


def webp(count, colour):
    frames = []
    for i in range(count):
        picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        ImageDraw.Draw(picture).rectangle([i, 2, i + 4, 10], fill=(colour, 30 * i, 20, 255))
        frames.append(picture)
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=50, loop=0, lossless=True)
    return buffer.getvalue()


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4, 3 and 2 clips of 1 to 5 frames; one clip is damaged, one has no caption."""
    number = 0
    for shard, count in enumerate((4, 3, 2)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for _ in range(count):
                content = webp(1 + number % 5, 20 * number)
                add(archive, f"a/{number:03d}.webp", content[:40] if number == 5 else content)
                if number != 2:
                    add(archive, f"a/{number:03d}.txt", f"clip {number}\n".encode())
                number += 1
    return tmp_path


def captions(stream, numbers):
    return [stream.clip(number).caption for number in numbers]


def test_every_clip_comes_once_a_round_in_another_order_each_time(shards):
    stream = ShardStream(shards, 8, "a sticker", seed=0)
    rounds = [[stream.member(k)[1].name for k in range(9 * r, 9 * r + 9)] for r in range(3)]
    assert all(sorted(names) == [f"a/{i:03d}.webp" for i in range(9)] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 3
    assert [m.name for _, m in map(ShardStream(shards, 8, "", seed=1).member, range(9))] != rounds[0]


def test_a_place_of_the_stream_does_not_depend_on_what_was_read_before(shards):
    one, two = (ShardStream(shards, 8, "a sticker", seed=0) for _ in range(2))
    forwards = captions(one, range(20))
    assert captions(two, reversed(range(20))) == forwards[::-1]
    assert set(forwards) == {*(f"clip {i}" for i in range(9) if i not in (2, 5)), "a sticker"}


def test_a_damaged_clip_is_named_and_the_next_takes_its_place(shards):
    stream = ShardStream(shards, 8, "", seed=0)
    place = next(k for k in range(9) if stream.member(k)[1].name == "a/005.webp")
    assert stream.clip(place) == stream.clip(place + 1)
    assert list(stream.dropped) == ["1.tar:a/005.webp"]
    assert any("left out: 1.tar:a/005.webp" in line for line in stream.report())


def test_a_streamed_clip_has_its_frames_key_frames_and_time(shards):
    stream = ShardStream(shards, 3, "", seed=0)
    long = next(clip for clip in map(stream.clip, range(9)) if clip.caption == "clip 4")
    assert len(long.kept) == 3
    assert sum(long.durations) == 250
    assert long.loop
    loaded = long.load(lambda picture: picture)
    assert len(loaded.frames) == 3
    assert np.asarray(loaded.frames[0])[5, 2].tolist() == [80, 0, 20, 255]


def encode(clip):
    return EncodedClip(torch.full((1, len(clip.kept), 1, 1), float(clip.caption[-1])), clip.caption, 8.0, False, 0.1)


def test_a_window_on_the_stream_at_a_step_is_the_same_after_a_resume(shards):
    def pool():
        return StreamPool(ShardStream(shards, 8, "clip 2", seed=0), 5, 2, 0, encode)

    whole = pool()
    seen = [[c.caption for c in whole.draw(step, 0, range(4), bucketed=step % 2 == 0)] for step in range(12)]
    resumed = pool()
    again = [[c.caption for c in resumed.draw(step, 0, range(4), bucketed=step % 2 == 0)] for step in range(7, 12)]
    assert again == seen[7:]
    halves = [pool().draw(9, 0, range(2 * i, 2 * i + 2), False) for i in range(2)]  # as two processes draw them
    assert [clip.caption for half in halves for clip in half] == seen[9]
    assert len(whole._looked) == 5  # what has left the window is not kept


def test_a_bucketed_step_has_one_length_and_every_clip_is_drawn(shards):
    pool = StreamPool(ShardStream(shards, 8, "clip 2", seed=0), 9, 1, 0, encode)
    drawn = set()
    for step in range(60):
        clips = pool.draw(step, 0, range(4), bucketed=True)
        assert len({clip.count for clip in clips}) == 1
        drawn |= {clip.caption for clip in clips}
    assert drawn == {f"clip {i}" for i in range(9) if i != 5}


def test_folders_and_shards_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="no shard"):
        ShardStream(tmp_path, 8, "", 0)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="cannot be read"):
        ShardStream(tmp_path, 8, "", 0)
