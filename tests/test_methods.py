"""The contract of every method that patches layers, run over the registry: a new file in `trainers/` is found here."""

import copy

import pytest
import torch
from shapes import layers

from studio.adapter import Card, load_adapter, new_adapter
from studio.attachment import Site, attach, find_sites
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import AdapterError, PresetError
from studio.method import Origin, PatchMethod, RankedMethod, method_from, methods
from studio.patch import Delta, LayerShape

KINDS = [
    kind
    for kind, cls in methods().items()
    if issubclass(cls, PatchMethod)
    and cls.trainable
    and cls.has_weight_form  # inserted modules have tests of their own
]
LAYERS = list(layers())
ORIGIN = Origin("concept", 3)


def patched(kind, layer_name, **settings):
    """A layer, its input, and a fresh patch; settings that the method has not are left out."""
    layer, x = layers()[layer_name]
    return layer, x, fresh(kind, layer, **settings)


def fresh(kind, layer, origin=ORIGIN, **settings):
    cls = methods()[kind]
    method = method_from({"kind": kind, **{k: v for k, v in settings.items() if k in cls.model_fields}})
    return method.patches({"unet.layer": LayerShape.of(layer)}, origin, {"unet.layer": layer})["unet.layer"]


def add_delta(dense, patch, weight=1.0):
    """Adds a patch's delta to a layer's own parameters."""
    dense.weight += weight * patch.delta(dense.weight)
    if (bias := patch.bias_delta()) is not None:
        dense.bias += weight * bias


def train_a_little(patch):
    generator = torch.Generator().manual_seed(1)
    for parameter in patch.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return patch


def site(layer):
    return {"unet.layer": Site("unet.layer", layer, LayerShape.of(layer))}


def tiny_adapter(kind, targets=("attention",), seed=3, base=None, **settings):
    base = base or StableDiffusion.tiny()
    method = method_from({"kind": kind, "target_modules": list(targets), **settings})
    sites = base.select(method.target_modules)
    card = Card(
        method=method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: s.shape for name, s in sites.items()},
        concept="c",
        seed=seed,
    )
    return base, sites, new_adapter(card, {name: s.module for name, s in sites.items()})


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_patch_changes_nothing(kind, layer_name):
    layer, x, patch = patched(kind, layer_name)
    before = layer(x)
    with attach(site(layer), {"unet.layer": [patch]}):
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_patched_layer_equals_the_layer_with_its_dense_delta(kind, layer_name):
    layer, x, patch = patched(kind, layer_name, rank=4)
    train_a_little(patch)
    assert isinstance(patch, Delta)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        add_delta(dense, patch, 0.7)
        assert (dense.weight - layer.weight).norm() > 0.05
        with attach(site(layer), {"unet.layer": [patch]}, 0.7):
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_detach_restores_the_layer_bit_for_bit(kind, layer_name):
    layer, x, patch = patched(kind, layer_name)
    before, keys, attributes = layer(x), list(layer.state_dict()), set(vars(layer))
    attachment = attach(site(layer), {"unet.layer": [train_a_little(patch)]})
    assert list(layer.state_dict()) == keys
    assert not torch.equal(layer(x), before)
    attachment.detach()
    assert torch.equal(layer(x), before)
    assert set(vars(layer)) == attributes
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("kind", KINDS)
def test_patches_on_one_layer_add_up_and_leave_in_any_order(kind):
    layer, x, first = patched(kind, "conv2d")
    second = fresh(kind, layer, Origin("other", 4))
    before, dense = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        pristine = copy.deepcopy(layer)
        for patch, weight in ((train_a_little(first), 0.5), (train_a_little(second), 2.0)):
            change = copy.deepcopy(pristine)
            add_delta(change, patch, weight)
            for total, part, own in zip(dense.parameters(), change.parameters(), pristine.parameters(), strict=True):
                total += part - own
        one = attach(site(layer), {"unet.layer": [first]}, 0.5)
        other = attach(site(layer), {"unet.layer": [second]}, 2.0)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    one.detach()
    other.detach()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_origin_gives_the_same_bits(kind):
    for name, (layer, _) in layers().items():
        one, two = (fresh(kind, layer).state_dict() for _ in range(2))
        assert all(torch.equal(one[key], two[key]) for key in one), name


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_factor_by_step_two(kind, layer_name):
    layer, x, patch = patched(kind, layer_name)
    optimizer = torch.optim.SGD(patch.parameters(), 0.1)
    with attach(site(layer), {"unet.layer": [patch]}, train=True) as attachment:
        for _ in range(2):
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()
            attachment.refresh()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in patch.parameters())


@pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(methods()[k], RankedMethod)])
def test_rank_and_alpha_follow_their_patterns(kind):
    base, sites, adapter = tiny_adapter(kind, rank=4, rank_pattern={"to_q": 2, "*mid_block*to_k": 3}, alpha=8.0)
    for name in sites:
        wanted = 2 if name.endswith("to_q") else 3 if "mid_block" in name and name.endswith("to_k") else 4
        patch = adapter.patches[name]["main"]
        assert patch.rank == wanted
        assert patch.scale == 8.0 / wanted


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip_to_the_same_bytes(kind, tmp_path):
    base, sites, adapter = tiny_adapter(kind, ("attention", "conv"))
    for terms in adapter.patches.values():
        for patch in terms.values():
            train_a_little(patch)
    adapter.save(tmp_path / "one.safetensors")
    loaded = load_adapter(tmp_path / "one.safetensors")
    loaded.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert loaded.card == adapter.card
    for name, s in sites.items():
        one, two = (a.patches[name]["main"].delta(s.module.weight) for a in (adapter, loaded))
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_another_architecture_is_refused_and_left_alone(kind):
    base, _, adapter = tiny_adapter(kind)
    other = torch.nn.ModuleDict({"mid_block": torch.nn.Linear(3, 3)})
    with pytest.raises(AdapterError, match="is not in this base"):
        attach(find_sites({"unet": other}), adapter.by_site())
    assert "forward" not in vars(other["mid_block"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_convolution_is_refused_with_its_name(kind):
    layer = torch.nn.Conv2d(8, 8, 3, groups=2)
    try:
        patch = train_a_little(fresh(kind, layer))
    except PresetError as error:
        assert "unet.layer" in error.message
        return
    x, dense = torch.randn(1, 8, 6, 6), copy.deepcopy(layer)
    with torch.no_grad(), attach(site(layer), {"unet.layer": [patch]}):
        add_delta(dense, patch)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_on_a_tiny_base(kind):
    base, sites, adapter = tiny_adapter(kind, ("attention", "conv"))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = {k: v.repeat(4, 1, 1) for k, v in base.encode_prompts(["a cat"], (16, 16)).items()}
    times = torch.tensor([100, 300, 500, 700])
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noisy, target = base.objective.noised(latents, noise, times), base.objective.target(latents, noise, times)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    with attach(sites, adapter.by_site(), train=True) as attachment:
        for _ in range(12):
            loss = (base.predict(noisy, times, condition) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            attachment.refresh()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_unknown_method_or_key_names_the_nearest():
    with pytest.raises(PresetError) as caught:
        method_from({"kind": "orthogonl"})
    assert "orthogonal" in caught.value.hint
    with pytest.raises(PresetError) as caught:
        method_from({"kind": "lora", "rnk": 3})
    assert "method.rnk" in caught.value.message
    assert "rank" in caught.value.hint
