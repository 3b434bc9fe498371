"""FLoRA against tensorly's Tucker form, against dense weights, and in plain diffusers. Modes: (in, out, *kernel)."""

import copy
import itertools
import math
import subprocess
import sys
from math import prod

import numpy as np
import pytest
import tensorly as tl
import torch
import torch.nn.functional as F
from shapes import layers
from torch import nn

from studio.adapter import Card, new_adapter
from studio.attachment import Site, attach, find_sites
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import PresetError
from studio.exporting import export_adapter
from studio.method import Origin, method_from
from studio.patch import LayerShape
from trainers.flora import sides_of

ORIGIN = Origin("concept", 3)
ODD = {  # what the reference layers get wrong, or cannot hold at all
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 7, 7)),
    "grouped 1-d": (lambda: nn.Conv1d(8, 12, 5, padding=2, groups=2, stride=2), (2, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8), (2, 8, 9, 9)),
    "grouped, dilated, circular": (
        lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, padding_mode="circular"),
        (2, 8, 7, 7),
    ),
    "oblong": (lambda: nn.Conv2d(6, 10, (1, 5), stride=(1, 2), padding=(0, 2)), (2, 6, 5, 9)),
    "replicated": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate"), (1, 4, 3, 5, 5)),
    "same, even, reflected": (lambda: nn.Conv2d(6, 10, 4, padding="same", padding_mode="reflect"), (2, 6, 8, 8)),
    "valid, circular": (lambda: nn.Conv2d(6, 10, 3, padding="valid", padding_mode="circular"), (2, 6, 8, 8)),
    "pixel, strided, padded": (lambda: nn.Conv2d(12, 5, 1, stride=2, padding=1), (2, 12, 6, 6)),
}


def every_layer():
    torch.manual_seed(0)
    made = layers() | {name: (make(), torch.randn(shape)) for name, (make, shape) in ODD.items()}
    made["embedding"] = (nn.Embedding(11, 6), torch.randint(0, 11, (3, 4)))
    return {name: (layer.double(), x.double() if x.is_floating_point() else x) for name, (layer, x) in made.items()}


NAMES = list(every_layer())


def site(layer):
    return {"unet.layer": Site("unet.layer", layer, LayerShape.of(layer))}


def trained(layer, settings=None):
    """A patch in fp64 whose core is as if trained."""
    method = method_from({"kind": "flora", "rank": 3, "scale": 1.7, **(settings or {})})
    patch = method.patch("unet.layer", LayerShape.of(layer), ORIGIN).double()
    patch.core.data.normal_(generator=torch.Generator().manual_seed(0))
    return patch


def factors(patch):
    """One for each mode; a kernel axis of one pixel has none in the patch, which is a factor of 1."""
    kernel = [
        getattr(patch, f"u_{axis}", torch.ones(1, 1, dtype=torch.float64))
        for axis in range(1, len(patch.shape.kernel) + 1)
    ]
    return [patch.u_in, patch.u_out, *kernel]


def oracle(patch):
    """The paper's formula by tensorly, in the layout of the weight."""
    arrays = [factor.detach().numpy() for factor in factors(patch)]
    dense = patch.scale * tl.tucker_to_tensor((patch.core.detach().numpy(), arrays))
    return torch.from_numpy(dense if patch.shape.kind == "embedding" else np.swapaxes(dense, 0, 1))


def naive(patch):
    """The same with gradients, as one einsum over all modes at once."""
    inner, outer = "pqstu"[: patch.core.ndim], "ioabc"[: patch.core.ndim]
    terms = ",".join(o + i for o, i in zip(outer, inner, strict=True))
    layout = "io" if patch.shape.kind == "embedding" else "oi" + outer[2:]
    return patch.scale * torch.einsum(f"{inner},{terms}->{layout}", patch.core, *factors(patch))


@pytest.mark.parametrize("name", NAMES)
def test_delta_is_the_tucker_form(name):
    layer, _ = every_layer()[name]
    patch = trained(layer)
    delta = patch.delta(layer.weight)
    assert delta.shape == layer.weight.shape
    assert (delta - oracle(patch)).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_factored_forward_and_its_gradients_equal_the_dense_ones(name):
    layer, x = every_layer()[name]
    patch = trained(layer)
    inputs = [x.requires_grad_(), *patch.parameters()] if x.is_floating_point() else list(patch.parameters())
    dense = copy.deepcopy(layer).requires_grad_(False)
    with attach(site(layer), {"unet.layer": [patch]}, 0.7):
        ours = layer(x)
    theirs = torch.func.functional_call(dense, {"weight": dense.weight + 0.7 * naive(patch)}, (x,))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent), strict=True
    ):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_patch_changes_nothing_and_only_its_core_learns_at_first(name):
    layer, x = every_layer()[name]
    patch = method_from("flora").patch("unet.layer", LayerShape.of(layer), ORIGIN).double()
    before = layer(x)
    with attach(site(layer), {"unet.layer": [patch]}):
        after = layer(x)
        assert torch.equal(before, after)
        after.square().mean().backward()
    assert not patch.core.any()
    for parameter_name, parameter in patch.named_parameters():
        assert bool(parameter.grad.any()) == (parameter_name == "core")


def test_the_start_is_the_papers():
    patch = method_from({"kind": "flora", "rank": 64, "conv_rank": [64, 32, 2]}).patch(
        "unet.layer", LayerShape("conv2d", (512, 512, 3, 3), (1, 1), (1, 1), (1, 1)), ORIGIN
    )
    for factor in (patch.u_in, patch.u_out):
        reference = nn.init.kaiming_normal_(torch.empty(40000, factor.shape[1]), a=math.sqrt(3)).std()
        torch.testing.assert_close(factor.std(), reference, rtol=0.02, atol=0)
    pixel = method_from("flora").patch("unet.layer", LayerShape("conv2d", (4, 1, 1, 3), groups=4), ORIGIN)
    assert pixel.u_in.item() == 1  # a random number there would only make the update larger or smaller
    assert [name for name, _ in pixel.named_parameters()] == ["core", "u_in", "u_out", "u_2"]


@pytest.mark.parametrize("name", NAMES)
def test_no_mode_exceeds_its_rank(name):
    layer, _ = every_layer()[name]
    patch = trained(layer, {"rank": 2})
    delta = patch.delta(layer.weight)
    delta = delta if patch.shape.kind == "embedding" else delta.transpose(0, 1)
    for mode, rank in enumerate(patch.core.shape):
        assert torch.linalg.matrix_rank(delta.movedim(mode, 0).flatten(1), rtol=1e-10) <= rank


@pytest.mark.parametrize("conv_rank", [(6, 5, 2), (2, 9, 2), (1, 10, 1), (1, 2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_the_lora_form_is_exact_and_of_no_higher_rank_than_needed(name, conv_rank):
    layer, _ = every_layer()[name]
    patch = trained(layer, {"conv_rank": conv_rank, "linear_rank": conv_rank[:2]})
    pair = patch.low_rank()
    if patch.shape.groups != 1:
        assert pair is None
        return
    (down, up), delta = pair, patch.delta(layer.weight)
    assert down.shape[0] == up.shape[1] == patch.rank
    assert down.shape[1:] == delta.shape[1:]
    assert up.shape == (delta.shape[0], patch.rank, *[1] * len(patch.shape.kernel))
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(delta.shape)
    assert (product - delta).norm() < 1e-6 * delta.norm()
    assert torch.linalg.matrix_rank(delta.flatten(1), rtol=1e-10) == patch.rank


def test_linear_layers_and_convolutions_have_ranks_of_their_own():
    method = method_from(
        {
            "kind": "flora",
            "rank": 8,
            "conv_rank": [16, 12, 2, 3],
            "rank_pattern": {"to_k": 4, "conv2": 6},
            "mode_rank_pattern": {"to_v": [2, 5], "conv_in": [1, 2, 3]},
        }
    )
    linear, conv = LayerShape("linear", (40, 30)), LayerShape("conv2d", (40, 30, 3, 3))
    assert method.ranks_at("unet.attn.to_q", linear) == (8, 8)
    assert method.ranks_at("unet.attn.to_k", linear) == (4, 4)
    assert method.ranks_at("unet.attn.to_v", linear) == (2, 5)
    assert method.ranks_at("unet.conv1", conv) == (16, 12, 2, 3)
    assert method.ranks_at("unet.conv2", conv) == (6, 6, 2, 2)
    assert method.ranks_at("unet.conv_in", conv) == (1, 2, 3, 3)


def test_no_rank_exceeds_its_side():
    method = method_from({"kind": "flora", "rank": 99, "conv_rank": [99, 99, 99]})
    for name, (layer, _) in every_layer().items():
        shape = LayerShape.of(layer)
        inner = (shape.weight[1], shape.weight[0]) if name != "embedding" else (11, 6)
        assert method.ranks_at("unet.layer", shape) == (*inner, *shape.kernel)
    assert method.ranks_at("unet.layer", LayerShape("conv2d", (8, 1, 3, 3), groups=8)) == (1, 8, 3, 3)


@pytest.mark.parametrize(
    ("settings", "shape", "said"),
    [
        ({"conv_rank": [4, 4, 2, 2, 2]}, LayerShape("conv2d", (8, 8, 3, 3)), "needs 4 ranks for 'unet.layer' (conv2d)"),
        ({"conv_rank": [4, 4, 2, 2]}, LayerShape("conv1d", (8, 8, 3)), "needs 3 ranks"),
        ({"mode_rank_pattern": {"layer": [4, 4, 2]}}, LayerShape("linear", (8, 8)), "[4, 4, 2] has 3"),
        ({"mode_rank_pattern": {"layer": [4]}}, LayerShape("conv3d", (8, 8, 1, 3, 3)), "needs 5 ranks"),
    ],
)
def test_ranks_for_other_modes_than_the_layers_are_refused(settings, shape, said):
    with pytest.raises(PresetError) as caught:
        method_from({"kind": "flora", **settings}).patch("unet.layer", shape, ORIGIN)
    assert said in caught.value.message
    assert "in, out" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 0}, "method.rank"),
        ({"conv_rank": [4, 4]}, "method.conv_rank"),
        ({"conv_rank": [4, 0, 2]}, "method.conv_rank.1"),
        ({"linear_rank": [4, 4, 4]}, "method.linear_rank"),
        ({"scale": -1.0}, "method.scale"),
        ({"convrank": [4, 4, 2]}, "method.convrank"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, key):
    with pytest.raises(PresetError) as caught:
        method_from({"kind": "flora", **settings})
    assert key in caught.value.message


def test_the_scale_is_a_constant_unless_alpha_is_given():
    shape = LayerShape("linear", (40, 30))
    for settings, scale in (
        ({}, 1.0),
        ({"rank": 2, "scale": 4.0}, 4.0),
        ({"rank": 4, "alpha": 8.0}, 2.0),
        ({"rank": 4, "alpha": 8.0, "scale": 0.5}, 1.0),
        ({"rank": 4, "alpha": 8.0, "rslora": True}, 4.0),
    ):
        assert method_from({"kind": "flora", **settings}).patch("unet.layer", shape, ORIGIN).scale == scale


def test_autocast_leaves_the_start_and_the_update_as_they_are():
    """The products among factors keep fp32, so the update is right to bfloat16's rounding of the products with x."""
    for name, (layer, x) in layers().items():
        patch = method_from({"kind": "flora"}).patch("unet.layer", LayerShape.of(layer), ORIGIN)
        with attach(site(layer), {"unet.layer": [patch]}) as attachment, torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                fresh = layer(x)
                attachment.weight = 0.0
                assert torch.equal(fresh, layer(x)), name
            patch.core.normal_(generator=torch.Generator().manual_seed(0))
            exact = patch.output_term(x, None, None)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = patch.output_term(x, None, None)
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).norm() < 0.01 * exact.norm(), name


def test_dropout_acts_in_training_alone():
    layer, x = layers()["conv2d"]
    patch = method_from({"kind": "flora", "dropout": 0.5}).patch("unet.layer", LayerShape.of(layer), ORIGIN)
    patch.core.data.normal_()
    assert not torch.equal(patch.output_term(x, None, None), patch.output_term(x, None, None))
    patch.eval()
    dense = F.conv2d(x, patch.delta(layer.weight), padding=1)
    torch.testing.assert_close(patch.output_term(x, None, None), dense, rtol=1e-4, atol=1e-5)


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
COUNTS = {  # ranks -> numbers by the paper's formula, which allows ranks above the 4 channels of the latents
    "SD 1.5": (SD15, 52, {(4, 4, 2, 2): 411_024, (8, 8, 2, 2): 828_080, (16, 16, 2, 2): 1_682_160}),
    "SDXL": (SDXL, 40, {(4, 4, 2, 2): 271_872, (8, 8, 2, 2): 548_384, (16, 16, 2, 2): 1_116_768}),
}


def numbers_of(shape, ranks):
    sides = (shape.in_features, shape.out_features, *shape.kernel)
    return sum(side * rank for side, rank in zip(sides, ranks, strict=True)) + prod(ranks)


@pytest.mark.parametrize(("config", "layers_there", "counts"), COUNTS.values(), ids=list(COUNTS))
def test_parameters_on_true_shapes_are_as_the_formula_says(config, layers_there, counts):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    sites = find_sites({"unet": unet}).values()
    shapes = [site.shape for site in sites if site.shape.weight[2:] == (3, 3)]
    assert len(shapes) == layers_there
    for ranks, count in counts.items():
        assert sum(numbers_of(shape, ranks) for shape in shapes) == count
        method = method_from({"kind": "flora", "conv_rank": list(ranks)})
        own = {
            shape: sum(p.numel() for p in method.patch("unet.layer", shape, ORIGIN).parameters())
            for shape in set(shapes)
        }
        clamped = {shape: tuple(map(min, ranks, sides_of(shape))) for shape in shapes}
        assert {shape for shape, limited in clamped.items() if limited != ranks} <= {
            shape for shape in shapes if 4 in shape.weight[:2]
        }
        assert sum(own[shape] for shape in shapes) == sum(numbers_of(shape, clamped[shape]) for shape in shapes)
        conv_lora = sum(ranks[0] * (shape.in_features * 9 + shape.out_features) for shape in shapes)
        assert conv_lora > 5.1 * count


MIXED = {
    "kind": "flora",
    "rank": 4,
    "scale": 2.0,
    "conv_rank": [6, 5, 2],
    "rank_pattern": {"to_q": 2},
    "mode_rank_pattern": {"to_v": [3, 5], "conv1": [2, 9, 2, 3], "conv_shortcut": [3, 7, 1]},
    "target_modules": ["attention", "conv", "text-encoder"],
}
STRANGER = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
base, lora, out = sys.argv[1:]
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(base)
pipe.set_progress_bar_config(disable=True)
def draw():
    generator = torch.Generator("cpu").manual_seed(7)
    return pipe("a dog", generator=generator, num_inference_steps=3, output_type="np").images[0]
alone = draw()
pipe.load_lora_weights(lora)
np.save(out, np.stack([alone, draw()]))
assert not [name for name in sys.modules if name.split(".")[0] in ("studio", "trainers")]
"""


@pytest.fixture(scope="module")
def mixed():
    base = StableDiffusion.tiny()
    method = method_from(MIXED)
    sites = base.select(method.target_modules, method.kinds)
    shapes = {name: site.shape for name, site in sites.items()}
    adapter = new_adapter(Card(method=method.model_dump(mode="json"), base=base.identity(), sites=shapes, concept="c"))
    generator = torch.Generator().manual_seed(0)
    for terms in adapter.patches.values():
        terms["main"].core.data.normal_(0, 0.5, generator=generator)
    return base, sites, adapter


def test_plain_diffusers_draws_our_picture_from_mixed_ranks(mixed, tmp_path):
    base, sites, adapter = mixed
    report = export_adapter(adapter, base, "diffusers", tmp_path / "lora")
    assert report.status == "exact"
    assert len({row.rank for row in report.rows}) > 4
    base.pipe.save_pretrained(tmp_path / "base")
    arguments = [tmp_path / "base", tmp_path / "lora", tmp_path / "theirs.npy"]
    command = [sys.executable, "-P", "-c", STRANGER, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, theirs = np.load(tmp_path / "theirs.npy")
    with attach(sites, adapter.by_site()):
        generator = torch.Generator("cpu").manual_seed(7)
        ours = base.pipe("a dog", generator=generator, num_inference_steps=3, output_type="np").images[0]
    assert np.abs(ours - alone).mean() > 0.01
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_same_seed_starts_every_site_apart(mixed):
    _, _, adapter = mixed
    tables = [terms["main"].u_in for terms in adapter.patches.values()]
    for one, other in itertools.combinations(tables, 2):
        assert one.shape != other.shape or not torch.equal(one, other)
