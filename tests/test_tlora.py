"""TLoRA: ring transforms and residuals against dense loops; their ranks, starts, sizes, exports."""

import copy
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorly as tl
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_methods import ORIGIN, site, tiny_adapter, train_a_little
from test_plain_diffusers import PROGRAM

from studio import kronecker
from studio.attachment import attach, find_sites
from studio.base import Request
from studio.bases.stable_diffusion import StableDiffusion
from studio.customize import AdapterTask
from studio.data.cache import Cache
from studio.errors import ExportRefused, PresetError
from studio.exporting import export_adapter
from studio.exporting.approximation import truncated
from studio.generation import Use, wearing
from studio.keyed import torch_generator
from studio.method import method_from
from studio.patch import LayerCall, LayerShape
from studio.tensor_ring import cut_ring, identity_place, ring_shift, sides_of, transposed
from studio.training import Order, plan

VARIANTS = {
    "T(1) + LoRA": {"transform_rank": 1, "rank": 3},
    "T(2) + LoRA": {"transform_rank": 2, "rank": 3},
    "T(3) + ring": {"transform_rank": 3, "residual": "ring", "rank": 2},
    "T(3) + ring as the code": {"transform_rank": 3, "residual": "ring", "rank": 2, "init": "reference"},
    "T(2) + ring, muP": {"transform_rank": 2, "residual": "ring", "rank": 2, "init": "mup"},
    "T(2) alone": {"transform_rank": 2, "residual": "none"},
    "ring alone": {"transform": "none", "residual": "ring", "rank": 3},
    "low-rank T": {"transform": "low-rank", "transform_rank": 3, "residual": "none"},
    "low-rank T + ring": {"transform": "low-rank", "transform_rank": 2, "residual": "ring", "rank": 2},
}
LAYERS = {
    "linear": lambda: (torch.nn.Linear(24, 20), torch.randn(2, 5, 24)),
    "conv": lambda: (torch.nn.Conv2d(12, 8, 3, padding=1), torch.randn(2, 12, 6, 6)),
    "conv in groups": lambda: (torch.nn.Conv2d(12, 8, 3, padding=1, groups=2), torch.randn(2, 12, 6, 6)),
    "depthwise": lambda: (torch.nn.Conv1d(8, 8, 3, groups=8), torch.randn(2, 8, 9)),
    "strided, reflected": lambda: (torch.nn.Conv2d(6, 9, 3, 2, 1, padding_mode="reflect"), torch.randn(2, 6, 8, 8)),
    "prime": lambda: (torch.nn.Linear(7, 11), torch.randn(4, 7)),
}
EVERY = [pytest.param(v, layer, id=f"{name}-{layer}") for name, v in VARIANTS.items() for layer in LAYERS]


def made(settings, layer="linear", dtype=torch.float64, trained=True):
    torch.manual_seed(0)
    module, x = LAYERS[layer]()
    module = module.to(dtype).requires_grad_(False)
    method = method_from({"kind": "tlora", **settings})
    patch = method.patch("unet.layer", LayerShape.of(module), ORIGIN, module.weight).to(dtype)
    return module, x.to(dtype), train_a_little(patch) if trained else patch


def random_cores(sides, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(side, side, rank, rank, generator=generator, dtype=torch.float64) for side in sides]


def naive_matrix(cores, spread):
    """T by its definition: the trace of the product of cores, entry by entry."""
    place = identity_place(cores[0].shape[2], spread)
    full = [core + torch.eye(len(core), dtype=core.dtype)[:, :, None, None] * place for core in cores]
    indices = list(itertools.product(*(range(len(core)) for core in cores)))
    matrix = torch.empty(len(indices), len(indices), dtype=torch.float64)
    for (i, row), (j, column) in itertools.product(enumerate(indices), enumerate(indices)):
        product = torch.eye(len(place), dtype=torch.float64)
        for core, a, b in zip(full, row, column):
            product = product @ core[a, b]
        matrix[i, j] = product.trace()
    return matrix


def matrix_of(patch):
    """T of a patch with a ring transform, from what it does to unit vectors."""
    cores = patch.cores("E")
    width = math.prod(len(core) for core in cores)
    eye = torch.eye(width, dtype=cores[0].dtype)
    return eye + ring_shift(eye[:, :, None], cores, patch.spread)[:, :, 0].T.detach()


def schmidt_values(matrix, sides):
    """Singular values of T as an operator on (first axis) x (the others): one is not zero for a Kronecker product."""
    i, k = sides[0], math.prod(sides[1:])
    return torch.linalg.svdvals(matrix.view(i, k, i, k).permute(0, 2, 1, 3).reshape(i * i, k * k))


# -- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sides", [(2, 3), (2, 3, 4), (2, 2, 3, 2)])
def test_a_ring_matrix_equals_the_trace_loop(sides, rank, spread):
    cores = random_cores(sides, rank)
    wanted = naive_matrix(cores, spread) - torch.eye(math.prod(sides), dtype=torch.float64)
    for shape in ((3, math.prod(sides), 1), (2, math.prod(sides), 5)):
        x = torch.randn(shape, dtype=torch.float64)
        scale = wanted.abs().max()
        assert (ring_shift(x, cores, spread) - wanted @ x).abs().max() < 1e-12 * scale
        assert (ring_shift(x, transposed(cores), spread) - wanted.T @ x).abs().max() < 1e-12 * scale


def test_a_ring_matrix_equals_tensorlys():
    sides, rank = (2, 3, 4), 3
    cores = random_cores(sides, rank)
    place = identity_place(rank)
    full = [c + torch.eye(len(c), dtype=c.dtype)[:, :, None, None] * place for c in cores]
    flat = [core.permute(2, 0, 1, 3).reshape(rank, -1, rank).numpy() for core in full]
    tensor = torch.from_numpy(np.asarray(tl.tr_tensor.tr_to_tensor(flat)))
    theirs = tensor.view(2, 2, 3, 3, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(24, 24)
    ours = (
        torch.eye(24, dtype=torch.float64) + ring_shift(torch.eye(24, dtype=torch.float64)[:, :, None], cores)[..., 0].T
    )
    assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_ring_equals_the_trace_loop_and_has_the_rank_of_its_cut(rank):
    generator = torch.Generator().manual_seed(0)
    outs, ins = (
        [torch.randn(side, rank, rank, generator=generator, dtype=torch.float64) for side in sides]
        for sides in ((3, 4), (2, 3, 4))
    )
    up, down = cut_ring(outs, ins)
    wanted = torch.empty(12, 24, dtype=torch.float64)
    for (o, row), (i, column) in itertools.product(
        enumerate(itertools.product(range(3), range(4))), enumerate(itertools.product(range(2), range(3), range(4)))
    ):
        product = torch.eye(rank, dtype=torch.float64)
        for core, index in zip([*outs, *ins], [*row, *column]):
            product = product @ core[index]
        wanted[o, i] = product.trace()
    assert (up @ down - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert up.shape[1] == rank**2
    assert torch.linalg.matrix_rank(wanted) == rank**2


@pytest.mark.parametrize(("settings", "layer"), EVERY)
def test_the_layer_equals_the_layer_with_its_dense_delta(settings, layer):
    module, x, patch = made(settings, layer)
    dense = copy.deepcopy(module)
    dense.weight += 0.7 * patch.delta(module.weight).detach()
    assert (dense.weight - module.weight).norm() > 0.01
    with attach(site(module), {"unet.layer": [patch]}, 0.7):
        torch.testing.assert_close(module(x), dense(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("settings", "layer"), EVERY)
def test_every_variant_starts_as_the_identity_to_the_last_bit_in_every_dtype(settings, layer):
    module, x, patch = made(settings, layer, torch.float32, trained=False)
    call = LayerCall(module)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        # Ill-scaled inputs: what cancels instead of being zero would show.
        u = patch.to(dtype).input_term((x * 1e3).to(dtype), call)
        assert u is None or not u.any()
    patch.float()
    before = module(x)
    with attach(site(module), {"unet.layer": [patch]}):
        assert torch.equal(module(x), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            patched = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(patched, module(x))
    assert not patch.delta(module.weight).any()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("layer", ["linear", "conv in groups"])
def test_gradients_are_those_of_finite_differences(settings, layer):
    module, x, patch = made(settings, layer)
    x = (x[:1, :2] if layer == "linear" else x[:1, :, :3, :3]).contiguous().requires_grad_()
    names = [name for name, _ in patch.named_parameters()]

    def run(x, *values):
        call = LayerCall(module)
        state = dict(zip(names, values))
        u = torch.func.functional_call(_Term(patch, "input_term"), _prefixed(state), (x, x, call))
        v = torch.func.functional_call(_Term(patch, "output_term"), _prefixed(state), (x, x, call))
        return tuple(term for term in (u, v) if term is not None)

    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in patch.parameters())))


@pytest.mark.parametrize("residual", ["lora", "ring", "none"])
@pytest.mark.parametrize("tokens", [3, 40])  # the transform goes to these, or to the 20 rows of the weight
@pytest.mark.parametrize("largest", [1, 12])  # three factors, or the last two multiplied out
def test_a_lone_patch_at_full_strength_equals_the_sum_of_its_terms_gradients_too(
    residual, tokens, largest, monkeypatch
):
    monkeypatch.setattr(kronecker, "BLOCK", 60)  # several blocks, the last not full
    monkeypatch.setattr(kronecker, "LARGEST", largest)
    module, _, patch = made({"residual": residual, "rank": 3})
    x, flow = (torch.randn(2, tokens, width, dtype=torch.float64) for width in (24, 20))

    def outcome(strength):
        mine = x.clone().requires_grad_()
        with attach(site(module), {"unet.layer": [patch]}, strength):
            y = module(mine)
        return [y, *torch.autograd.grad(y, [mine, *patch.parameters()], flow)]

    assert patch.whole(x, LayerCall(module)) is not None
    for one, other in zip(outcome(1.0), outcome(torch.tensor(1.0, dtype=torch.float64)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_lone_patch_starts_as_the_layer_to_the_last_bit(tokens):
    module, _, patch = made({"transform_rank": 1, "rank": 3}, dtype=torch.float32, trained=False)
    x = 1e3 * torch.randn(tokens, 24)
    assert torch.equal(patch.whole(x, LayerCall(module)), module(x))


def test_where_a_factor_has_no_inverse_the_terms_are_summed():
    module, x, patch = made({"transform_rank": 1, "rank": 3})
    with torch.no_grad():
        patch.E2[0, 0], patch.E2[0, 1:] = -1, 0  # the first row of A_2 is zero
    assert patch.whole(x, LayerCall(module)) is None
    dense = module.weight + patch.delta(module.weight)
    with attach(site(module), {"unet.layer": [patch]}):
        torch.testing.assert_close(module(x), F.linear(x, dense, module.bias), rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_itself_trained_is_not_gone_past():
    module, x, patch = made({"transform_rank": 1, "rank": 3})
    module.requires_grad_(True)
    with attach(site(module), {"unet.layer": [patch]}):
        module(x).sum().backward()
    assert module.weight.grad.abs().sum() > 0


class _Term(torch.nn.Module):
    """One term of a patch as a module's forward, so that its parameters can be arguments."""

    def __init__(self, patch, term):
        super().__init__()
        self.patch, self.term = patch, term

    def forward(self, x, y, call):
        return self.patch.input_term(x, call) if self.term == "input_term" else self.patch.output_term(x, y, call)


def _prefixed(state):
    return {f"patch.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(("settings", "layer"), EVERY)
def test_every_core_has_a_gradient_by_step_three(settings, layer):
    # Ring cores behind the first free one wake one step after another: E1 first, then what it is multiplied with.
    module, x, patch = made(settings, layer, torch.float32, trained=False)
    optimizer = torch.optim.SGD(patch.parameters(), 0.1)
    with attach(site(module), {"unet.layer": [patch]}):
        for _ in range(3):
            optimizer.zero_grad()
            (module(x) - 1).square().mean().backward()
            optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in patch.parameters())


# -- ranks ---------------------------------------------------------------------------------------------------------


def trained_on_a_planted_transform(init, rank=2, steps=200):
    """A patch after AdamW steps in fp64 towards a transform that is the sum of two Kronecker products."""
    torch.manual_seed(0)
    shape = LayerShape("linear", (24, 24))
    patch = (
        method_from({"kind": "tlora", "residual": "none", "transform_rank": rank, "init": init})
        .patch("unet.layer", shape, ORIGIN)
        .double()
    )
    sides = sides_of(24)
    parts = [torch.randn(s, s, dtype=torch.float64) / s**0.5 for s in sides]
    target = torch.eye(24, dtype=torch.float64) + 0.5 * torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    optimizer = torch.optim.AdamW(patch.parameters(), 3e-3)
    call = LayerCall(torch.nn.Identity())
    for _ in range(steps):
        x = torch.randn(16, 24, dtype=torch.float64)
        optimizer.zero_grad()
        (x + patch.input_term(x, call) - x @ target.T).square().mean().backward()
        optimizer.step()
    return schmidt_values(matrix_of(patch), sides), patch


def test_the_repaired_start_leaves_the_kronecker_products_and_the_papers_never_does():
    repaired, patch = trained_on_a_planted_transform("repaired")
    reference, same = trained_on_a_planted_transform("reference")
    assert sum(p.numel() for p in patch.parameters()) == sum(p.numel() for p in same.parameters())
    assert repaired[1] > 0.05 * repaired[0]
    assert reference[1] < 1e-10 * reference[0]
    for core in same.cores("E"):  # moved, all slices alike
        assert core.detach().abs().max() > 0.01
        assert (core - core[:, :, :1, :1]).abs().max() < 1e-10


def test_the_transform_of_rank_one_is_a_kronecker_product():
    _, _, patch = made({"transform_rank": 1, "residual": "none"})
    factors = [torch.eye(len(core)) + core[:, :, 0, 0] for core in patch.cores("E")]
    wanted = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    torch.testing.assert_close(matrix_of(patch), wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [24, 320])
def test_a_change_by_one_kronecker_factor_already_has_the_rank_of_the_lemma(width):
    sides = sides_of(width)
    for axis, side in enumerate(sides):
        cores = [torch.zeros(s, s, 1, 1, dtype=torch.float64) for s in sides]
        cores[axis][0, 0] = 0.5
        eye = torch.eye(width, dtype=torch.float64)[:, :, None]
        change = ring_shift(eye, cores)[:, :, 0]
        assert torch.linalg.matrix_rank(change) == width // side  # attained
    assert width // max(sides) == {24: 6, 320: 32}[width]
    generic = ring_shift(eye, [0.1 * core for core in random_cores(sides, 1)])[:, :, 0]
    assert torch.linalg.matrix_rank(generic) >= width // max(sides)


def test_the_report_of_a_truncation_equals_an_independent_svd(tmp_path):
    base, sites, adapter = tiny_adapter("tlora", transform_rank=2, residual="ring", rank=2)
    for terms in adapter.patches.values():
        train_a_little(terms["main"])
    report = export_adapter(adapter, base, "diffusers", tmp_path / "lora", rank=3, allow_approximate=True)
    assert report.status == "approximate"
    lost = total = 0.0
    for row in report.rows:
        delta = adapter.patches[row.site]["main"].delta(sites[row.site].module.weight).detach().numpy()
        squares = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
        assert row.error == pytest.approx((squares[3:].sum() / squares.sum()) ** 0.5, rel=1e-4)
        assert row.energy_kept == pytest.approx(squares[:3].sum() / squares.sum(), rel=1e-4)
        lost, total = lost + squares[3:].sum(), total + squares.sum()
    assert report.total_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert report.total_error > 0.1


def test_cutting_a_transform_off_at_a_rank_leaves_the_flat_spectrum_behind():
    # Why LoRA cannot hold it: half the rank still loses a fifth of the change.
    cores = [0.1 * core for core in random_cores(sides_of(64), 1)]
    change = ring_shift(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()[:, :, None], cores)[
        ..., 0
    ]
    kept = truncated(change, 32).product()
    assert (kept - change).norm() > 0.05 * change.norm()


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_the_sides_are_the_papers():
    table = {320: (4, 8, 10), 640: (8, 8, 10), 768: (8, 8, 12), 1280: (8, 10, 16), 2048: (8, 16, 16)}
    assert {width: sides_of(width) for width in table} == table
    for width in range(1, 400):
        assert math.prod(sides_of(width)) == width


def test_a_width_without_factors_is_refused_by_name_before_step_zero():
    method = method_from({"kind": "tlora"})
    with pytest.raises(PresetError) as caught:
        method.patch("unet.down.to_q", LayerShape("linear", (16, 1009)), ORIGIN)
    assert "unet.down.to_q" in caught.value.message
    assert "1009" in caught.value.message
    low = method_from({"kind": "tlora", "transform": "low-rank"})
    assert low.patch("unet.down.to_q", LayerShape("linear", (16, 1009)), ORIGIN).low_rank_of(torch.ones(16, 1009))


@pytest.mark.parametrize(
    "settings", [{"transform": "none", "residual": "none"}, {"rank": 0}, {"transform": "rings"}, {"alpha": 0}]
)
def test_settings_that_train_nothing_or_are_unknown_are_refused(settings):
    with pytest.raises(PresetError):
        method_from({"kind": "tlora", **settings})


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
COUNTS = {  # the paper's table: (transform rank, residual, rank) -> numbers on SD 1.5, SDXL
    (0, "lora", 1): (199_296, 1_451_520),
    (0, "lora", 4): (797_184, 5_806_080),
    (1, "none", 1): (36_064, 245_520),
    (2, "none", 1): (144_256, 982_080),
    (0, "ring", 2): (28_448, 151_200),
    (0, "ring", 6): (256_032, 1_360_800),
    (2, "lora", 4): (941_440, 6_788_160),
    (2, "ring", 6): (400_288, 2_342_880),
    (1, "ring", 2): (64_512, 396_720),
}


@pytest.mark.parametrize("init", ["repaired", "reference"])
def test_on_true_shapes_the_number_of_parameters_is_the_papers(init):
    for column, (config, layers) in enumerate(((SD15, 128), (SDXL, 560))):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        shapes = [
            s.shape for name, s in find_sites({"unet": unet}).items() if ".attn" in name and s.shape.kind == "linear"
        ]
        assert len(shapes) == layers
        kinds = {shape: shapes.count(shape) for shape in shapes}
        for (transform, residual, rank), numbers in COUNTS.items():
            method = method_from(
                {
                    "kind": "tlora",
                    "transform": "ring" if transform else "none",
                    "transform_rank": transform or 1,
                    "residual": residual,
                    "rank": rank,
                    "init": init,
                }
            )
            counted = sum(
                times * sum(p.numel() for p in method.patch("unet.site", shape, ORIGIN).parameters())
                for shape, times in kinds.items()
            )
            assert counted == numbers[column], (transform, residual, rank)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_ring_residual_moves_as_far_at_any_rank(rank):
    method = method_from({"kind": "tlora", "transform": "none", "residual": "ring", "rank": rank})
    patch = method.patch("unet.site", LayerShape("linear", (640, 320)), ORIGIN)
    torch.nn.init.normal_(patch.B1, generator=torch.Generator().manual_seed(0))
    delta = patch.delta(torch.zeros(640, 320))
    assert 0.5 < delta.std() * 320**0.5 < 2


def test_what_is_kept_for_the_backward_pass_is_what_lora_keeps():
    x = torch.randn(256, 640, requires_grad=True)

    def kept(kind, **settings):
        layer = torch.nn.Linear(640, 640).requires_grad_(False)
        patch = train_a_little(
            method_from({"kind": kind, **settings}).patch("unet.layer", LayerShape.of(layer), ORIGIN)
        )
        storages = {}

        def pack(value):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with attach(site(layer), {"unet.layer": [patch]}), torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            y = layer(x)
        storages.pop(layer.weight.untyped_storage().data_ptr(), None)
        assert y.requires_grad
        return sum(storages.values()) / x.nbytes

    lora = kept("lora", rank=4)
    assert kept("tlora", residual="none", transform_rank=1) < 1.1 * lora
    assert kept("tlora", transform_rank=1, rank=4) < 1.1 * lora
    assert kept("tlora", transform_rank=2, rank=4) < 1.3 * lora  # M (2, 160, 80) and what it is made of


# -- training ------------------------------------------------------------------------------------------------------


def test_weight_decay_pulls_the_transform_to_the_identity():
    _, _, patch = made({"transform_rank": 2, "residual": "none"})
    start = (matrix_of(patch) - torch.eye(24)).norm()
    for core in patch.cores("E"):
        core.data *= 0.01  # what many steps of decoupled weight decay do
    assert (matrix_of(patch) - torch.eye(24)).norm() < 0.05 * start


def test_the_identity_penalty_is_the_gradient_of_the_papers_regulariser():
    _, _, patch = made({"transform_rank": 2})
    cores = patch.cores("E")
    place = identity_place(2)
    full = [c.detach() + torch.eye(len(c))[:, :, None, None] * place for c in cores]
    leaves = [core.clone().requires_grad_() for core in full]
    terms = [
        (core[:, :, r, s] - place[r, s] * torch.eye(len(core))).norm()
        for core in leaves
        for r, s in itertools.product(range(2), range(2))
    ]
    (0.3 * torch.stack(terms).sum()).backward()
    cores[0].grad = torch.ones_like(cores[0])
    method_from({"kind": "tlora", "identity_penalty": 0.3}).penalise({"unet.layer": patch}, 0, 0)
    torch.testing.assert_close(cores[0].grad, 1 + leaves[0].grad)
    torch.testing.assert_close(cores[1].grad, leaves[1].grad)
    fresh = made({"transform_rank": 2}, trained=False)[2]
    method_from({"kind": "tlora", "identity_penalty": 0.3}).penalise({"unet.layer": fresh}, 0, 0)
    assert all(core.grad.isfinite().all() for core in fresh.cores("E"))


@pytest.fixture
def recipe(tmp_path, pictures, tiny_base_folder):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"description: test\nbase: {tiny_base_folder}\n"
        "method: {kind: tlora, transform_rank: 2, residual: ring, rank: 2}\n"
        f"data: {{path: {pictures}}}\nsteps: 3\nbatch_size: 2\n"
    )
    return str(path)


def test_the_dco_loss_equals_its_formula_and_its_reference_is_the_same_network_without_patches(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", settings=("dco_beta=40",)))
    task = AdapterTask(
        training.preset.method,
        training.base,
        training.preset,
        training.run,
        training.pictures,
        training.card,
        Cache(tmp_path / "cache"),
    )
    list(task.prepare())
    for patch in task.patches.values():
        train_a_little(patch)
    loss = task.losses(0, 0, range(2))
    base, objective = task.base, task.base.objective
    distances = []
    for weight in (1.0, 0.0):
        task.attachment.weight = weight
        rows = []
        for slot, index in enumerate(task.order.batch(0)[:2]):
            example = task.examples[index]
            generator = torch_generator("sample", training.preset.seed, 0, 0, slot)
            torch.randint(1, (), generator=generator)
            torch.rand((), generator=generator)
            time = objective.draw_time(generator)[None]
            noise = torch.randn(example.latents[0].shape, generator=generator)[None]
            clean = example.latents[0][None]
            condition = base.encode_prompts([example.caption], example.bucket)
            with torch.no_grad():
                predicted = base.predict(objective.noised(clean, noise, time), objective.network_time(time), condition)
            rows.append((predicted - objective.target(clean, noise, time)).square().mean())
        distances.append(torch.stack(rows))
    task.close()
    patched, reference = distances
    assert (patched - reference).abs().min() > 1e-3
    torch.testing.assert_close(loss.detach(), -F.logsigmoid(-40 * (patched - reference)), rtol=1e-3, atol=1e-4)


def test_a_training_with_the_dco_loss_moves_every_core_and_starts_at_log_two(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", settings=("dco_beta=1000", "learning_rate=1e-3")))
    losses = [event.data["loss"] for event in training.events(lambda: False) if event.kind == "step"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    assert {name.rsplit(".", 1)[1] for name in tensors} >= {"E1", "E2", "B1", "B2", "C1", "C2"}
    assert all(value.any() for name, value in tensors.items() if name.endswith((".E1", ".B1")))


# -- exports -------------------------------------------------------------------------------------------------------

EXPORTABLE = {
    "residual ring": {"transform": "none", "residual": "ring", "rank": 2, "target_modules": ["attention", "conv"]},
    "low-rank transform": {
        "transform": "low-rank",
        "transform_rank": 2,
        "rank": 2,
        "target_modules": ["attention", "conv"],
    },
}


def strong(settings, base=None, scale=0.3):
    targets = settings.get("target_modules", ["attention"])
    rest = {key: value for key, value in settings.items() if key != "target_modules"}
    base, sites, adapter = tiny_adapter("tlora", targets, base=base, **rest)
    generator = torch.Generator().manual_seed(0)
    for terms in adapter.patches.values():
        for p in terms["main"].parameters():
            p.data += scale * torch.randn(p.shape, generator=generator) / p[..., 0].numel() ** 0.25
    return base, sites, adapter


@pytest.mark.parametrize(
    ("settings", "to"), [("residual ring", "diffusers"), ("low-rank transform", "kohya")], ids=["diffusers", "kohya"]
)
def test_a_residual_ring_and_a_low_rank_transform_are_exact_loras(settings, to, tmp_path):
    base, _, adapter = strong(EXPORTABLE[settings])
    report = export_adapter(adapter, base, to, tmp_path / "out")
    assert report.status == "exact"
    assert min(row.norm for row in report.rows) > 0.05


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_ring_transform_is_refused_as_lora_with_the_way_out(to, tmp_path):
    base, _, adapter = strong({"transform_rank": 2})
    with pytest.raises(ExportRefused) as caught:
        export_adapter(adapter, base, to, tmp_path / "out")
    assert "has no exact low-rank form" in caught.value.message
    assert "--to checkpoint or --to diff" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_ring_transform_is_exact_as_dense_deltas_and_as_a_checkpoint(tmp_path):
    base, sites, adapter = strong({"transform_rank": 2, "residual": "ring", "rank": 2})
    assert export_adapter(adapter, base, "diff", tmp_path / "diff").status == "exact"
    assert export_adapter(adapter, base, "checkpoint", tmp_path / "merged").status == "exact"
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet
    for name, s in sites.items():
        delta = adapter.patches[name]["main"].delta(s.module.weight)
        torch.testing.assert_close(merged.get_submodule(s.path).weight, s.module.weight + delta, rtol=1e-6, atol=1e-6)


MERGED = PROGRAM.replace("pipe.load_lora_weights(lora)", "assert not lora")


@pytest.mark.parametrize("to", ["diffusers", "checkpoint"])
def test_plain_diffusers_in_a_fresh_process_draws_the_studios_picture(to, tmp_path):
    settings = EXPORTABLE["low-rank transform"] if to == "diffusers" else {"transform_rank": 2, "residual": "ring"}
    base = StableDiffusion.tiny()
    folder = tmp_path / "base"
    base.pipe.save_pretrained(folder)
    _, _, adapter = strong(settings, base)
    assert export_adapter(adapter, base, to, tmp_path / "out").status == "exact"
    request = Request(["a dog"], [7], steps=4)
    alone = np.asarray(base.generate(request)[0]).astype(int)
    with wearing(base, [Use("x", adapter)]):
        ours = np.asarray(base.generate(request)[0]).astype(int)
    program, where, lora = (PROGRAM, folder, tmp_path / "out") if to == "diffusers" else (MERGED, tmp_path / "out", "")
    order = ["sd", str(where), str(lora), "a dog", str(tmp_path / "theirs.png"), None]
    command = [sys.executable, "-P", "-c", program, json.dumps([order])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.asarray(Image.open(tmp_path / "theirs.png")).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - alone).mean() > 1
