"""Merging: exact where it says so, the same bytes for the same recipe, and nothing written where it is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_methods import tiny_adapter

from studio.adapter import HEADER_KEY, load_adapter
from studio.attachment import attach
from studio.bases.sdxl import StableDiffusionXL
from studio.deltas import Dense, LowRank
from studio.errors import AdapterError, PresetError, RequestError
from studio.inputs import sketch
from studio.merging import Merger, make_plan, make_recipe, parse_parts, read_recipe, strategies
from studio.merging.fusion import gram_fusion
from studio.merging.strategy import Meeting
from studio.method import PatchMethod, method_from, methods
from studio.patch import Delta
from studio.preset import make_preset


def trained(path, seed, kind="lora", targets=("attention", "conv"), base=None, **settings):
    """An adapter file whose numbers are random, as after a training."""
    base, _, adapter = tiny_adapter(kind, targets, seed, base, **{"rank": 3, **settings})
    adapter.card.concept = f"concept {seed}"
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save(path)
    return path


@pytest.fixture
def pair(tmp_path):
    """Two LoRAs of one base: other ranks, other scales, other layers."""
    one = trained(tmp_path / "one.safetensors", 1, alpha=7.0)
    other = trained(tmp_path / "other.safetensors", 2, targets=("attention",), rank=5, rslora=True)
    return one, other


def merged(parts, out=None, **recipe):
    plan = make_plan(make_recipe({"adapters": {str(k): v for k, v in parts.items()}, "strategy": "sum", **recipe}))
    merger = Merger(plan)
    if out is None:
        return merger.adapter()
    merger.save(out)
    return load_adapter(out)


def dense(adapter):
    """The change of every weight, in fp64."""
    found = {}
    for site, terms in adapter.patches.items():
        weight = torch.zeros(adapter.card.sites[site].weight)
        found[site] = sum(patch.delta(weight).double() for patch in terms.values())
    return found


def factored(adapter):
    """The same from the factors, in fp64."""
    found = {}
    for site, terms in adapter.patches.items():
        pairs = [patch.low_rank() for patch in terms.values()]
        found[site] = sum(
            (up.double().flatten(1) @ down.double().flatten(1)).reshape(adapter.card.sites[site].weight)
            for down, up in pairs
        )
    return found


def assert_same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for site in one:
        assert (one[site] - other[site]).norm() <= tolerance * max(1e-30, float(other[site].norm())), site


def test_one_adapter_at_weight_one_is_itself_bit_for_bit(pair, tmp_path):
    for number, path in enumerate(pair):
        own, result = load_adapter(path), merged({path: 1.0}, tmp_path / f"{number}.safetensors")
        for site, terms in own.patches.items():
            weight = torch.zeros(own.card.sites[site].weight)
            low = [patch for patch in result.patches[site].values() if patch.low_rank()]
            if low:  # elsewhere dense is smaller, and the same product up to its own rounding
                assert torch.equal(terms["main"].delta(weight), low[0].delta(weight)), site
        assert_same(dense(result), dense(own))


def test_a_sum_equals_the_sum_of_the_deltas(pair, tmp_path):
    one, other = (factored(load_adapter(path)) for path in pair)
    result = merged({pair[0]: 0.7, pair[1]: -0.6}, tmp_path / "m.safetensors")
    for site, found in dense(result).items():
        wanted = 0.7 * one.get(site, 0) - 0.6 * other.get(site, 0)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_the_order_and_a_second_time_give_the_same_bytes(pair, tmp_path):
    for strategy in strategies():
        if strategy == "gram":
            continue
        recipe = {"strategy": strategy, "seed": 3, **({"rank": 4} if strategy == "svd" else {})}
        merged({pair[0]: 0.7, pair[1]: 0.6}, tmp_path / "a.safetensors", **recipe)
        merged({pair[1]: 0.6, pair[0]: 0.7}, tmp_path / "b.safetensors", **recipe)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes(), strategy


def test_zero_weights_take_part_in_nothing_and_all_zero_is_refused(pair):
    assert_same(dense(merged({pair[0]: 1.0, pair[1]: 0.0})), dense(load_adapter(pair[0])))
    with pytest.raises(RequestError, match="every weight is zero"):
        merged({pair[0]: 0.0, pair[1]: 0.0})


def test_block_weights_reach_their_blocks_alone(pair):
    plain = dense(merged({pair[0]: 0.5}))
    own = dense(merged({pair[0]: {"weight": 0.5, "blocks": {"mid_block": 2.0, "*.to_q": 0.0}}}))
    for site, delta in plain.items():
        factor = 2.0 if "mid_block" in site else 0.0 if site.endswith("to_q") else 1.0
        if factor:
            torch.testing.assert_close(own[site], factor * delta)
        else:
            assert site not in own


def test_merge_equals_attaching_both(pair):
    base, sites, _ = tiny_adapter("lora")
    result = merged({pair[0]: 0.7, pair[1]: 0.6})
    one, other = map(load_adapter, pair)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = {k: v.repeat(2, 1, 1) for k, v in base.encode_prompts(["a cat"], (16, 16)).items()}
    times = torch.tensor([10, 500])
    sites = base.sites()
    with torch.no_grad():
        before = base.predict(x, times, condition)
        with attach(sites, one.by_site(), 0.7), attach(sites, other.by_site(), 0.6):
            wanted = base.predict(x, times, condition)
        with attach(sites, result.by_site()):
            found = base.predict(x, times, condition)
        assert (wanted - before).norm() > 0.01 * before.norm()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(base.predict(x, times, condition), before)


@pytest.mark.parametrize(("strategy", "form"), [("sum", "FixedLowRank"), ("ties", "FixedDense")])
def test_a_merge_works_on_a_base_in_half_precision(pair, strategy, form):
    base, _, _ = tiny_adapter("lora")
    for parameter in base.pipe.unet.parameters():
        parameter.data = parameter.data.bfloat16()
    result = merged(
        {pair[0]: 0.7, pair[1]: 0.6}, strategy=strategy, **({"tolerance": 0} if form == "FixedDense" else {})
    )
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert [type(patch).__name__ for patch in result.patches[name].values()] == [form]
    layer = base.sites()[name].module
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = layer(x)
        with attach(base.sites(), {name: result.by_site()[name]}):
            assert layer(x).dtype == torch.bfloat16
            assert not torch.equal(layer(x), plain)


def test_a_merge_of_merges_is_the_merge(pair, tmp_path):
    merged({pair[0]: 0.7}, tmp_path / "a.safetensors")
    merged({pair[1]: -1.2}, tmp_path / "b.safetensors")
    twice = merged({tmp_path / "a.safetensors": 1.0, tmp_path / "b.safetensors": 0.5})
    assert_same(dense(twice), dense(merged({pair[0]: 0.7, pair[1]: -0.6})))


def test_ranks_add_up_until_dense_is_smaller(pair):
    result = merged({pair[0]: 1.0, pair[1]: 1.0})
    for site, terms in result.patches.items():
        (patch,) = terms.values()
        height, width = (
            result.card.sites[site].weight[0],
            patch.delta(torch.zeros(result.card.sites[site].weight))[0].numel(),
        )
        total = 3 + (5 if "attn" in site else 0)
        low = patch.low_rank()
        if low is not None:
            assert low[0].shape[0] <= total
            assert low[0].shape[0] * (height + width) < height * width


def test_svd_comes_down_to_the_rank_and_says_what_it_cost(pair):
    plan = make_plan(make_recipe({"adapters": [str(p) for p in pair], "strategy": "svd", "rank": 4}))
    merger = Merger(plan)
    found, exact = dense(merger.adapter()), dense(merged(dict.fromkeys(pair, 1.0)))
    whole = sum(delta.square().sum() for delta in exact.values())
    error = float((sum((found[site] - exact[site]).square().sum() for site in exact) / whole) ** 0.5)
    assert 0.01 < error < 0.9
    assert merger.report.error == pytest.approx(error, rel=1e-3)
    for site, delta in exact.items():
        singular = torch.linalg.svdvals(delta.flatten(1))
        row = next(row for row in merger.report.rows if row.site == site)
        if row.rank == 4:
            assert row.error == pytest.approx(
                float((singular[4:].square().sum() / singular.square().sum()) ** 0.5), abs=1e-4
            )
    assert "approximate" in merger.report.label


def test_a_tolerance_holds_in_every_layer(pair):
    exact = dense(merged(dict.fromkeys(pair, 1.0)))
    found = dense(merged(dict.fromkeys(pair, 1.0), strategy="svd", rank="auto", tolerance=0.2))
    for site, delta in exact.items():
        assert (found[site] - delta).norm() <= 0.2001 * delta.norm()


def test_the_card_tells_parents_weights_and_hashes(pair, tmp_path):
    card = merged({pair[0]: 0.7, pair[1]: -0.6}, tmp_path / "m.safetensors").card
    from studio.files import sha256_of

    assert {p["name"]: p["weight"] for p in card.parents} == {"one": 0.7, "other": -0.6}
    assert {p["sha256"] for p in card.parents} == {sha256_of(path) for path in pair}
    assert str(tmp_path) not in json.dumps(card.model_dump(mode="json"))


def test_a_recipe_in_yaml_does_the_same(pair, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "strategy: sum\n"
        "adapters:\n  one.safetensors: 0.7\n  other.safetensors: {weight: -0.6, blocks: {mid_block: 0.5}}\n"
    )
    found = Merger(make_plan(read_recipe(recipe))).adapter()
    assert_same(dense(found), dense(merged({pair[0]: 0.7, pair[1]: {"weight": -0.6, "blocks": {"mid_block": 0.5}}})))


def test_a_merged_adapter_is_no_method_to_train():
    with pytest.raises(PresetError, match="not trained"):
        method_from({"kind": "merged"}).patch("unet.x", None, None)


# -- gram ------------------------------------------------------------------------------------------------------------


def meeting(count, seed=0, rank=2, width=12, height=9):
    g = torch.Generator().manual_seed(seed)
    deltas = [
        LowRank.of(
            torch.randn(rank, width, generator=g, dtype=torch.float64),
            torch.randn(height, rank, generator=g, dtype=torch.float64),
        )
        for _ in range(count)
    ]
    return Meeting("unet.x", deltas, [1.0] * count, [str(i) for i in range(count)])


def moment(seed, width=12, rank=None):
    x = torch.randn(width, rank or 3 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / x.shape[1]


def whole(matrix):
    """A sketch that keeps everything, in fp64."""
    from studio.inputs import Sketch

    energies, basis = torch.linalg.eigh(matrix)
    return Sketch(basis.flip(1), energies.flip(0).clamp(min=0), torch.zeros((), dtype=torch.float64))


def test_gram_equals_the_dense_least_squares_solution():
    m = meeting(3)
    m.weights = [1.0, -0.5, 2.0]
    cs, cb = [moment(i) for i in range(3)], moment(9)
    m.sketches, m.base_sketch = [whole(c) for c in cs], whole(cb)
    found = gram_fusion(m, keep_base=0.3, eps=0.01)
    trace = sum(c.trace() for c in cs) + 0.3 * cb.trace()
    big = sum(cs) + 0.3 * cb + 0.01 * trace / 12 * torch.eye(12, dtype=torch.float64)
    wanted = sum(w * d.matrix() @ c for w, d, c in zip(m.weights, m.deltas, cs)) @ torch.linalg.inv(big)
    torch.testing.assert_close(found.matrix(), wanted, rtol=1e-9, atol=1e-10)
    assert found.low_rank().rank == 6


def test_gram_of_adapters_with_the_same_inputs_is_the_plain_mean():
    m = meeting(3)
    m.sketches = [whole(moment(4))] * 3
    mean = sum(d.matrix() for d in m.deltas) / 3
    torch.testing.assert_close(gram_fusion(m, keep_base=0.0, eps=0.0).matrix(), mean, rtol=1e-9, atol=1e-10)


def test_gram_keeps_every_concept_exactly_where_their_inputs_are_disjoint():
    m = meeting(3)
    blocks = [torch.zeros(12, 12, dtype=torch.float64) for _ in range(3)]
    for i, block in enumerate(blocks):
        block[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = moment(i, 4)
    m.sketches = [whole(block) for block in blocks]
    found = gram_fusion(m, keep_base=0.0, eps=0.0).matrix()
    for i, delta in enumerate(m.deltas):
        own = slice(4 * i, 4 * i + 4)
        torch.testing.assert_close(found[:, own], delta.matrix()[:, own], rtol=1e-12, atol=1e-12)


def test_gram_by_woodbury_equals_gram_by_the_dense_matrix():
    m = meeting(2, width=64)
    cs = [moment(i, 64) for i in range(2)]
    sketches = [sketch(c, 8) for c in cs]
    m.sketches = sketches
    found = gram_fusion(m, keep_base=0.0, eps=1e-3).matrix()
    full = [s.times(torch.eye(64, dtype=torch.float64)) for s in sketches]
    big = sum(full) + 1e-3 * sum(c.trace() for c in full) / 64 * torch.eye(64, dtype=torch.float64)
    wanted = sum(d.matrix() @ c for d, c in zip(m.deltas, full)) @ torch.linalg.inv(big)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_gram_for_a_kernel_uses_the_sketch_of_the_channels_at_each_place():
    g = torch.Generator().manual_seed(0)
    deltas = [
        LowRank.of(
            torch.randn(2, 6, 3, 3, generator=g, dtype=torch.float64),
            torch.randn(5, 2, 1, 1, generator=g, dtype=torch.float64),
        )
        for _ in range(2)
    ]
    m = Meeting("unet.x", deltas, [1.0, 1.0], ["a", "b"])
    cs = [moment(i, 6) for i in range(2)]
    m.sketches = [whole(c) for c in cs]
    found = gram_fusion(m, keep_base=0.0, eps=1e-3).dense()
    big = sum(cs) + 1e-3 * sum(c.trace() for c in cs) / 6 * torch.eye(6, dtype=torch.float64)
    wanted = sum(torch.einsum("oikl,ij->ojkl", d.dense(), c @ torch.linalg.inv(big)) for d, c in zip(deltas, cs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def with_sketches(path, seed):
    """Adds sketches of made-up inputs to an adapter's file."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    card, tensors = json.loads(header[HEADER_KEY]), load_file(path)
    for number, (site, shape) in enumerate(card["sites"].items()):
        width = torch.Size(shape["weight"][1:]).numel()
        tensors |= {f"{site}.sketch.{k}": v for k, v in sketch(moment(seed + number, width), 8).tensors().items()}
    save_file(tensors, path, header)
    return path


def test_gram_reads_sketches_from_the_files_and_auto_chooses_it(pair, tmp_path):
    with pytest.raises(RequestError, match="has no sketch"):
        merged(dict.fromkeys(pair, 1.0), strategy="gram")
    for number, path in enumerate(pair):
        with_sketches(path, 100 * number)
    plan = make_plan(make_recipe({"adapters": [str(p) for p in pair]}))
    assert plan.choice.strategy == "gram"
    result = Merger(plan).adapter()
    plain = merged(dict.fromkeys(pair, 1.0))
    assert set(result.card.sites) == set(plain.card.sites)
    assert any((dense(result)[s] - dense(plain)[s]).norm() > 0.1 * dense(plain)[s].norm() for s in dense(plain))


def test_auto_without_sketches_sums_and_warns_of_concepts_that_read_the_same_inputs(tmp_path):
    base, sites, one = tiny_adapter("orthogonal", rank=2, basis="subset")
    two = tiny_adapter("orthogonal", rank=2, basis="subset", base=base)[2]
    for seed, adapter in enumerate((one, two)):
        g = torch.Generator().manual_seed(seed)
        for terms in adapter.patches.values():
            patch = terms["main"]
            patch.up.data = torch.randn(patch.up.shape, generator=g)
            eye = torch.eye(patch.down.shape[1])  # disjoint inputs by hand
            patch.down.copy_(eye[2 * seed : 2 * seed + 2])
        adapter.save(tmp_path / f"{seed}.safetensors")
    files = [str(tmp_path / f"{n}.safetensors") for n in range(2)]
    plan = make_plan(make_recipe({"adapters": files}))
    assert (plan.choice.strategy, plan.warnings) == ("sum", [])
    for number, file in enumerate(files):
        with_sketches(Path(file), 100 * number)
    assert make_plan(make_recipe({"adapters": files})).choice.strategy == "gram"  # inputs have a part in both
    a, b = trained(tmp_path / "a.safetensors", 1), trained(tmp_path / "b.safetensors", 1, rank=4)
    plan = make_plan(make_recipe({"adapters": [str(a), str(b)]}))
    assert plan.choice.strategy == "sum"
    assert "overlap" in plan.warnings[0]


# -- other strategies ------------------------------------------------------------------------------------------------


def run(name, m, **options):
    chosen = strategies()[name]
    return chosen.rule(m, **chosen.options(options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sum", {}),
        ("ties", {"density": 1}),
        ("dare", {"density": 1}),
        ("tsv", {}),
        ("knots", {"density": 1}),
        ("della", {"density": 1, "window": 0}),
    ],
)
def test_one_adapter_kept_whole_is_itself_by_every_strategy(name, options):
    m = meeting(1, width=30)
    torch.testing.assert_close(run(name, m, **options).matrix(), m.deltas[0].matrix(), rtol=1e-9, atol=1e-9)


def test_ties_trims_elects_and_averages_those_that_agree():
    changes = [[3.0, -1.0, 0.5, 2.0], [1.0, 2.0, 0.1, -4.0]]
    m = Meeting("x", [Dense(torch.tensor([row])) for row in changes], [1.0, 1.0], ["a", "b"])
    # Density 3/4 trims 0.5 and 0.1; the signs of the sums are +, +, 0, -; means over those that agree.
    assert run("ties", m, density=0.75).dense().tolist() == [[2.0, 2.0, 0.0, -4.0]]


def test_dare_is_unbiased_in_the_mean_over_seeds():
    m = meeting(2, height=4, width=6)
    exact = sum(d.matrix() for d in m.deltas)
    draws = []
    for m.seed in range(2000):
        draws.append(run("dare", m, density=0.3).matrix())
    spread = torch.stack(draws).std(0) / 2000**0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() < 5 * spread + 1e-12).all()


def test_dare_does_not_depend_on_who_else_is_there():
    both, one = meeting(2), meeting(2)
    one.deltas, one.weights, one.keys = one.deltas[1:], [1.0], ["1"]
    first = meeting(1)
    total = run("dare", both).matrix()
    torch.testing.assert_close(total, run("dare", one).matrix() + run("dare", first).matrix())


def test_della_keeps_large_numbers_more_often():
    m = Meeting("x", [Dense(torch.linspace(0.1, 1, 400).repeat(200, 1))], [1.0], ["a"])
    kept = run("della", m, density=0.5, window=0.8).dense() != 0
    assert kept[:, 300:].float().mean() > 0.75
    assert kept[:, :100].float().mean() < 0.25


def test_pcb_follows_its_formula():
    changes = torch.tensor([[3.0, -1.0, 0.5, 2.0], [1.0, 2.0, 0.1, -4.0]], dtype=torch.float64)
    m = Meeting("x", [Dense(row[None]) for row in changes], [1.0, 1.0], ["a", "b"])

    def unit(v):
        return (v - v.min()) / (v.max() - v.min())

    shares = []
    for row in changes:
        score = torch.exp(2 * unit(row.abs()) ** 2) * torch.tanh(row * changes.sum(0))
        shares.append(unit(score.clamp(min=score.sort().values[1])))  # the best three of four
    weights = torch.stack(shares)
    wanted = (weights * changes).sum(0) / weights.sum(0).clamp(min=1e-12)
    torch.testing.assert_close(run("pcb", m, keep=0.75).dense()[0], wanted)


def test_tsv_makes_the_singular_vectors_orthogonal():
    m = meeting(3, width=30, height=20)
    low = run("tsv", m).low_rank()
    singular = torch.cat([torch.linalg.svdvals(d.matrix())[:2] for d in m.deltas])
    torch.testing.assert_close(torch.linalg.svdvals(low.matrix())[:6], singular.sort(descending=True).values)


def test_knots_with_everything_kept_agrees_in_output_space():
    m = meeting(2, width=30, height=20)
    low = run("knots", m, density=1).low_rank()
    both = torch.cat([d.matrix() for d in m.deltas], 1)
    basis = torch.linalg.qr(torch.cat([d.up for d in m.deltas], 1))[0]
    torch.testing.assert_close(basis @ (basis.T @ low.matrix()), low.matrix())
    assert low.rank == torch.linalg.matrix_rank(both)


def test_strategies_that_fill_a_weight_come_down_to_the_parents_ranks(pair):
    for name in ("ties", "dare", "pcb", "della"):
        plan = make_plan(make_recipe({"adapters": [str(p) for p in pair], "strategy": name}))
        merger = Merger(plan)
        merger.adapter()
        assert max(row.rank or 0 for row in merger.report.rows) <= 8
        assert 0 < merger.report.error < 1
        exact = Merger(make_plan(make_recipe({"adapters": [str(p) for p in pair], "strategy": name, "tolerance": 0})))
        exact.adapter()
        assert exact.report.error == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message", "hint"),
    [
        ({"strategy": "gramm"}, "unknown strategy 'gramm'", "gram"),
        ({"stratgy": "sum"}, "unknown key 'stratgy'", "strategy"),
        ({"strategy": "ties", "options": {"densty": 1}}, "unknown key 'options.densty'", "density"),
        ({"strategy": "ties", "options": {"density": 2}}, "density", ""),
        ({"rank": 0}, "rank", ""),
        ({"tolerance": "much"}, "tolerance", ""),
        ({"strategy": "svd"}, "svd", "--rank"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(pair, tmp_path, recipe, message, hint):
    out = tmp_path / "out" / "m.safetensors"
    with pytest.raises(RequestError) as caught:
        merged(dict.fromkeys(pair, 1.0), out, **recipe)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not out.exists()


@pytest.mark.parametrize("weight", ["much", float("nan"), float("inf"), None])
def test_a_weight_that_is_no_number_is_refused(pair, weight):
    with pytest.raises(RequestError):
        merged({pair[0]: weight})


def test_weights_of_the_command_line():
    assert parse_parts(["cat:0.5", "dog", "x/y.safetensors:-2"]) == [
        {"adapter": "cat", "weight": 0.5},
        {"adapter": "dog"},
        {"adapter": "x/y.safetensors", "weight": -2.0},
    ]
    with pytest.raises(RequestError, match="no weight"):
        parse_parts(["cat:strong"])


def test_a_block_that_is_nowhere_is_refused(pair):
    with pytest.raises(RequestError, match="no layer matches 'middle_block'"):
        merged({pair[0]: {"weight": 1, "blocks": {"middle_block": 0.5}}})


def test_adapters_of_different_bases_are_refused_naming_both(pair, tmp_path):
    other = trained(tmp_path / "xl.safetensors", 3, base=StableDiffusionXL.tiny())
    with pytest.raises(AdapterError) as caught:
        merged({pair[0]: 1.0, other: 1.0})
    assert "sdxl" in caught.value.message
    assert "stable_diffusion" in caught.value.message


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(pair, tmp_path):
    with safe_open(pair[0], "pt") as file:
        header = file.metadata()
    tensors = load_file(pair[0])
    name = sorted(tensors)[5]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, pair[0], header)
    with pytest.raises(AdapterError) as caught:
        merged(dict.fromkeys(pair, 1.0), tmp_path / "out" / "m.safetensors")
    assert name in caught.value.message
    assert not list((tmp_path / "out").iterdir())


def test_damaged_foreign_and_pickled_files_are_refused(pair, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pair[0].read_bytes()[:-9])
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(b"PK\x03\x04" + bytes(30))
    for path, word in ((cut, "truncated"), (pickled, "pickle"), (tmp_path / "none.safetensors", "no adapter")):
        with pytest.raises(RequestError, match=word):
            merged({path: 1.0})


def test_too_little_memory_is_told_before_anything_is_written(pair, tmp_path):
    recipe = make_recipe({"adapters": [str(p) for p in pair], "strategy": "ties"})
    with pytest.raises(RequestError) as caught:
        make_plan(recipe, max_bytes=1 << 20)
    assert "--max-ram" in caught.value.message
    assert "--max-ram" in caught.value.hint


def test_a_preset_with_the_kind_merged_is_refused():
    with pytest.raises(PresetError):
        method_from(make_preset({"base": "sticker", "method": {"kind": "merged"}}).method).resolved({}, None, None)


# -- the command line and Python -------------------------------------------------------------------------------------


def command(capsys, *words):
    from studio.cli import run as cli

    code = cli(["merge", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_a_file_or_an_entry_of_the_library(pair, tmp_path, capsys):
    from studio import library

    out = tmp_path / "both.safetensors"
    code, text, _ = command(capsys, f"{pair[0]}:0.7", f"{pair[1]}:-0.6", "--out", out, "--strategy", "sum", "--json")
    facts = json.loads(text)
    assert (code, facts["result"]) == (0, "exact sum")
    assert_same(dense(load_adapter(out)), dense(merged({pair[0]: 0.7, pair[1]: -0.6})))
    assert facts["bytes"] == out.stat().st_size
    code, text, _ = command(capsys, out, "--name", "both", "--max-ram", "8GiB")
    assert code == 0
    assert "both x 1" in text
    assert library.find("both").exists()
    assert library.facts_of(library.find("both"))["base"]


def test_the_command_refuses_with_one_line_and_exit_code_2(pair, tmp_path, capsys):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    for words, message in (
        ([pair[0]], "one place"),
        ([], "one place"),
        (["--out", tmp_path / "x.safetensors"], "needs adapters"),
        ([pair[0], "--out", taken], "exists already"),
        ([pair[0], "--out", pair[0], "--force"], "one of the adapters"),
        ([f"{pair[0]}:strong", "--out", tmp_path / "x.safetensors"], "no weight"),
        ([pair[0], "--out", tmp_path / "x.safetensors", "--max-ram", "lots"], "no amount of memory"),
        ([pair[0], "--out", tmp_path / "x.safetensors", "--rank", "few"], "neither a number nor auto"),
        ([pair[0], "--out", tmp_path / "x.txt"], "no .safetensors"),
    ):
        code, text, error = command(capsys, *words)
        assert (code, text) == (2, ""), words
        assert error.startswith("error: "), words
        assert message in error
        assert len(error.strip().splitlines()) <= 2
    assert taken.read_bytes() == b"mine"
    assert not (tmp_path / "x.safetensors").exists()


def test_python_merges_as_the_command_does(pair, tmp_path):
    import studio

    merger = studio.merge({str(pair[0]): 0.7, str(pair[1]): -0.6}, strategy="sum")
    report = merger.save(tmp_path / "m.safetensors")
    assert report.label == "exact sum"
    merged({pair[0]: 0.7, pair[1]: -0.6}, tmp_path / "n.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


def test_a_merged_adapter_loads_in_plain_diffusers_with_the_same_deltas(pair, tmp_path):
    from studio.bases.stable_diffusion import StableDiffusion
    from studio.exporting import export_adapter

    attention = trained(tmp_path / "c.safetensors", 5, targets=("attention",), rank=1)
    other = trained(tmp_path / "d.safetensors", 6, targets=("attention",), rank=2)
    result = merged({attention: 0.7, other: 0.6})
    report = export_adapter(result, StableDiffusion.tiny(), "diffusers", tmp_path / "lora")
    assert report.status == "exact"  # a fresh process with nothing of ours has compared every layer


def test_a_layer_that_is_smaller_dense_is_an_exact_lora_too(tmp_path):
    from studio.bases.stable_diffusion import StableDiffusion
    from studio.exporting import export_adapter

    parents = [trained(tmp_path / f"{seed}.safetensors", seed, targets=("unet.conv_out",), rank=4) for seed in (5, 6)]
    result = merged(dict.fromkeys(parents, 0.7))
    assert set(result.patches["unet.conv_out"]) == {"dense"}
    report = export_adapter(result, StableDiffusion.tiny(), "diffusers", tmp_path / "lora")
    assert report.status == "exact"


@pytest.mark.parametrize("room", [0, 40, 4096])
def test_a_spooled_file_is_read_whatever_room_its_header_had(room, tmp_path):
    from studio.merging.spool import Spool

    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.zeros(0, 2)}
    with Spool(tmp_path / "x.safetensors", header_bytes=room) as spool:
        for name, value in tensors.items():
            spool.add(name, value)
        spool.finish({"note": "ä" * 20})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"note": "ä" * 20}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.safetensors"]


# -- every method of the registry ----------------------------------------------------------------------------------

KINDS = [
    k
    for k, c in methods().items()
    if issubclass(c, PatchMethod) and c.trainable and not k.startswith("music-")  # these are for another family
]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_method_merge_with_a_lora_to_the_sum_of_both(kind, tmp_path):
    base, sites, adapter = tiny_adapter(kind)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    patches = [p for terms in adapter.patches.values() for p in terms.values()]
    if not all(isinstance(p, Delta) for p in patches):
        pytest.skip("adds modules that are no change of weights")
    adapter.save(tmp_path / "own.safetensors")
    lora = trained(tmp_path / "lora.safetensors", 2, targets=("attention",), rank=1)
    recipe = make_recipe({"adapters": {str(tmp_path / "own.safetensors"): 0.5, str(lora): -1.0}, "strategy": "sum"})
    if any(p.depends_on_weight for p in patches):
        with pytest.raises(RequestError):
            make_plan(recipe, lambda _: StableDiffusionXL.tiny())  # its change is one of other weights
    plan = make_plan(recipe, lambda _: base)
    Merger(plan).save(tmp_path / "m.safetensors")
    result, other = load_adapter(tmp_path / "m.safetensors"), load_adapter(lora)
    all_sites = base.sites()
    for site, terms in result.patches.items():
        weight = all_sites[site].module.weight.detach()
        wanted = torch.zeros_like(weight)
        for source, strength in ((adapter, 0.5), (other, -1.0)):
            for patch in source.patches.get(site, {}).values():
                wanted += strength * patch.delta(weight).detach()
        found = sum(patch.delta(weight).detach() for patch in terms.values())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert set(result.patches) == set(adapter.patches) | set(other.patches)
