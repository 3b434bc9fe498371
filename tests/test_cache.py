"""The cache: computed once, the same bits from disk, and never the end of a run."""

import errno

import pytest
import torch

import studio.files
from studio.data.cache import Cache


class Computed:
    """Draws tensors and counts how often it was asked."""

    def __init__(self, **tensors):
        self.tensors, self.times = tensors or {"latents": torch.randn(1, 4, 8, 8), "ids": torch.arange(5)}, 0

    def __call__(self):
        self.times += 1
        return self.tensors


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_computed_once_and_read_bit_for_bit_by_the_next_process(tmp_path):
    compute = Computed(a=torch.randn(3, 2).to(torch.bfloat16), b=torch.randn(4, 4).t(), c=torch.tensor(1.5))
    first = Cache(tmp_path / "new" / "folder").get("key", compute)
    again = Cache(tmp_path / "new" / "folder").get("key", compute)
    assert compute.times == 1
    assert same(first, compute.tensors)
    assert same(again, compute.tensors)


def test_keys_do_not_meet_and_do_not_show_on_disk(tmp_path):
    cache = Cache(tmp_path)
    one, two = Computed(), Computed()
    cache.get("my secret/../caption", one)
    cache.get("my secret/../caption ", two)
    assert same(cache.get("my secret/../caption", one), one.tensors)
    files = list(tmp_path.rglob("*"))
    assert len(files) == 2
    assert all(b"secret" not in f.name.encode() + f.read_bytes() for f in files)


def test_tensors_that_share_memory_or_carry_gradients_are_kept(tmp_path):
    whole = torch.randn(4, 4, requires_grad=True)
    got = Cache(tmp_path).get("key", lambda: {"whole": whole, "part": whole[1:]})
    assert same(got, {"whole": whole.detach(), "part": whole.detach()[1:]})
    assert not Cache(tmp_path).get("key", Computed())["part"].requires_grad


@pytest.mark.parametrize("position", [0, 7, 9, 40, 100, -3, -200])
def test_a_flipped_bit_is_found_and_computed_anew(tmp_path, position):
    cache, compute = Cache(tmp_path), Computed()
    cache.get("key", compute)
    content = bytearray(cache.path("key").read_bytes())
    content[position] ^= 0x04
    cache.path("key").write_bytes(content)
    assert same(cache.get("key", compute), compute.tensors)
    assert compute.times == 2
    cache.get("key", compute)
    assert compute.times == 2  # mended on disk
    assert cache.warnings == []


@pytest.mark.parametrize(("old", "new"), [(b'"F32"', b'"I32"'), (b'"ids"', b'"odd"'), (b"[1,4,8,8]", b"[1,8,4,8]")])
def test_a_changed_header_is_found_and_computed_anew(tmp_path, old, new):
    cache, compute = Cache(tmp_path), Computed()
    cache.get("key", compute)
    content = cache.path("key").read_bytes()
    assert content.count(old) == 1
    cache.path("key").write_bytes(content.replace(old, new))
    assert same(cache.get("key", compute), compute.tensors)
    assert compute.times == 2


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_file_is_computed_anew(tmp_path, length):
    cache, compute = Cache(tmp_path), Computed()
    cache.get("key", compute)
    cache.path("key").write_bytes(cache.path("key").read_bytes()[:length])
    assert same(cache.get("key", compute), compute.tensors)
    assert compute.times == 2


def test_a_full_disk_costs_memory_and_one_warning(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = Cache(tmp_path)
    before = Computed()
    cache.get("before", before)
    monkeypatch.setattr(studio.files.os, "fsync", full)
    one, two = Computed(), Computed()
    for _ in range(2):
        assert same(cache.get("one", one), one.tensors)
        assert same(cache.get("two", two), two.tensors)
        assert same(cache.get("before", before), before.tensors)
    assert (before.times, one.times, two.times) == (1, 1, 1)
    assert len(cache.warnings) == 1
    assert "No space left" in cache.warnings[0]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [cache.path("before").name]  # no debris


def test_a_folder_that_cannot_be_made_costs_memory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache, compute = Cache(tmp_path / "file" / "cache"), Computed()
    assert same(cache.get("key", compute), compute.tensors)
    assert same(cache.get("key", compute), compute.tensors)
    assert compute.times == 1
    assert len(cache.warnings) == 1


def test_what_a_caller_does_to_its_tensors_stays_with_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "cache", tmp_path / "file"):
        cache, compute = Cache(folder), Computed()
        cache.get("key", compute)["latents"].zero_()
        cache.get("key", compute)["latents"].zero_()
        assert cache.get("key", compute)["latents"].abs().sum() > 0


def test_errors_of_the_computation_are_the_callers(tmp_path):
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Cache(tmp_path).get("key", fails)
    compute = Computed()
    assert same(Cache(tmp_path).get("key", compute), compute.tensors)
