"""Orthogonal Adaptation: the frozen bases and their slots (method file, sections 1, 4.4 and 4.9)."""

import hashlib
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from test_methods import tiny_adapter
from test_training import recipe, train, weights  # noqa: F401  a fixture

from studio import slots
from studio.adapter import adapter_from, load_adapter, new_adapter
from studio.attachment import attach
from studio.base import Request
from studio.bases.stable_diffusion import StableDiffusion
from studio.data.cache import Cache
from studio.errors import AdapterError, PresetError
from studio.inputs import base_inputs, input_vectors, low_energy_space, record_inputs
from studio.keyed import hashed_order
from studio.method import Origin, method_from
from studio.patch import LayerShape
from studio.training import Order, plan
from trainers.orthogonal import SHARED_BASIS, _shared_columns, null_columns, orthonormal_rows, slot_columns

SHAPE, SHAPE_96 = LayerShape("linear", (8, 64)), LayerShape("linear", (8, 96))


def rows_of(method, concept="cat", shape=SHAPE, name="unet.site", inputs=None):
    """B^T (R, I) of a fresh patch."""
    return method_from({"kind": "orthogonal", **method}).patch(name, shape, Origin(concept, 0, inputs or {})).down


def energies(width, least=1e-4):
    """A covariance whose energies fall from 1 to `least`, in directions of its own."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (directions * torch.logspace(0, math.log10(least), width, dtype=torch.float64)) @ directions.T


def error(columns):
    return np.abs(columns.T @ columns - np.eye(columns.shape[1])).max()


# -- the shared matrices -------------------------------------------------------------------------------------------


def test_the_shared_matrix_is_orthonormal_to_1e_14():
    for width in (20, 320, 768, 1280):
        assert error(_shared_columns(width, range(width))) < 1e-14, width


def test_stored_rows_are_orthonormal_to_1e_6():
    inputs = {"unet.site": energies(64).float()}
    for rows in (
        orthonormal_rows(640, 16, "a cat", "unet.site"),
        rows_of({"rank": 8, "basis": "slots", "slot": 5}),
        rows_of({"rank": 8, "basis": "slots-null", "slot": 5}, inputs=inputs),
    ):
        assert rows.dtype == torch.float32
        assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-6


def test_directions_belong_to_the_concept_and_not_to_the_seed():
    method = method_from({"kind": "orthogonal", "rank": 4})
    cat, cat_again, dog = (
        method.patch("unet.site", SHAPE, Origin(concept, seed)).down
        for concept, seed in (("cat", 1), ("cat", 2), ("dog", 1))
    )
    assert torch.equal(cat, cat_again)
    assert not torch.equal(cat, dog)


def test_concepts_with_disjoint_columns_do_not_meet():
    one, other = _shared_columns(64, [1, 5]), _shared_columns(64, [2, 9])
    assert np.abs(one.T @ other).max() < 1e-14


def test_the_basis_is_frozen_and_only_the_up_projection_learns():
    _, _, adapter = tiny_adapter("orthogonal")
    patch = next(iter(adapter.patches.values()))["main"]
    assert [name for name, _ in patch.named_parameters()] == ["up"]
    assert not patch.down.requires_grad
    assert patch.up.detach().abs().sum() == 0
    assert "down" in patch.state_dict()


def test_the_basis_never_changes_between_versions():
    # Golden numbers: if these change, old and new concepts meet where they must not.
    rows = orthonormal_rows(16, 2, "golden", "unet.site")
    torch.testing.assert_close(rows[:, :4], torch.tensor(GOLDEN), rtol=0, atol=1e-6)
    np.testing.assert_allclose(slot_columns(320, range(40, 42))[:3], GOLDEN_SLOT, rtol=0, atol=1e-12)
    for width, order in GOLDEN_ORDERS.items():
        text = ",".join(map(str, hashed_order(width, SHARED_BASIS, "slots", width)))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == order
    for width, digest in GOLDEN_MATRICES.items():
        rounded = np.round(slot_columns(width, range(width)) * 2**20).astype("<i4")  # cos may differ in its last bit
        assert hashlib.sha256(rounded.tobytes()).hexdigest()[:16] == digest


GOLDEN = [[-0.3518509, 0.3383295, -0.3118063, -0.2733005], [-0.25, 0.25, -0.25, -0.25]]
GOLDEN_SLOT = [
    [-0.07897980424710815, -0.061843755946399376],
    [-0.07836360906679571, 0.03415160036424586],
    [-0.07713602621998855, 0.07713602621998855],
]
GOLDEN_ORDERS = {
    16: "5e27cf36c5009c1f",
    64: "965771ea5832454c",
    320: "bf503df9a9232ea2",
    640: "914af6feb953c9c5",
    768: "fe8b9fd4d9d557e2",
    1280: "9bafd1aaae5aad7a",
}
GOLDEN_MATRICES = {64: "978353a50bd1cd9c", 320: "5ec70875c84aff04"}


# -- slots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["slots", "slots-null"])
@pytest.mark.parametrize("shape", [SHAPE, LayerShape("conv2d", (8, 6, 3, 3)), LayerShape("conv2d", (8, 200, 3, 3))])
def test_slots_of_any_ranks_do_not_meet(basis, shape):
    width = 64 if shape.kind == "linear" else 54 if shape.in_features == 6 else 200  # patches, then channels
    inputs = {"unet.site": energies(width).float()}
    taken = [(4, 0), (4, 1), (8, 1), (2, 8), (3, 6), (16, 2)]  # (rank, slot): disjoint columns, 0 to 48
    if basis == "slots-null" and width == 54:
        taken = taken[:-1]
    rows = [rows_of({"basis": basis, "rank": r, "slot": s}, shape=shape, inputs=inputs).flatten(1) for r, s in taken]
    for one, other in combinations(rows, 2):
        assert (one @ other.T).abs().max() < 1e-6
    assert all((one @ one.T - torch.eye(len(one))).abs().max() < 1e-6 for one in rows)


def test_slots_do_not_meet_to_1e_14_as_constructed():
    for width in (320, 768):
        assert np.abs(slot_columns(width, range(8)).T @ slot_columns(width, range(8, 40))).max() < 1e-14
    null = energies(128)
    one, other = (null_columns(null, LayerShape("linear", (8, 128)), 0.5, range(*at)) for at in ((0, 8), (8, 40)))
    assert np.abs(one.T @ other).max() < 1e-14
    assert error(other) < 1e-14


def test_a_site_of_lower_rank_takes_the_first_columns_of_the_slot():
    pattern = {"basis": "slots", "rank": 4, "rank_pattern": {"other": 2, "big": 6}, "slot": 3}
    whole = torch.from_numpy(slot_columns(64, range(18, 24))).T.float()
    assert torch.equal(rows_of(pattern, name="unet.big", shape=LayerShape("linear", (8, 64))), whole)
    assert torch.equal(rows_of(pattern), whole[:4])
    assert torch.equal(rows_of(pattern, name="unet.other"), whole[:2])


def test_slots_need_a_slot_that_fits_and_a_slot_needs_slots():
    with pytest.raises(PresetError, match="has no slot yet"):
        rows_of({"basis": "slots"})
    with pytest.raises(PresetError, match=r"slot 8 of rank 8 does not fit 'unet\.site'"):
        rows_of({"basis": "slots", "slot": 8})
    with pytest.raises(PresetError, match=r"'method\.slot'.*only with basis slots"):
        method_from({"kind": "orthogonal", "slot": 1})
    with pytest.raises(PresetError, match=r"needs the inputs of the base at 'unet\.site'"):
        rows_of({"basis": "slots-null", "slot": 1})
    assert method_from({"kind": "orthogonal", "basis": "slots-null"}).needs_inputs
    assert not method_from({"kind": "orthogonal", "basis": "slots"}).needs_inputs


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny()


@pytest.mark.parametrize(("basis", "narrowest"), [("slots", 16), ("slots-null", 14)])
def test_the_capacity_is_that_of_the_narrowest_site(base, basis, narrowest):
    method = method_from({"kind": "orthogonal", "basis": basis, "rank": 5})
    sites = {"unet.wide": base.sites()["unet.mid_block.resnets.0.conv1"]}
    sites |= base.select(["unet.time_embedding.linear_1"])  # 16 wide
    identity, got = base.identity(), []
    for number in range(narrowest // 5):
        resolved = method.resolved(sites, identity, Origin(f"concept {number}"))
        slots.claim(method.bank(identity), f"concept {number}", resolved.slot, 5, narrowest)
        got.append(resolved.slot)
    assert got == list(range(narrowest // 5))
    with pytest.raises(
        PresetError, match=rf"{narrowest // 5} fit the narrowest layer, 'unet\.time_embedding.*{narrowest}"
    ):
        method.resolved(sites, identity, Origin("one more"))
    only_wide = {"unet.wide": sites["unet.wide"]}
    assert method.resolved(only_wide, identity, Origin("one more")).slot == narrowest // 5


def test_a_training_takes_the_next_slot_and_only_when_it_begins(recipe, tmp_path):  # noqa: F811
    settings = ("method.basis=slots", "method.rank=4", "steps=1")
    planned = plan(Order(recipe, run=tmp_path / "planned", settings=settings, method="orthogonal", name="cat"))
    assert planned.preset.method.slot == planned.card.method["slot"] == 0
    assert slots.holdings() == []
    for number, name in enumerate(("cat", "dog")):
        train(recipe, tmp_path / name, *settings, method="orthogonal", name=name)
        assert load_adapter(tmp_path / name / "adapter.safetensors").method.slot == number
    assert [(one.trigger, one.slot, one.rank) for one in slots.holdings()] == [("cat", 0, 4), ("dog", 1, 4)]
    train(recipe, tmp_path / "again", *settings, "seed=7", method="orthogonal", name="dog")
    assert len(slots.holdings()) == 2
    cat, dog, again = (weights(tmp_path / name) for name in ("cat", "dog", "again"))
    for name in (name for name in cat if name.endswith("down")):
        assert (cat[name] @ dog[name].T).abs().max() < 1e-6
        assert torch.equal(dog[name], again[name])


@pytest.mark.parametrize("basis", ["subset", "gaussian", "slots", "slots-null"])
def test_training_leaves_the_basis_as_it_was_bit_for_bit(recipe, tmp_path, home, basis):  # noqa: F811
    settings = (f"method.basis={basis}", "method.rank=4", "learning_rate=1e-2", "method.target_modules=[mid_block*]")
    training = plan(Order(recipe, run=tmp_path / "run", settings=(*settings, "steps=3"), method="orthogonal"))
    for _ in training.events():
        pass
    trained = load_adapter(tmp_path / "run" / "adapter.safetensors")
    inputs = {}
    if basis == "slots-null":
        sites = {name: training.base.sites()[name] for name in trained.patches}
        inputs = base_inputs(training.base, sites, Cache(home / "cache"))
    fresh = new_adapter(trained.card, inputs=inputs)
    moved = 0
    for name, terms in trained.patches.items():
        assert torch.equal(terms["main"].down, fresh.patches[name]["main"].down), name
        moved += int(terms["main"].up.detach().abs().sum() > 0)
    assert moved == len(trained.patches) > 10


# -- the low-energy space ------------------------------------------------------------------------------------------


def test_all_directions_make_the_low_energy_slots_the_plain_ones():
    null = null_columns(energies(64), SHAPE, 1.0, range(8, 16))
    assert np.abs(null - slot_columns(64, range(8, 16))).max() < 1e-12


@pytest.mark.parametrize("shape", [LayerShape("linear", (8, 96)), LayerShape("conv2d", (8, 200, 3, 3))])
def test_low_energy_slots_lie_in_the_low_energy_space(shape):
    matrix, share = energies(shape.in_features), 0.5
    columns = torch.from_numpy(null_columns(matrix, shape, share, range(16, 32)))
    space, bound = low_energy_space(matrix, int(shape.in_features * share))
    channels = columns.reshape(shape.in_features, -1)  # each place of the kernel by itself
    assert (channels - space @ (space.T @ channels)).abs().max() < 1e-12
    whole = torch.kron(matrix, torch.eye(columns.shape[0] // shape.in_features, dtype=torch.float64))
    assert torch.linalg.matrix_norm(columns.T @ whole @ columns, 2) <= bound * (1 + 1e-9)


def test_concepts_of_two_machines_hardly_meet_though_their_recorded_inputs_round_otherwise():
    """The slots depend on the space alone; eigenvectors of close eigenvalues turn, and slots of those would meet."""
    matrix, noise = energies(96, 1e-6), torch.randn(96, 96, generator=torch.Generator().manual_seed(1)).double()
    other = matrix + 1e-6 * (noise + noise.T) / 96**0.5
    for share, bound in ((0.875, 1e-5), (0.5, 2e-3)):
        here, there = (null_columns(m, SHAPE_96, share, at) for m, at in ((matrix, range(8)), (other, range(8, 16))))
        assert np.linalg.norm(here.T @ there, 2) < bound
    one, two = torch.linalg.eigh(matrix)[1][:, :8], torch.linalg.eigh(other)[1][:, 8:16]
    assert torch.linalg.matrix_norm(one.T @ two, 2) > 0.1


def test_low_energy_slots_disturb_the_base_less_by_construction(base):
    """|Delta C^1/2|^2 = tr(A B^T C B A^T) <= (greatest energy in the space) |A|^2, and |Delta| = |A|."""
    sites = base.select(["attention"])
    prompts, seeds = ["a cat", "a red dog"], [0, 1]
    grams = record_inputs(base, sites, prompts, seeds, 2)
    inputs = {name: gram.matrix for name, gram in grams.items()}
    drift = {}
    for basis in ("slots", "slots-null"):
        _, _, adapter = tiny_adapter("orthogonal", base=base, basis="subset")
        method = {**adapter.card.method, "basis": basis, "slot": 0, "rank": 4, "null_share": 0.5}
        adapter = new_adapter(adapter.card.model_copy(update={"method": method}), inputs=inputs)
        for number, (name, terms) in enumerate(adapter.patches.items()):
            up = terms["main"].up
            up.data = torch.randn(up.shape, generator=torch.Generator().manual_seed(number))
            delta, matrix = terms["main"].delta(sites[name].module.weight).double(), inputs[name].double()
            felt = float(torch.trace(delta @ matrix @ delta.T))
            if basis == "slots-null":
                _, bound = low_energy_space(matrix, len(matrix) // 2)
                assert felt <= (bound + 1e-6 * float(matrix.trace())) * float(delta.square().sum()), name
            drift[basis] = drift.get(basis, 0.0) + felt
        # The bound is about what the layers do: the same sum over the inputs that they are given.
        name = next(name for name in sites if name.endswith("attn1.to_q"))
        measured = _mean_change(base, sites[name], adapter.patches[name]["main"], prompts, seeds)
        delta = adapter.patches[name]["main"].delta(sites[name].module.weight).double()
        expected = float(torch.trace(delta @ inputs[name].double() @ delta.T))
        assert abs(measured - expected) < 1e-3 * expected + 1e-9
    assert drift["slots-null"] < 0.25 * drift["slots"]


def _mean_change(base, site, patch, prompts, seeds):
    """The mean |v(x)|^2 of a patch over the inputs of the pristine base."""
    seen = []
    hook = site.module.register_forward_pre_hook(lambda layer, args: seen.append(input_vectors(args[0], site.shape)))
    for prompt, seed in zip(prompts, seeds):
        base.generate(Request([prompt], [seed], steps=2))
    hook.remove()
    rows = torch.cat(seen)
    with torch.no_grad():
        return float(patch.output_term(rows, rows, None).double().square().sum(-1).mean())


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_needs_neither_the_ledger_nor_the_inputs(base, tmp_path):
    _, sites, adapter = tiny_adapter("orthogonal", base=base)
    method = {**adapter.card.method, "basis": "slots-null", "slot": 1, "rank": 4}
    inputs = {name: energies(site.shape.in_features).float() for name, site in sites.items()}
    adapter = new_adapter(adapter.card.model_copy(update={"method": method}), inputs=inputs)
    adapter.save(tmp_path / "one.safetensors")
    loaded = load_adapter(tmp_path / "one.safetensors")
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in adapter.tensors().items())
    assert [name for name, _ in next(iter(loaded.patches.values()))["main"].named_parameters()] == ["up"]


def test_tensors_of_another_shape_than_the_card_says_are_refused(base):
    _, _, adapter = tiny_adapter("orthogonal", base=base)
    name = next(iter(adapter.patches))
    tensors = dict(adapter.tensors())
    with pytest.raises(AdapterError, match="no 'down' and 'up'"):
        adapter_from(adapter.card, {key: value for key, value in tensors.items() if key != f"{name}.main.down"})
    with pytest.raises(AdapterError, match="shape that its card says"):
        adapter_from(adapter.card, {**tensors, f"{name}.main.down": torch.zeros(4, 5)})


def test_attached_slots_add_up_without_meeting(base):
    """Two concepts in disjoint slots: each sees of the other's inputs B_j only what is not in its own B_i."""
    site = base.sites()["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    methods = [method_from({"kind": "orthogonal", "basis": "slots", "rank": 4, "slot": slot}) for slot in (0, 1)]
    one, other = (method.patch(site.name, site.shape, Origin("any")) for method in methods)
    for patch in (one, other):
        patch.up.data.normal_(generator=torch.Generator().manual_seed(0))
    x = one.down  # inputs that only the first concept looks at
    with torch.no_grad():
        before = site.module(x)
        with attach({site.name: site}, {site.name: [other]}):
            assert (site.module(x) - before).abs().max() < 1e-5
        with attach({site.name: site}, {site.name: [one, other]}):
            both = site.module(x)
        with attach({site.name: site}, {site.name: [one]}):
            torch.testing.assert_close(site.module(x), both, rtol=0, atol=1e-5)


def test_a_settled_method_settles_to_itself(base):
    """As when a run is resumed from its own preset."""
    identity = base.identity()
    method = method_from({"kind": "orthogonal", "basis": "slots", "rank": 4})
    sites = base.select(["attention"])
    first = method.resolved(sites, identity, Origin("cat"))
    slots.claim(method.bank(identity), "cat", first.slot, 4, 32)
    assert first.resolved(sites, identity, Origin("cat")) == first
