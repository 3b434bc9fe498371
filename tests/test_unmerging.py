"""Taking a parent out of a merge again, and merges in few bits."""

import json

import pytest
import torch
from test_merging import assert_same, command, dense, merged, trained

from studio.adapter import load_adapter
from studio.attachment import attach
from studio.deltas import LowRank
from studio.deltas.coding import Code, coding_error, decode
from studio.errors import RequestError
from studio.importing.opening import open_sources
from studio.merging.unmerging import Unmerger


@pytest.fixture
def three(tmp_path):
    """Three LoRAs of other ranks; the second changes convolutions too, the third far fewer layers."""
    found = []
    for seed, targets, rank in ((1, ("attention",), 3), (2, ("attention", "conv"), 2), (3, ("*.mid_block.*.to_q",), 4)):
        path = trained(tmp_path / f"p{seed}.safetensors", seed, targets=targets, rank=rank)
        adapter = load_adapter(path)
        adapter.card.trigger = f"word{seed}"
        adapter.save(path)
        found.append(path)
    return found


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_sum_without_a_parent_is_the_sum_of_the_others_to_the_byte(three, tmp_path, taken):
    weights = dict(zip(three, (0.7, -0.6, 1.0), strict=True))
    merged(weights, tmp_path / "all.safetensors")
    merged({p: w for p, w in weights.items() if p != three[taken]}, tmp_path / "others.safetensors")
    Unmerger(str(tmp_path / "all.safetensors"), str(three[taken])).save(tmp_path / "left.safetensors")
    left, others = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("left", "others"))
    assert left.card == others.card
    blocks = [site for site in others.patches if "low_rank" in left.patches[site]]
    assert blocks
    for site in blocks:
        if "low_rank" in others.patches[site]:
            for a, b in zip(left.patches[site]["low_rank"].low_rank(), others.patches[site]["low_rank"].low_rank()):
                assert torch.equal(a, b), site
    assert_same(dense(left), dense(others))


def test_the_card_is_enough_where_the_parents_are_side_by_side(three, tmp_path):
    merged({three[0]: 0.5, three[2]: 1.0}, tmp_path / "m.safetensors", rank=None)
    three[2].unlink()
    assert _side_by_side(load_adapter(tmp_path / "m.safetensors"))
    left = Unmerger(str(tmp_path / "m.safetensors"), "word3").adapter()
    assert_same(dense(left), dense(merged({three[0]: 0.5})))


def test_a_fusion_gives_a_parents_columns_back_and_a_competition_does_not(three, tmp_path):
    from test_merging import with_sketches

    two = [with_sketches(path, 50 * n) for n, path in enumerate((three[0], three[2]))]
    merged(dict.fromkeys(two, 1.0), tmp_path / "gram.safetensors", strategy="gram")
    whole = load_adapter(tmp_path / "gram.safetensors")
    assert _side_by_side(whole)
    left = Unmerger(str(tmp_path / "gram.safetensors"), str(two[1])).adapter()
    first = next(i for i, parent in enumerate(whole.card.parents) if parent["name"] == "p1")
    for number, site in enumerate(whole.card.sites):
        rank = whole.card.parents[first]["ranks"][number]
        before = sum(p["ranks"][number] for p in whole.card.parents[:first])
        up = whole.patches[site]["low_rank"].low_rank()[1][:, before : before + rank]
        assert torch.equal(left.patches[site]["low_rank"].low_rank()[1], up)
    merged(dict.fromkeys(two, 1.0), tmp_path / "ties.safetensors", strategy="ties")
    with pytest.raises(RequestError, match="'ties' has mixed the parents"):
        Unmerger(str(tmp_path / "ties.safetensors"), str(two[1]))


def test_a_fusion_keeps_parents_apart_also_where_dense_is_smaller(tmp_path):
    from test_merging import with_sketches

    two = [trained(tmp_path / f"q{n}.safetensors", n, targets=("*.conv_out",), rank=4) for n in (1, 2)]
    two = [with_sketches(path, 50 * n) for n, path in enumerate(two)]
    merged(dict.fromkeys(two, 1.0), tmp_path / "sum.safetensors", strategy="sum")
    assert not _side_by_side(load_adapter(tmp_path / "sum.safetensors"))  # of four outputs and rank 8
    merged(dict.fromkeys(two, 1.0), tmp_path / "gram.safetensors", strategy="gram")
    assert _side_by_side(load_adapter(tmp_path / "gram.safetensors"))
    left = [Unmerger(str(tmp_path / "gram.safetensors"), str(path)).adapter() for path in two]
    whole, one, other = (dense(adapter) for adapter in (load_adapter(tmp_path / "gram.safetensors"), *left))
    assert_same(whole, {site: one[site] + other[site] for site in whole})


def _side_by_side(adapter):
    return all(-1 not in parent["ranks"] for parent in adapter.card.parents)


def test_what_is_no_parent_or_no_merge_is_refused_by_name(three, tmp_path):
    merged({three[0]: 0.5, three[1]: 1.0}, tmp_path / "m.safetensors")
    for path, parent, message in (
        (three[0], "word1", "is no merge"),
        (tmp_path / "m.safetensors", "word3", "'word3' is no parent"),
        (tmp_path / "m.safetensors", str(three[2]), "is no parent"),
    ):
        with pytest.raises(RequestError, match=message):
            Unmerger(str(path), parent)


def test_the_command_takes_a_parent_out(three, tmp_path, capsys):
    merged({three[0]: 0.5, three[1]: 1.0}, tmp_path / "m.safetensors")
    out = tmp_path / "left.safetensors"
    code, text, error = command(capsys, tmp_path / "m.safetensors", "--without", three[1], "--out", out, "--json")
    assert code == 0, error
    assert [parent["name"] for parent in json.loads(text)["parents"]] == ["p1"]
    assert_same(dense(load_adapter(out)), dense(merged({three[0]: 0.5})))
    code, _, error = command(
        capsys, tmp_path / "m.safetensors", three[0], "--without", "word1", "--out", out, "--force"
    )
    assert code == 2
    assert "--without takes a parent out of one merge" in error


def test_old_merges_without_columns_in_their_card_need_the_parents_file(three, tmp_path):
    merged({three[0]: 0.5, three[1]: 1.0}, tmp_path / "m.safetensors")
    old = load_adapter(tmp_path / "m.safetensors")
    for parent in old.card.parents:
        del parent["ranks"]
    old.save(tmp_path / "old.safetensors")
    left = Unmerger(str(tmp_path / "old.safetensors"), str(three[1])).adapter()
    wanted = dense(merged({three[0]: 0.5}))
    found = dense(left)
    for site, delta in found.items():
        scale = max(float(wanted[site].norm()) if site in wanted else 0.0, 1.0)
        assert (delta - wanted.get(site, 0)).norm() < 1e-5 * scale
    three[1].rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(RequestError, match="run together"):
        Unmerger(str(tmp_path / "old.safetensors"), "word2")


# -- few bits --------------------------------------------------------------------------------------------------------


def low_rank(seed=0, rank=4, shape=(24, 30)):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator), shape
    )


def test_codes_come_back_within_their_bounds():
    low = low_rank()
    tensors = Code.parse("int8").encode(low)
    back = decode(tensors, low.shape)
    assert all(value.dtype == torch.int8 for name, value in tensors.items() if name.endswith("codes"))
    assert ((back.down - low.down).abs() <= low.down.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    assert ((back.up - low.up).abs() <= low.up.abs().amax(0) / 127 * 0.501).all()
    assert 0 < coding_error(low, tensors) < 0.02
    again = Code.parse("int8").encode(back)
    assert all(torch.equal(tensors[name], again[name]) for name in ("down_codes", "up_codes"))
    signs = Code.parse("ternary:0.5").encode(low)
    whole = decode(signs, low.shape)
    assert set(whole.down.div(signs["down_scales"][:, None]).round().unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float((whole.down != 0).float().mean()) - 0.5) < 0.01
    exact = float((whole.matrix() - low.matrix()).norm() / low.matrix().norm())
    assert abs(coding_error(low, signs) - exact) < 1e-4


@pytest.mark.parametrize("code", ["int8", "ternary:0.3"])
def test_a_coded_adapter_is_small_tells_its_error_and_decodes_to_a_plain_one(three, tmp_path, code):
    plain = merged({three[0]: 1.0}, tmp_path / "plain.safetensors")
    coded = merged({three[0]: 1.0}, tmp_path / "coded.safetensors", compress=code)
    sites = [site for site, terms in coded.patches.items() if "low_rank" in terms]
    assert sites
    one, two = dense(plain), dense(coded)
    wrong = sum(float((one[s] - two[s]).square().sum()) for s in one) ** 0.5
    whole = sum(float(one[s].square().sum()) for s in one) ** 0.5
    assert abs(coded.card.method["error"] - wrong / whole) < 1e-3 * max(1.0, wrong / whole)
    decoded = merged({tmp_path / "coded.safetensors": 1.0}, tmp_path / "decoded.safetensors")
    assert all("low_rank" not in t or hasattr(t["low_rank"], "down") for t in decoded.patches.values())
    assert_same(dense(decoded), dense(coded))
    (source,) = open_sources([str(tmp_path / "coded.safetensors")], lambda name: None)
    assert source.read(sites[0], None)[0].rank == 3


def test_a_coded_adapter_works_on_a_base_as_its_deltas_say(three, tmp_path):
    from studio.bases.stable_diffusion import StableDiffusion

    base = StableDiffusion.tiny()
    coded = merged({three[1]: 1.0}, tmp_path / "coded.safetensors", compress="int8")
    decoded = merged({tmp_path / "coded.safetensors": 1.0})
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition, time = base.encode_prompts(["a cat"], (16, 16)), torch.tensor([300])
    with torch.no_grad():
        plain = base.predict(x, time, condition)
        found = []
        for adapter in (coded, decoded):
            with attach(base.sites(), adapter.by_site()):
                found.append(base.predict(x, time, condition))
    assert (found[0] - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    coded.save(tmp_path / "again.safetensors")  # what was worn leaves nothing in the file
    assert (tmp_path / "again.safetensors").stat().st_size <= (tmp_path / "coded.safetensors").stat().st_size + 4096


def test_unknown_codes_are_refused(three, tmp_path, capsys):
    for code in ("int4", "ternary:2", "ternary:x"):
        status, _, error = command(capsys, three[0], "--compress", code, "--out", tmp_path / "x.safetensors")
        assert status == 2
        assert "no compression" in error
    assert not (tmp_path / "x.safetensors").exists()
