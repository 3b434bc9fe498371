"""The baselines equal PEFT's: LoRA, conv-LoRA, LoRA on embeddings and DoRA, with the same numbers in the factors."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from studio.attachment import Site, attach
from studio.method import Origin, method_from
from studio.patch import LayerShape

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 6, bias=False), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3), (2, 6, 8, 8)),
    "conv2d padded": (lambda: nn.Conv2d(6, 10, 3, padding=1, bias=False), (2, 6, 8, 8)),
    "conv2d strided": (lambda: nn.Conv2d(6, 10, 4, stride=2, padding=3), (2, 6, 8, 8)),
    "conv2d same": (lambda: nn.Conv2d(6, 10, 3, padding="same"), (2, 6, 8, 8)),
    "conv2d oblong": (lambda: nn.Conv2d(6, 10, (1, 3), stride=(1, 2), padding=(0, 1)), (2, 6, 5, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (1, 4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), (3, 4)),
    "embedding with padding": (lambda: nn.Embedding(11, 6, padding_idx=2), (3, 4)),
}
RANK, ALPHA = 3, 5.0
CASES = [("lora", name) for name in LAYERS] + [("dora", name) for name in LAYERS if "embedding" not in name]


def ours_and_theirs(kind, name, **settings):
    """Our patch and PEFT's layer in fp64 around copies of one layer, with the same trained factors; and an input."""
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer = make().double().requires_grad_(False)
    x = torch.randint(0, 11, size) if name.startswith("embedding") else torch.randn(size, dtype=torch.float64)
    root = nn.Module()
    root.layer = copy.deepcopy(layer)
    dora = kind == "dora"
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], use_dora=dora, use_rslora="rslora" in settings
    )
    theirs = inject_adapter_in_model(config, root).layer
    origin = Origin("concept", 3)
    shape = LayerShape.of(layer)
    method = method_from({"kind": kind, "rank": RANK, "alpha": ALPHA, **settings})
    patch = method.patch("unet.layer", shape, origin, layer.weight).double()
    patch.up.data.normal_()
    twins = twin_parameters(patch, theirs)
    if dora:
        torch.testing.assert_close(patch.magnitude.data, twins["magnitude"].data.flatten(), rtol=1e-6, atol=0)
        patch.norm.copy_(layer.weight.flatten(1).norm(dim=1))  # in the finer fp64 of this comparison
        patch.magnitude.data.copy_(patch.norm * (1 + 0.2 * torch.randn_like(patch.norm)))
    for key, theirs_value in twins.items():
        value = getattr(patch, key).data
        theirs_value.data.copy_((value.T if shape.kind == "embedding" else value).reshape(theirs_value.shape))
    return layer, x, patch, theirs, twins


def twin_parameters(patch, theirs):
    """PEFT's parameter for each of ours; of embeddings it has the transposes, A for our `up`."""
    if patch.shape.kind == "embedding":
        return {"up": theirs.lora_embedding_A["default"], "down": theirs.lora_embedding_B["default"]}
    twins = {"down": theirs.lora_A["default"].weight, "up": theirs.lora_B["default"].weight}
    return twins | (
        {"magnitude": theirs.lora_magnitude_vector["default"].weight} if hasattr(patch, "magnitude") else {}
    )


def site(layer):
    return {"unet.layer": Site("unet.layer", layer, LayerShape.of(layer))}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_outputs_and_gradients_equal_pefts(kind, name):
    layer, x, patch, theirs, twins = ours_and_theirs(kind, name)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    with attach(site(layer), {"unet.layer": [patch]}):
        out = layer(x)
    reference = theirs(x)
    torch.testing.assert_close(out, reference, rtol=1e-11, atol=1e-12)
    assert (out - layer(x)).abs().mean() > 0.05
    cotangent = torch.randn_like(out)
    own = torch.autograd.grad(out, [*inputs, *(getattr(patch, key) for key in twins)], cotangent)
    other = torch.autograd.grad(reference, [*inputs, *twins.values()], cotangent)
    for one, two in zip(own, other, strict=True):
        assert one.abs().sum() > 0
        two = two.T if patch.shape.kind == "embedding" else two
        torch.testing.assert_close(one, two.reshape(one.shape), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_merged_weights_equal_pefts(kind, name):
    layer, _, patch, theirs, _ = ours_and_theirs(kind, name)
    theirs.merge()
    with torch.no_grad():
        merged = layer.weight + patch.delta(layer.weight)
    assert (merged - layer.weight).norm() > 0.1
    torch.testing.assert_close(merged, theirs.base_layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rank_stabilised_scale_equals_pefts(kind):
    layer, x, patch, theirs, _ = ours_and_theirs(kind, "linear", rslora=True)
    with attach(site(layer), {"unet.layer": [patch]}):
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_fresh_factors_are_distributed_as_pefts(name):
    make, _ = LAYERS[name]
    torch.manual_seed(0)
    root = nn.Module()
    root.layer = make()
    wide = 512  # many numbers for the comparison; the rank is clamped to the layer in ours, so it is compared by spread
    shape = LayerShape.of(root.layer)
    theirs = inject_adapter_in_model(LoraConfig(r=wide, target_modules=["layer"]), root).layer
    patches = [method_from({"kind": "lora", "rank": 3}).patch(f"unet.{i}", shape, Origin("c", 0)) for i in range(200)]
    down = torch.stack([patch.down.detach() for patch in patches])
    if shape.kind == "embedding":
        reference, zero = theirs.lora_embedding_B["default"], theirs.lora_embedding_A["default"]
    else:
        reference, zero = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert not zero.any()
    assert not any(patch.up.any() for patch in patches)
    torch.testing.assert_close(down.std(), reference.detach().std(), rtol=0.05, atol=0)
    if shape.kind != "embedding":
        torch.testing.assert_close(down.abs().max(), reference.detach().abs().max(), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["embedding", "embedding with padding"])
def test_an_embedding_equals_the_one_with_its_dense_delta(name):
    layer, x, patch, _, _ = ours_and_theirs("lora", name)
    dense = copy.deepcopy(layer)
    dense.weight += 0.7 * patch.delta(layer.weight).detach()
    before = layer(x)
    with attach(site(layer), {"unet.layer": [patch]}, 0.7):
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-7)
    assert torch.equal(layer(x), before)
    down, up = patch.low_rank()
    assert (down.shape, up.shape) == ((RANK, 6), (11, RANK))
    torch.testing.assert_close(up @ down, patch.delta(layer.weight).float(), rtol=1e-5, atol=1e-6)
