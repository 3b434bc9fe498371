"""DoRA: its norms without dense products, its exact start, its gradient. Parity with PEFT is in test_lora.py."""

import copy

import pytest
import torch
from shapes import layers
from torch import nn

from studio.adapter import Card, load_adapter, new_adapter
from studio.attachment import Site, attach
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import AdapterError, ExportRefused, PresetError
from studio.exporting import export_adapter
from studio.generation import Use, wearing
from studio.method import Origin, method_from
from studio.patch import LayerShape, Patch

ORIGIN = Origin("concept", 3)
LAYERS = list(layers())


def site(layer):
    return {"unet.layer": Site("unet.layer", layer, LayerShape.of(layer))}


def fresh(layer, **settings):
    method = method_from({"kind": "dora", "rank": 3, "alpha": 5.0, **settings})
    return method.patch("unet.layer", LayerShape.of(layer), ORIGIN, layer.weight)


def trained(layer, **settings):
    patch = fresh(layer, **settings)
    generator = torch.Generator().manual_seed(0)
    patch.up.data.normal_(generator=generator)
    patch.magnitude.data *= 1 + 0.2 * torch.randn(patch.magnitude.shape, generator=generator)
    return patch


def direction(patch, weight):
    """V as a matrix (O, I k...)."""
    return weight.flatten(1) + patch.scale * patch.up.flatten(1) @ patch.down.flatten(1)


class Shift(Patch):
    """Somebody else's input term."""

    def input_term(self, x, call):
        return 0.3 * x.flip(-1)


@pytest.mark.parametrize("name", LAYERS)
def test_delta_is_the_papers_formula(name):
    layer, _ = layers()[name]
    patch = trained(layer)
    torch.testing.assert_close(fresh(layer).magnitude, layer.weight.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    patch, weight = patch.double(), layer.weight.double()
    patch.norm.copy_(weight.flatten(1).norm(dim=1))
    v = direction(patch, weight)
    length = v.norm(dim=1)
    torch.testing.assert_close(patch.gain(weight), patch.magnitude / length, rtol=1e-12, atol=0)
    formula = (patch.magnitude / length)[:, None] * v - weight.flatten(1)
    torch.testing.assert_close(patch.delta(weight), formula.reshape(weight.shape), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_start_is_exact_in_every_dtype(name, dtype):
    layer, x = layers()[name]
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        before = layer(x)
        with attach(site(layer), {"unet.layer": [fresh(layer)]}, 0.7):
            assert torch.equal(layer(x), before)
    assert fresh(layer).gain(layer.weight).eq(1).all()
    assert not fresh(layer).delta(layer.weight).any()


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_changes_neither_the_start_nor_the_gain(name):
    layer, x = layers()[name]
    start, patch = fresh(layer), trained(layer)
    exact = patch.gain(layer.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = layer(x)
        assert torch.equal(patch.gain(layer.weight), exact)
        with attach(site(layer), {"unet.layer": [start]}):
            assert torch.equal(layer(x), before)
        with attach(site(layer), {"unet.layer": [patch]}):
            rounded = layer(x)
    dense = copy.deepcopy(layer)
    dense.weight.data += patch.delta(layer.weight)
    assert (rounded - dense(x)).norm() < 0.02 * dense(x).norm()


@pytest.mark.parametrize("name", LAYERS)
def test_a_half_precision_base_is_served_in_its_own_dtype(name):
    layer, x = layers()[name]
    half = copy.deepcopy(layer).to(torch.bfloat16)
    patch = trained(half)
    dense = copy.deepcopy(half).float()
    dense.weight.data += patch.delta(half.weight)
    with attach(site(half), {"unet.layer": [patch]}), torch.no_grad():
        y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    exact = dense(x.to(torch.bfloat16).float())
    assert (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d stride 2", "conv2d reflected"])
def test_an_input_term_of_another_patch_does_not_shift_it(name):
    layer, x = layers()[name]
    patch, shift = trained(layer), Shift()
    dense = copy.deepcopy(layer)
    change = nn.functional.linear(x, patch.delta(layer.weight)) if x.ndim < 4 else None
    if change is None:
        dense.weight.data, dense.bias = patch.delta(layer.weight), None
        change = dense(x)
    with attach(site(layer), {"unet.layer": [shift]}), torch.no_grad():
        shifted = layer(x)
        with attach(site(layer), {"unet.layer": [patch]}, 0.5):
            torch.testing.assert_close(layer(x), shifted + 0.5 * change, rtol=1e-4, atol=1e-5)


def test_the_norm_is_a_constant_in_the_gradient():
    layer, x = layers()["linear"]
    patch = trained(layer)
    with attach(site(layer), {"unet.layer": [patch]}):
        layer(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in patch.named_parameters()}
    for detached in (True, False):
        patch.zero_grad()
        v = direction(patch, layer.weight)
        length = v.norm(dim=1).detach() if detached else v.norm(dim=1)
        weight = (patch.magnitude / length)[:, None] * v
        nn.functional.linear(x, weight, layer.bias).square().sum().backward()
        for name in ("down", "up"):
            assert torch.allclose(found[name], patch.get_parameter(name).grad, rtol=1e-3, atol=1e-4) == detached
        torch.testing.assert_close(found["magnitude"], patch.magnitude.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass(name):
    layer, x = (
        (nn.Linear(60, 50), torch.randn(2, 60))
        if name == "linear"
        else (nn.Conv2d(20, 30, 3), torch.randn(1, 20, 5, 5))
    )
    layer.requires_grad_(False)
    patch, kept = trained(layer), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        attach(site(layer), {"unet.layer": [patch]}),
    ):
        layer(x.requires_grad_())
    own = {tensor.data_ptr() for tensor in kept if tensor.numel() >= layer.weight.numel()}
    assert own <= {layer.weight.data_ptr()}


def test_a_row_of_zeros_is_plain_lora_and_never_nan():
    layer, x = layers()["linear"]
    layer.weight.data[2] = 0
    before = layer(x)
    with attach(site(layer), {"unet.layer": [fresh(layer)]}):
        assert torch.equal(layer(x), before)
    patch = trained(layer)
    update = patch.scale * patch.up @ patch.down
    torch.testing.assert_close(patch.delta(layer.weight)[2], update[2], rtol=1e-5, atol=1e-6)
    with attach(site(layer), {"unet.layer": [patch]}):
        layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in patch.parameters())
    assert patch.magnitude.grad[2] == 0


def test_a_patch_that_does_not_know_its_weight_gives_no_plausible_numbers():
    patch = method_from("dora").patch("unet.layer", LayerShape("linear", (4, 6)), ORIGIN)
    assert patch.delta(torch.randn(4, 6)).isnan().all()


def test_dropout_drops_inputs_of_both_parts_and_in_training_alone():
    layer, x = layers()["linear"]
    patch = trained(layer, dropout=0.5)
    with attach(site(layer), {"unet.layer": [patch]}), torch.no_grad():
        torch.manual_seed(1)
        ours = layer(x)
        torch.manual_seed(1)
        dropped = nn.functional.dropout(x, 0.5)
        patch.eval()
        whole = layer(x)
    alone, delta = nn.functional.linear(x, layer.weight, layer.bias), patch.delta(layer.weight)
    torch.testing.assert_close(ours, alone + nn.functional.linear(dropped, delta), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, alone + nn.functional.linear(x, delta), rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_are_refused_by_name():
    with pytest.raises(PresetError, match=r"unet\.layer.*2 groups"):
        method_from("dora").patch("unet.layer", LayerShape("conv2d", (8, 4, 3, 3), groups=2), ORIGIN)


@pytest.fixture(scope="module")
def adapter():
    base = StableDiffusion.tiny()
    method = method_from({"kind": "dora", "rank": 2, "target_modules": ["mid_block*to_q", "mid_block*conv1"]})
    sites = base.select(method.target_modules, method.kinds)
    shapes = {name: site.shape for name, site in sites.items()}
    card = Card(method=method.model_dump(mode="json"), base=base.identity(), sites=shapes, concept="c")
    made = new_adapter(card, {name: site.module for name, site in sites.items()})
    for terms in made.patches.values():
        terms["main"].up.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return base, made


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_lora_file_cannot_hold_it_and_the_refusal_says_what_can(adapter, to, tmp_path):
    base, made = adapter
    with pytest.raises(ExportRefused) as caught:
        export_adapter(made, base, to, tmp_path / "lora")
    assert "no exact low-rank form" in caught.value.message
    assert "--to checkpoint" in caught.value.hint
    assert "--to diff" in caught.value.hint
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("to", ["diff", "checkpoint"])
def test_dense_and_merged_exports_are_exact(adapter, to, tmp_path):
    base, made = adapter
    report = export_adapter(made, base, to, tmp_path / "out")
    assert report.status == "exact"
    assert {row.site for row in report.rows} == set(made.patches)
    assert min(row.norm for row in report.rows) > 0


def test_a_file_knows_the_weights_it_was_made_for(adapter, tmp_path):
    base, made = adapter
    made.save(tmp_path / "dora.safetensors")
    loaded = load_adapter(tmp_path / "dora.safetensors")
    for name, terms in made.patches.items():
        weight = base.sites()[name].module.weight
        assert torch.equal(loaded.patches[name]["main"].delta(weight), terms["main"].delta(weight))
    with wearing(base, [Use("mine", loaded)]):
        pass
    with (
        pytest.raises(AdapterError, match="depends on the weights"),
        wearing(StableDiffusion.tiny(seed=1), [Use("mine", loaded)]),
    ):
        pass
