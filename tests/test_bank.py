"""The concept bank: what a prompt calls is worn, merged where it is several; slots tell how full they are."""

import json
import os
import time

import pytest
import torch
from test_merging import assert_same, dense, merged, trained

from studio import library, slots
from studio.adapter import load_adapter
from studio.bank import pick
from studio.bases.registry import load_base
from studio.bases.sdxl import StableDiffusionXL
from studio.slots import Bank, claim


@pytest.fixture
def base(tiny_base_folder):
    return load_base(str(tiny_base_folder))


def stored(tmp_path, base, name, word, seed, **changes):
    path = trained(tmp_path / f"{name}.safetensors", seed, targets=("attention",), base=base)
    adapter = load_adapter(path)
    adapter.card.trigger = word
    for key, value in changes.items():
        setattr(adapter.card, key, value)
    adapter.save(path)
    return library.add(name, path, {"base": base.name})


def test_whole_trigger_words_pick_their_adapters_in_the_order_of_the_prompt(tmp_path, base):
    stored(tmp_path, base, "cat", "blip", 1)
    stored(tmp_path, base, "dog", "zorp", 2)
    stored(tmp_path, base, "both", "blip, zorp", 3, parents=[{"name": "cat"}, {"name": "dog"}])
    assert [e.name for e in pick("a Zorp beside a blip").entries] == ["dog", "cat"]
    assert [e.name for e in pick("a blip").entries] == ["cat"]
    assert [e.name for e in pick("a blip", taken=["cat"]).entries] == []
    nothing = pick("a blipper and a zorps")
    assert (nothing.entries, nothing.base) == ([], "")
    assert "no adapter of the library" in nothing.warnings[0]


def test_one_is_worn_as_it_is_and_several_as_their_merge(tmp_path, base):
    paths = [stored(tmp_path, base, "cat", "blip", 1), stored(tmp_path, base, "dog", "zorp", 2)]
    (alone,) = pick("a blip").worn(base)
    assert_same(dense(alone.adapter), dense(load_adapter(paths[0])))
    chosen = pick("a blip and a zorp")
    (together,) = chosen.worn(base)
    assert_same(dense(together.adapter), dense(merged(dict.fromkeys(paths, 1.0))))
    assert together.base == base.name
    assert any("overlap" in text for text in chosen.warnings)


def test_the_newest_of_one_word_counts_and_other_bases_are_left_out(tmp_path, base):
    old, new = stored(tmp_path, base, "old", "blip", 1), stored(tmp_path, base, "new", "blip", 2)
    os.utime(old, ns=(1, 1))
    chosen = pick("a blip")
    assert [e.name for e in chosen.entries] == ["new"]
    assert "also: old" in chosen.warnings[0]
    assert new.exists()
    stored(tmp_path, StableDiffusionXL.tiny(), "large", "zorp", 3)
    chosen = pick("a blip and a zorp")
    assert [e.name for e in chosen.entries] == ["new"]
    assert "another base: left out" in chosen.warnings[-1]
    assert [e.name for e in pick("a zorp and a blip").entries] == ["large"]


def test_hundreds_of_concepts_are_looked_through_in_a_second(tmp_path, base):
    path = stored(tmp_path, base, "cat", "blip", 1)
    for number in range(300):
        os.link(path, library.library_dir() / f"a{number}.safetensors")
    pick("warm")
    began = time.process_time()
    assert len(pick("a blip").entries) == 1
    assert time.process_time() - began < 1


def test_generate_takes_from_the_bank_what_the_prompt_calls(tmp_path, base, capsys):
    from studio.cli import run as cli

    stored(tmp_path, base, "cat", "blip", 1)
    stored(tmp_path, base, "dog", "zorp", 2)
    drawn = {}
    for name, words in (
        ("bank", ["--bank"]),
        ("plain", ["--base", base.name]),
        ("both", ["--adapter", "cat", "--bank"]),
    ):
        out = tmp_path / f"{name}.png"
        assert cli(["generate", "a blip and a zorp", *words, "--steps", "2", "--out", str(out)]) == 0
        drawn[name] = out.read_bytes()
    assert drawn["bank"] != drawn["plain"]
    told = capsys.readouterr().err
    assert "from the bank: cat" in told
    assert told.count("from the bank: dog") == 2


def test_the_listing_of_slots_says_what_is_taken_and_what_to_do_when_all_are(capsys):
    from studio.cli import run as cli

    assert slots.overview() == []
    bank = Bank("sticker", "arch", "layout-1")
    for slot, word in enumerate(("blip", "zorp")):
        claim(bank, f"concept {slot}", slot, 16, 48, word)
    (facts,) = slots.overview()
    assert (facts["columns_taken"], facts["columns"], facts["free_slots"], facts["full"]) == (32, 48, 1, False)
    claim(bank, "concept 2", 2, 16, 48, "third")
    assert cli(["library", "slots"]) == 0
    told = capsys.readouterr().out
    assert "full for rank 16" in told
    assert "gram" in told
    assert "zorp" in told
    assert cli(["library", "slots", "--free", "zorp", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert [row["trigger"] for row in facts["holdings"]] == ["blip", "third"]
    assert not facts["full"]
    assert torch.tensor(facts["columns_taken"]) == 32
