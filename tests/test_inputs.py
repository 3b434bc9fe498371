"""Second moments of layers' inputs, and sketches of them."""

import pytest
import torch
from shapes import layers

from studio.adapter import Card, new_adapter
from studio.attachment import attach, find_sites
from studio.base import Request
from studio.bases.stable_diffusion import StableDiffusion
from studio.data.cache import Cache
from studio.errors import AdapterError, WorkError
from studio.inputs import (
    PATCHES_UP_TO,
    Gram,
    Sketch,
    base_inputs,
    gram_width,
    input_vectors,
    low_energy_space,
    record_inputs,
    sketch,
    sketches_in,
)
from studio.method import method_from
from studio.patch import LayerShape

PROMPTS, SEEDS, STEPS = ["a cat", "a red dog"], [3, 4], 2


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny()


@pytest.fixture(scope="module")
def grams(base):
    return record_inputs(base, base.sites(), PROMPTS, SEEDS, STEPS)


def covariance(width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, width, generator=generator) * torch.logspace(0, -3, width)
    return rows.T @ rows / 200


@pytest.mark.parametrize("layer_name", list(layers()))
def test_the_layer_is_its_weight_times_the_recorded_vectors(layer_name):
    layer, x = layers()[layer_name]
    shape = LayerShape.of(layer)
    rows = input_vectors(x, shape)
    assert rows.shape[1] == gram_width(shape)
    y = layer(x) if layer.bias is None or layer_name.startswith("linear") else layer(x).movedim(1, -1)
    expected = rows @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_the_vectors_of_a_grouped_convolution_are_those_of_its_groups():
    layer, x = torch.nn.Conv2d(8, 6, 3, groups=2, padding=1), torch.randn(2, 8, 5, 5)
    rows = input_vectors(x, LayerShape.of(layer)).reshape(2, 2, 25, 36)
    y = torch.stack([rows[:, g] @ layer.weight[3 * g : 3 * g + 3].flatten(1).T for g in range(2)], 1)
    expected = (layer(x) - layer.bias[:, None, None]).reshape(2, 2, 3, 25).transpose(2, 3)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_wide_convolution_is_recorded_by_its_channels():
    layer, x = torch.nn.Conv2d(PATCHES_UP_TO // 9 + 1, 4, 3), torch.randn(1, PATCHES_UP_TO // 9 + 1, 5, 5)
    rows = input_vectors(x, LayerShape.of(layer))
    assert rows.shape == (25, PATCHES_UP_TO // 9 + 1)
    assert torch.equal(rows, x[0].flatten(1).T)


def test_recorded_moments_are_those_of_what_the_layers_are_given(base, grams):
    block = "unet.mid_block"
    names = [f"{block}.attentions.0.transformer_blocks.0.attn1.to_q", f"{block}.resnets.0.conv1", "unet.conv_in"]
    seen = {name: [] for name in names}
    sites = base.sites()
    hooks = [
        sites[name].module.register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(args[0].clone()))
        for name in names
    ]
    for prompt, seed in zip(PROMPTS, SEEDS):
        base.generate(Request([prompt], [seed], steps=STEPS))
    for hook in hooks:
        hook.remove()
    for name in names:
        rows = torch.cat([input_vectors(x, sites[name].shape) for x in seen[name]]).double()
        assert len(rows) == grams[name].count
        torch.testing.assert_close(grams[name].matrix.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert seen["unet.conv_in"][0].shape[0] == 2  # with guidance: both halves


def test_layers_with_one_input_share_one_matrix(base, grams):
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    up = "unet.up_blocks.0.attentions.0.transformer_blocks.0"
    assert grams[f"{block}.attn1.to_q"] is grams[f"{block}.attn1.to_k"] is grams[f"{block}.attn1.to_v"]
    assert grams[f"{block}.attn2.to_k"] is grams[f"{up}.attn2.to_v"]  # the text
    assert grams[f"{block}.attn2.to_q"] is not grams[f"{block}.attn1.to_q"]
    attention = base.select(["attention"])
    assert len({id(grams[name]) for name in attention}) == len(attention) // 2 + 1


def test_every_linear_layer_and_convolution_is_recorded_and_hooks_are_taken_off(base, grams):
    wanted = {n for n, s in base.sites().items() if s.shape.kind == "linear" or s.shape.kind.startswith("conv")}
    assert set(grams) == wanted
    for site in base.sites().values():
        assert not site.module._forward_pre_hooks
    for gram in grams.values():
        assert torch.equal(gram.matrix, gram.matrix.T) or (gram.matrix - gram.matrix.T).abs().max() < 1e-6
        assert torch.linalg.eigvalsh(gram.matrix.double()).min() > -1e-5 * gram.matrix.trace()


def test_layers_whose_inputs_part_later_get_matrices_of_their_own(base):
    class Twins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    twins, drawn = Twins(), []

    class Drawer(StableDiffusion):
        def generate(self, request):
            drawn.append(request)
            first = request.seeds[0] == 0
            x = torch.ones(1, 3) * (1 if first else 2)
            twins.one(x), twins.other(x if first else 2 * x)
            return []

    sites = find_sites({"unet": twins})
    found = record_inputs(Drawer(base.name, base.pipe), sites, ["", ""], [0, 1])
    assert torch.equal(found["unet.one"].matrix, torch.full((3, 3), (1 + 4) / 2))
    assert torch.equal(found["unet.other"].matrix, torch.full((3, 3), (1 + 16) / 2))
    assert len(drawn) == 4  # both pictures once more


def test_a_layer_that_is_never_reached_is_named(base):
    with pytest.raises(WorkError, match=r"unet\.lonely"):
        record_inputs(base, find_sites({"unet": torch.nn.ModuleDict({"lonely": torch.nn.Linear(2, 2)})}), ["a cat"])


def test_adapters_on_the_base_take_part_and_detached_ones_do_not(base, grams):
    sites = base.select(["attention"])
    method = method_from({"kind": "lora", "rank": 2})
    shapes = {name: site.shape for name, site in sites.items()}
    adapter = new_adapter(Card(method=method.model_dump(), base=base.identity(), sites=shapes))
    for terms in adapter.patches.values():
        terms["main"].up.data.normal_(generator=torch.Generator().manual_seed(0))
    with attach(sites, adapter.by_site()):
        worn = record_inputs(base, sites, PROMPTS, SEEDS, STEPS)
    name = next(name for name in sites if "up_blocks" in name)
    assert not torch.allclose(worn[name].matrix, grams[name].matrix, rtol=1e-2)
    alone = record_inputs(base, sites, PROMPTS, SEEDS, STEPS)
    assert all(torch.equal(alone[name].matrix, grams[name].matrix) for name in sites)


def test_the_cache_gives_the_same_matrices_and_keeps_each_once(base, tmp_path, monkeypatch):
    sites = base.select(["mid_block*attn?.to_*"])
    first = base_inputs(base, sites, Cache(tmp_path))
    monkeypatch.setattr(StableDiffusion, "generate", lambda *_: pytest.fail("drawn again"))
    second = base_inputs(base, sites, Cache(tmp_path))
    assert set(first) == set(second) == set(sites)
    assert all(torch.equal(first[name], second[name]) for name in sites)
    (file,) = tmp_path.glob("*.safetensors")
    distinct = {first[name].data_ptr() for name in sites}
    assert len(distinct) < len(sites)
    assert file.stat().st_size < 1.2 * sum(first[name].numel() * 4 for name in sites)


# -- directions ----------------------------------------------------------------------------------------------------


def test_low_energy_directions_hold_no_more_than_their_bound():
    matrix = covariance()
    space, bound = low_energy_space(matrix, 15)
    assert (space.T @ space - torch.eye(15, dtype=torch.float64)).abs().max() < 1e-12
    inside = torch.linalg.eigvalsh(space.T @ matrix.double() @ space)
    torch.testing.assert_close(float(inside.max()), bound, rtol=1e-6, atol=0)
    assert bound < torch.linalg.eigvalsh(matrix.double())[15]


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_sketch_keeps_the_trace_and_errs_no_more_than_its_last_energy(rank):
    matrix = covariance().double()
    found = sketch(Gram(matrix.float(), 1), rank)
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
    error = torch.linalg.matrix_norm(found.matrix().double() - matrix, 2)
    assert error <= eigenvalues[rank] * (1 + 1e-5) + 1e-6 * eigenvalues[0]
    assert error <= found.energies[-1] + 1e-6 * eigenvalues[0]
    torch.testing.assert_close(float(found.matrix().trace()), float(matrix.trace()), rtol=1e-5, atol=0)
    assert abs(found.captured - float(eigenvalues[:rank].sum() / eigenvalues.sum())) < 1e-5
    other = Sketch(found.basis, found.energies, found.residual * 1.1)
    assert (found.matrix() - matrix).norm() <= (other.matrix() - matrix).norm()


def test_a_sketch_of_full_rank_is_the_matrix():
    matrix = covariance()
    for rank in (24, 99):
        found = sketch(matrix, rank)
        assert (found.matrix() - matrix).abs().max() < 1e-5
        assert found.captured == 1.0


def test_a_sketch_multiplies_without_its_matrix():
    found, x = sketch(covariance(), 5), torch.randn(24, 3)
    torch.testing.assert_close(found.times(x), found.matrix() @ x, rtol=1e-4, atol=1e-5)


def test_sketches_travel_as_tensors_and_half_precision_costs_a_thousandth():
    matrix = covariance()
    tensors = {f"unet.a.to_q.sketch.{name}": value for name, value in sketch(matrix, 8).tensors().items()}
    tensors["unet.a.to_q.main.up"] = torch.zeros(1)
    assert tensors["unet.a.to_q.sketch.basis"].dtype == torch.float16
    (site, found), *others = sketches_in(tensors).items()
    assert (site, others) == ("unet.a.to_q", [])
    assert (found.matrix() - sketch(matrix, 8).matrix()).norm() < 1e-3 * matrix.norm()
    del tensors["unet.a.to_q.sketch.energies"]
    with pytest.raises(AdapterError, match="'energies'"):
        sketches_in(tensors)
    tensors["unet.a.to_q.sketch.energies"] = torch.zeros(5)
    with pytest.raises(AdapterError, match="do not fit"):
        sketches_in(tensors)
