"""SaRA: sparse training of the base's own weights, against dense masked training and against its formulas."""

import copy
import math
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import BUSY, collect, figures, recipe, train, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from studio.adapter import load_adapter
from studio.attachment import attach, find_sites
from studio.bases.registry import load_base
from studio.bases.stable_diffusion import StableDiffusion
from studio.customize import AdapterTask
from studio.data.cache import Cache
from studio.errors import AdapterError, ExportRefused, PresetError
from studio.exporting import export_adapter
from studio.generation import Use, wearing
from studio.method import Origin, method_from
from studio.patch import LayerShape
from studio.training import Order, plan, plan_resume
from trainers.sara.patch import SparsePatch
from trainers.sara.polar import polar_factor
from trainers.sara.selection import count_below, threshold_for

__all__ = ["recipe"]  # a fixture
ORIGIN = Origin("concept", 3)


class Everything(nn.Module):
    """One layer of each kind that has weights of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 16)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, tokens):
        x = self.conv1(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.linear(self.norm(x))
        return self.conv2(x.reshape(len(tokens), 4, 4, -1)).square()


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Everything().to(dtype).requires_grad_(False)


def sara(**settings):
    return method_from({"kind": "sara", **settings})


def patches_of(root, origin=ORIGIN, **settings):
    """(sites, patches) of a network called `net`."""
    sites = find_sites({"net": root})
    layers, shapes = {n: s.module for n, s in sites.items()}, {n: s.shape for n, s in sites.items()}
    return sites, sara(**settings).patches(shapes, origin, layers)


def worn(sites, patches, **how):
    return attach(sites, {name: [patch] for name, patch in patches.items()}, **how)


def tokens(count, seed=1):
    return torch.randint(0, 11, (count, 4), generator=torch.Generator().manual_seed(seed))


def parameter_of(sites, name, part):
    return getattr(sites[name].module, part)


def entries(patches):
    return [(name, part, patch) for name, patch in patches.items() for part in patch.parts]


def task_of(recipe, folder, *settings, **order):
    """The task of a training, ready for its first step, and the training."""
    training = plan(Order(recipe, run=folder, settings=settings, method="sara", **order))
    task = AdapterTask(
        training.preset.method,
        training.base,
        training.preset,
        training.run,
        training.pictures,
        training.card,
        Cache(folder.parent / "cache"),
    )
    list(task.prepare())
    return task, training


# -- what is selected ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.05, 0.5, 0.999])
def test_the_threshold_meets_the_wanted_count_exactly(share):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(300, 400, generator=generator) * scale for scale in (0.01, 1.0, 30.0)]
    count = int(share * 360_000)
    theta = threshold_for(tensors, count)
    assert count_below(tensors, theta) == count
    assert theta == torch.cat([t.flatten() for t in tensors]).abs().sort()[0][count].item()


def test_the_threshold_comes_as_near_as_ties_allow_and_never_to_nothing():
    tied = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    counts = [count_below([tied], threshold_for([tied], count)) for count in range(1, 10)]
    assert counts == [3, 3, 3, 3, 5, 5, 5, 9, 9]
    half = torch.randn(500, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert count_below([half], threshold_for([half], 10_000)) == pytest.approx(10_000, rel=0.02)


def test_a_share_of_all_entries_is_trained_and_the_card_says_the_threshold(recipe, tmp_path):
    task, training = task_of(recipe, tmp_path / "run", "method.target_modules=[all]", "method.parameters=0.03")
    total = sum(p.numel() for p in training.base.denoiser.parameters())
    trained = sum(p.numel() for p in task.adapter.parameters())
    assert trained == pytest.approx(0.03 * total, rel=1e-3)
    theta = task.adapter.card.method["threshold"]
    for name, part, patch in entries(task.patches):
        values = parameter_of(task.sites, name, part).detach().flatten()
        expected = torch.nonzero(values.abs() < theta).squeeze(1)
        assert torch.equal(patch.trained_positions(part).long(), expected)
    assert {site.shape.kind for site in task.sites.values()} == {"linear", "conv2d", "norm"}


def test_biases_are_left_alone_when_asked():
    _, patches = patches_of(network(), biases=False, parameters=0.5)
    assert {part for _, part, _ in entries(patches)} == {"weight"}


def test_the_learning_rate_follows_the_threshold():
    for theta, rate in ((2e-3, 4.97e-4), (8e-4, 7.56e-4), (2e-4, 9.32e-4)):
        assert sara(threshold=theta).peak_learning_rate() == pytest.approx(rate, rel=1e-3)
    assert sara(threshold=1.0).peak_learning_rate() == 1e-4


def test_largest_and_random_train_as_many_entries_as_smallest():
    _, smallest = patches_of(network(), parameters=0.2)
    sites, largest = patches_of(network(), parameters=0.2, select="largest")
    _, random = patches_of(network(), parameters=0.2, select="random")
    count = [sum(len(p.trained_positions(part)) for _, part, p in entries(ps)) for ps in (smallest, largest, random)]
    assert count[1] == count[0]
    assert count[2] == pytest.approx(count[0], rel=0.15)
    chosen = {(n, part): p.trained_positions(part).long() for n, part, p in entries(largest)}
    values = {key: parameter_of(sites, *key).flatten().abs() for key in chosen}
    least = min(values[key][index].min() for key, index in chosen.items())
    for name, site in sites.items():
        for part, parameter in site.module.named_parameters():
            index = chosen.get((name, part), torch.empty(0, dtype=torch.long))
            others = parameter.flatten().abs()[~torch.isin(torch.arange(parameter.numel()), index)]
            assert not len(others) or others.max() < least


def test_a_weight_that_two_layers_share_is_trained_once_with_both_gradients():
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).requires_grad_(False)
    root[2].weight = root[0].weight
    dense = copy.deepcopy(root).requires_grad_(True)
    sites, patches = patches_of(root, parameters=0.5)
    assert [name for name, _, _ in entries(patches)] == ["net.0"]
    x = torch.randn(3, 6)
    with worn(sites, patches, train=True):
        root(x).square().sum().backward()
    dense(x).square().sum().backward()
    patch = patches["net.0"]
    assert torch.equal(patch.weight_change.grad, dense[0].weight.grad.flatten()[patch.weight_index.long()])


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["no", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gathered_gradient_is_the_dense_gradient_bit_for_bit(dtype, layout, recompute):
    root = network(dtype=dtype)
    root.conv2.to(memory_format=layout)
    dense = copy.deepcopy(root).requires_grad_(True)
    sites, patches = patches_of(root, parameters=0.4)
    lead = torch.zeros(1, requires_grad=True)  # reentrant checkpointing needs an input with a gradient

    def loss(model, batch):
        if recompute == "no":
            return model(batch).float().mean()
        run = lambda batch, lead: model(batch) + (0 * lead).to(dtype)  # noqa: E731
        return checkpoint(run, batch, lead, use_reentrant=recompute == "reentrant").float().mean()

    expected = {key[:2]: torch.zeros_like(key[2].change_of(key[1])) for key in entries(patches)}
    with worn(sites, patches, train=True):
        for micro in range(3):
            batch = tokens(2, micro)
            loss(root, batch).backward()
            dense.zero_grad()
            loss(dense, batch).backward()
            for name, part, patch in entries(patches):
                gradient = dense.get_parameter(f"{name[4:]}.{part}").grad.reshape(-1)
                expected[name, part].data.add_(gradient[patch.trained_positions(part).long()])
        for name, part, patch in entries(patches):
            assert torch.equal(patch.change_of(part).grad, expected[name, part]), (name, part)
            assert parameter_of(sites, name, part).grad is None
    assert {LayerShape.of(sites[name].module).kind for name, _, _ in entries(patches)} == {
        "embedding", "conv1d", "norm", "linear", "conv2d",
    }  # fmt: skip


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    root = network()
    sites, patches = patches_of(root, parameters=0.4)
    whole = tokens(6)
    with worn(sites, patches, train=True):
        root(whole).mean().backward()
        at_once = {key[:2]: key[2].change_of(key[1]).grad.clone() for key in entries(patches)}
        for _, part, patch in entries(patches):
            patch.change_of(part).grad = None
        for piece in whole.split(2):
            (root(piece).mean() / 3).backward()
    for name, part, patch in entries(patches):
        torch.testing.assert_close(patch.change_of(part).grad, at_once[name, part], rtol=1e-5, atol=1e-8)


def test_scaled_gradients_are_unscaled_and_an_overflow_skips_the_step():
    root = network()
    sites, patches = patches_of(root, parameters=0.4)
    parameters = [p for patch in patches.values() for p in patch.parameters()]
    optimizer, scaler = torch.optim.SGD(parameters, 1.0), torch.amp.GradScaler("cpu", init_scale=256.0)
    with worn(sites, patches, train=True):
        root(tokens(2)).mean().backward()
        plain = [p.grad.clone() for p in parameters]
        optimizer.zero_grad()
        scaler.scale(root(tokens(2)).mean()).backward()
        scaler.unscale_(optimizer)
        for parameter, gradient in zip(parameters, plain, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        parameters[0].grad.fill_(float("inf"))
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(root(tokens(2)).mean() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all((p == 0).all() for p in parameters)
    assert scaler.get_scale() == 128.0


def test_layers_where_nothing_is_selected_make_no_gradient():
    root = network()
    sites, patches = patches_of(root, threshold=1e-6)  # all that is so small are the zeros of a norm's bias
    with worn(sites, patches, train=True):
        assert [name for name, p in root.named_parameters() if p.requires_grad] == ["norm.bias"]
    assert not any(p.requires_grad for p in root.parameters())


class Alive(TorchDispatchMode):
    """Counts the dense gradients of a model's weights, all of one shape, that exist at a time."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.shape = next(model.parameters()).shape
        self.refs, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape:
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.weights:
                self.refs[storage.data_ptr()] = weakref.ref(storage)
        self.refs = {key: ref for key, ref in self.refs.items() if ref() is not None}
        self.most = max(self.most, len(self.refs))
        return out


def test_one_dense_gradient_is_alive_at_a_time():
    torch.manual_seed(0)
    root = nn.Sequential(*[nn.Linear(48, 48, bias=False) for _ in range(12)]).requires_grad_(False)
    dense = copy.deepcopy(root).requires_grad_(True)
    sites, patches = patches_of(root, parameters=0.05)
    counts = []
    with worn(sites, patches, train=True):
        for model in (root, dense):
            loss = model(torch.randn(2, 48)).square().sum()
            with Alive(model) as alive:
                loss.backward()
            counts.append(alive.most)
    assert counts == [1, 12]


def test_the_state_is_twenty_bytes_an_entry(recipe, tmp_path):
    task, _ = task_of(recipe, tmp_path / "run", "method.target_modules=[all]", "method.parameters=0.3")
    count = sum(p.numel() for p in task.adapter.parameters())
    kept = [v for name, v in task.adapter.tensors().items() if not name.endswith("_base")]
    own = sum(v.numel() * v.element_size() for v in kept)  # index and change
    stashed = sum(
        stash.values.numel() * stash.values.element_size()
        for site in task.sites.values()
        for stash in site.module.forward.journal.stashes.values()
    )
    optimizer = torch.optim.AdamW(task.adapter.parameters())
    for parameter in task.adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert (own + stashed + moments) / count == 20
    task.close()


# -- the loop ------------------------------------------------------------------------------------------------------

SHORT = (
    "method.target_modules=[all]",
    "method.parameters=0.1",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "learning_rate=4e-3",
    "lr_schedule=cosine",
    "warmup_steps=2",
    "weight_decay=0",
    "max_grad_norm=0.05",
    "steps=8",
)


def dense_masked_training(recipe, folder, *settings):
    """The oracle: every weight has a dense gradient, masked; AdamW on dense tensors; reselection as the paper has it.

    Returns the weights' changes by site and part, the norms before clipping, and the last mask.
    """
    task, training = task_of(recipe, folder, *settings)
    preset, theta = training.preset, training.preset.method.threshold
    task.attachment.detach()
    parameters = {(n, p): parameter_of(task.sites, n, p) for n, p, _ in entries(task.patches)}
    start = {key: p.detach().clone() for key, p in parameters.items()}
    mask = {key: p.detach().abs() < theta for key, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), betas=preset.betas, weight_decay=0.0)
    norms = []
    for step in range(preset.steps):
        if step == preset.steps // 2:
            mask = {key: mask[key] & (p.detach().abs() < theta) for key, p in parameters.items()}
        optimizer.param_groups[0]["lr"] = preset.learning_rate_at(step)
        for micro in range(preset.gradient_accumulation_steps):
            count = preset.batch_size * preset.gradient_accumulation_steps
            (task.losses(step, micro, range(preset.batch_size)).sum() / count).backward()
        for key, parameter in parameters.items():
            parameter.grad *= mask[key]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), preset.max_grad_norm)))
        before = {key: p.detach().clone() for key, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(torch.where(mask[key], parameter, before[key]))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {key: p.detach() - start[key] for key, p in parameters.items()}, norms, mask


def test_a_training_equals_dense_masked_training_with_reselection_accumulation_and_clipping(recipe, tmp_path):
    events = train(recipe, tmp_path / "run", *SHORT, method="sara")
    expected, norms, mask = dense_masked_training(recipe, tmp_path / "dense", *SHORT)
    adapter = load_adapter(tmp_path / "run" / "adapter.safetensors")
    theta = adapter.card.method["threshold"]
    moved = 0
    for (name, part), change in expected.items():
        patch = adapter.patches[name]["main"]
        own = patch.delta(torch.zeros(patch.shape.weight)) if part == "weight" else patch.bias_delta()
        torch.testing.assert_close(own, change, rtol=0, atol=1e-6)
        chosen = torch.zeros(mask[name, part].numel(), dtype=torch.bool)
        chosen[patch.trained_positions(part).long()] = True
        assert torch.equal(chosen, mask[name, part].flatten()), (name, part)
        moved += int((change.abs() > theta / 2).sum())
    assert moved > 100  # else the test would show little
    assert (
        0
        < sum(m.sum() for m in mask.values())
        < 0.9
        * sum(
            len(p.get_buffer(f"{part}_index"))
            for _, part, p in entries({n: t["main"] for n, t in adapter.patches.items()})
        )
    )
    shown = [event.data["grad_norm"] for event in events if event.kind == "step"]
    assert shown == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.05  # it was clipped


def test_entries_that_are_not_selected_stay_bit_for_bit_under_weight_decay(recipe, tmp_path):
    training = plan(
        Order(recipe, run=tmp_path / "run", method="sara", settings=(*SHORT, "weight_decay=0.5", "steps=5"))
    )
    theta = training.preset.method.threshold
    pristine = {k: v.clone() for k, v in training.base.denoiser.named_parameters()}
    seen = 0
    for event in training.events():
        if event.kind == "step" and event.step == 5:
            for name, value in training.base.denoiser.named_parameters():
                frozen = pristine[name].abs() >= theta
                assert torch.equal(value.detach()[frozen], pristine[name][frozen])
                seen += int((value.detach() != pristine[name]).sum())
    assert seen > 1000
    for name, value in training.base.denoiser.named_parameters():
        assert torch.equal(value, pristine[name])
        assert not value.requires_grad


def test_after_reselection_frozen_entries_keep_their_values_and_the_others_go_on(recipe, tmp_path):
    settings = ("checkpoint_every=1", "checkpoints_kept=9")
    train(recipe, tmp_path / "run", *SHORT, *settings, method="sara")
    at_half, after, end = (
        load_adapter(tmp_path / "run" / "checkpoints" / f"step-{step}" / "adapter.safetensors").patches
        for step in (4, 5, 8)
    )
    theta = load_adapter(tmp_path / "run" / "adapter.safetensors").card.method["threshold"]
    base = plan(Order(recipe, run=tmp_path / "other", method="sara", settings=SHORT)).base
    settled = went_on = 0
    for name, site in base.sites().items():
        for part in at_half[name]["main"].parts if name in at_half else ():
            half, last, final = (adapter[name]["main"] for adapter in (at_half, after, end))
            index, before = half.writes()[part]
            values = getattr(site.module, part).detach().flatten()[index.long()] + before
            live = torch.zeros(len(index), dtype=torch.bool)
            live[last.get_buffer(f"{part}_live").long()] = True
            assert torch.equal(live, values.abs() < theta)
            assert torch.equal(final.writes()[part][0], index)
            assert torch.equal(final.writes()[part][1][~live], before[~live])
            settled += int((~live).sum())
            went_on += int((last.writes()[part][1][live] != before[live]).sum())
    assert settled > 100
    assert went_on > 100  # the step of the reselection is not lost


@pytest.mark.parametrize("stop_after", [4, 6])
def test_stopping_around_the_reselection_equals_an_uninterrupted_run_bit_for_bit(recipe, tmp_path, stop_after):
    settings = (
        *(s for s in BUSY if not s.startswith(("method.dropout", "learning_rate", "sample", "checkpoint_every"))),
        *("method.target_modules=[all]", "method.parameters=0.1", "learning_rate=4e-3", "checkpoint_every=4"),
        *("method.rank_weight=0.01", "method.rank_every=2", "data.prior.pictures=0"),
    )
    whole = train(recipe, tmp_path / "whole", *settings, method="sara")
    first = train(recipe, tmp_path / "halves", *settings, stop_after=stop_after, method="sara")
    assert first[-1].kind == "stopped"
    second = collect(plan_resume(tmp_path / "halves"))
    assert second[-1].kind == "finished"
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == two.keys()
    assert any(name.endswith("weight_live") for name in one)
    assert all(len(one[name]) == len(one[name.replace("change", "index")]) for name in one if name.endswith("_change"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for what in ("step", "validation"):
        assert figures(whole, what) == figures(first, what) | figures(second, what)


def test_recomputing_activations_changes_nothing_that_is_learned(recipe, tmp_path):
    for name, flag in (("plain", "false"), ("saving", "true")):
        train(recipe, tmp_path / name, *SHORT, f"gradient_checkpointing={flag}", "steps=3", method="sara")
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [(), ("dco_beta=10",)])
def test_autocast_and_a_reference_pass_still_let_every_entry_learn(recipe, tmp_path, settings):
    events = train(recipe, tmp_path / "run", *SHORT, "mixed_precision=bf16", *settings, "steps=3", method="sara")
    assert all(event.data["grad_norm"] > 0 for event in events if event.kind == "step")
    changes = torch.cat([v for name, v in weights(tmp_path / "run").items() if name.endswith("_change")])
    assert (changes != 0).float().mean() > 0.9


def test_autocast_never_computes_with_the_weights_of_another_strength():
    root = network()
    sites, patches = patches_of(root, parameters=0.4)
    for patch in patches.values():
        for parameter in patch.parameters():
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    with worn(sites, patches, train=True) as attachment:
        with torch.autocast("cpu", torch.bfloat16):
            alone = root(tokens(2))
        with torch.autocast("cpu", torch.bfloat16):
            attachment.weight = 0.0
            with torch.no_grad():
                reference = root(tokens(2))
            attachment.weight = 1.0
            assert torch.equal(root(tokens(2)), alone)
        assert not torch.allclose(reference, alone, rtol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("method.threshold=1e-9", "method.biases=false"), "selects nothing of"),
        (("method.threshold=100",), "selects everything of"),
        (("method.parameters=100000000",), "everything or more of the"),
        (("method.parameters=1.5",), "a count must be whole"),
        (("method.parameters=-3",), "greater than 0"),
        (("method.parameters=0.1", "method.threshold=0.01"), "not both"),
        (("method.support=[3, 2, 0]",), "part 3 of 2 does not exist"),
        (("method.target_modules=[nowhere]",), "nothing in .* matches 'nowhere'"),
        (("method.treshold=0.1",), "unknown key 'method.treshold'"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused_before_anything_is_written(recipe, tmp_path, settings, message):
    with pytest.raises(PresetError, match=message):
        plan(Order(recipe, run=tmp_path / "run", method="sara", settings=settings))
    assert not (tmp_path / "run").exists()


# -- the nuclear norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 90), (90, 70), (8, 54)])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_polar_factor_is_the_gradient_of_the_nuclear_norm(shape, share):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix *= matrix.abs() < matrix.abs().flatten().quantile(share)
    matrix = matrix.float()
    leaf = matrix.double().requires_grad_(True)
    torch.linalg.matrix_norm(leaf, "nuc").backward()
    exact = polar_factor(matrix, exact=True)
    values = torch.linalg.svdvals(matrix.double())
    if values.min() > 1e-6 * values.max():  # elsewhere the norm has a kink, and many subgradients
        torch.testing.assert_close(exact, leaf.grad.float(), rtol=0, atol=1e-6)
    assert (exact.double() * matrix).sum() == pytest.approx(float(values.sum()), rel=1e-6)
    assert torch.linalg.svdvals(exact.double()).max() <= 1 + 1e-6
    chosen = matrix != 0
    assert torch.cosine_similarity(polar_factor(matrix)[chosen], exact[chosen], dim=0) > 0.99


@pytest.mark.parametrize("target", ["values", "delta"])
def test_the_penalty_adds_lambda_times_the_subgradient_at_the_trained_entries_of_one_layer(target):
    torch.manual_seed(0)
    root = nn.ModuleDict({"a": nn.Linear(20, 12), "b": nn.Conv2d(3, 10, 3)}).requires_grad_(False)
    method = sara(parameters=0.3, rank_weight=0.5, rank_every=3, rank_target=target, rank_exact=True)
    sites, patches = patches_of(root, parameters=0.3)
    drawn = set()
    with worn(sites, patches, train=True) as attachment:
        for patch in patches.values():
            for parameter in patch.parameters():
                parameter.data.normal_(std=0.01)
        attachment.refresh()
        for step in range(13):
            for patch in patches.values():
                patch.zero_grad()
            method.penalise(patches, step, seed=7)
            penalised = [name for name, p in patches.items() if p.weight_change.grad is not None]
            assert len(penalised) == (step % 3 == 0)
            for name in penalised:
                drawn.add(name)
                patch, layer = patches[name], sites[name].module
                index = patch.weight_index.long()
                values = layer.weight.detach().flatten()[index] if target == "values" else patch.weight_change.detach()
                matrix = torch.zeros(layer.weight.numel()).index_copy(0, index, values).view(len(layer.weight), -1)
                u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
                rank = int((s > 1e-10).sum())
                expected = 1.5 * (u[:, :rank] @ vh[:rank]).flatten()[index]
                torch.testing.assert_close(patch.weight_change.grad.double(), expected, rtol=0, atol=1e-6)
                assert patch.bias_change.grad is None
    assert drawn == {"net.a", "net.b"}


def test_the_penalty_is_alive_and_lowers_the_nuclear_norm(recipe, tmp_path):
    settings = (
        *SHORT,
        "learning_rate=4e-3",
        "max_grad_norm=0",
        "method.progressive=false",
        "steps=10",
        "gradient_accumulation_steps=1",
    )
    norms = {}
    base = StableDiffusion.tiny()
    for name, weight in (("off", 0.0), ("on", 100.0)):
        train(recipe, tmp_path / name, *settings, f"method.rank_weight={weight}", method="sara")
        norms[name] = 0.0
        for site, terms in load_adapter(tmp_path / name / "adapter.safetensors").patches.items():
            patch = terms["main"]
            if patch.shape.kind not in ("linear", "conv2d") or "weight" not in patch.parts:
                continue
            index, change = patch.writes()["weight"]
            own = base.sites()[site].module.weight.detach()
            matrix = torch.zeros(own.numel()).index_copy(0, index.long(), own.flatten()[index.long()] + change)
            norms[name] += float(torch.linalg.matrix_norm(matrix.view(len(own), -1), "nuc"))
    assert norms["on"] < 0.98 * norms["off"]


# -- on and off, files ---------------------------------------------------------------------------------------------


def trained_adapter(recipe, folder, *settings):
    train(recipe, folder, *SHORT, "steps=2", "gradient_accumulation_steps=1", *settings, method="sara")
    return load_adapter(folder / "adapter.safetensors")


def outputs(base, noise_seed=0):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(noise_seed))
    with torch.no_grad():
        return base.predict(noise, torch.tensor([300]), base.encode_prompts(["a cat"], (16, 16)))


def test_attaching_fresh_patches_to_everything_leaves_the_output_bit_for_bit(recipe, tmp_path):
    task, training = task_of(recipe, tmp_path / "run", *SHORT, "method.parameters=0.5")
    with_patches = outputs(training.base)
    task.close()
    assert torch.equal(outputs(training.base), with_patches)
    assert torch.equal(outputs(StableDiffusion.tiny()), with_patches)


def test_a_file_loads_to_the_same_change_and_leaves_no_trace(recipe, tmp_path):
    adapter = trained_adapter(recipe, tmp_path / "run")
    base = StableDiffusion.tiny()
    before, plain = {k: v.clone() for k, v in base.denoiser.state_dict().items()}, outputs(base)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, terms in adapter.patches.items():
            layer = merged.sites()[name].module
            layer.weight += terms["main"].delta(layer.weight)
            if (bias := terms["main"].bias_delta()) is not None:
                layer.bias += bias
    with worn(base.sites(), {name: terms["main"] for name, terms in adapter.patches.items()}) as attachment:
        changed = outputs(base)
        assert torch.equal(changed, outputs(merged))
        attachment.weight = 0.5
        between = outputs(base)
        attachment.weight = 1.0
        assert torch.equal(outputs(base), changed)
    assert not torch.equal(changed, plain)
    assert not torch.equal(between, changed)
    assert all(torch.equal(before[k], v) for k, v in base.denoiser.state_dict().items())


def test_the_sum_over_a_half_precision_base_is_kept_in_fp32_and_taken_off_bit_for_bit():
    root = network(dtype=torch.bfloat16)
    pristine = copy.deepcopy(root)
    sites, patches = patches_of(root, parameters=0.4)
    parameters = [p for patch in patches.values() for p in patch.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, 1e-5)  # far below the spacing of bf16 numbers
    with worn(sites, patches, train=True) as attachment:
        for _ in range(20):
            root(tokens(2)).float().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            attachment.refresh()
        for name, part, patch in entries(patches):
            index = patch.trained_positions(part).long()
            own = pristine.get_parameter(f"{name[4:]}.{part}").flatten()[index].float()
            written = (own + patch.change_of(part).detach()).bfloat16()
            assert torch.equal(parameter_of(sites, name, part).flatten()[index], written)
    assert 1e-5 < max(p.abs().max() for p in parameters) < 3e-4
    for own, other in zip(root.parameters(), pristine.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_base_with_other_weights_is_refused_and_a_rounded_one_is_not(recipe, tmp_path):
    adapter = trained_adapter(recipe, tmp_path / "run")
    patches = {name: terms["main"] for name, terms in adapter.patches.items()}
    other = StableDiffusion.tiny(seed=1)
    with pytest.raises(AdapterError, match="depends on the weights"), wearing(other, [Use("x", adapter)]):
        pass
    fine_tuned = StableDiffusion.tiny()
    victim = fine_tuned.denoiser.mid_block.resnets[0].conv1
    with torch.no_grad():
        victim.weight *= 1.05  # one layer only
    before = copy.deepcopy(fine_tuned.denoiser.state_dict())
    with pytest.raises(AdapterError, match=r"mid_block\.resnets\.0\.conv1' has other values"):
        worn(fine_tuned.sites(), patches)
    assert all(torch.equal(before[k], v) for k, v in fine_tuned.denoiser.state_dict().items())
    assert "forward" not in vars(victim)
    rounded = StableDiffusion.tiny()
    rounded.denoiser.to(torch.bfloat16)
    worn(rounded.sites(), patches).detach()


def test_concepts_with_disjoint_support_share_no_entry_and_sum_without_touching_each_other(recipe, tmp_path):
    adapters = [trained_adapter(recipe, tmp_path / str(k), f"method.support=[{k}, 2, 5]") for k in (1, 2)]
    whole = trained_adapter(recipe, tmp_path / "whole")
    one, two, both = ({n: t["main"] for n, t in a.patches.items()} for a in (*adapters, whole))
    count = [0, 0]
    for name, part, patch in entries(both):
        parts = [p[name].writes()[part][0] if part in p[name].parts else torch.empty(0).int() for p in (one, two)]
        assert torch.equal(torch.cat(parts).sort()[0], patch.writes()[part][0])
        count = [count[0] + len(parts[0]), count[1] + len(parts[1])]
    assert count[0] == pytest.approx(count[1], rel=0.1)
    base = StableDiffusion.tiny()
    start = {k: v.clone() for k, v in base.denoiser.named_parameters()}
    alone = []
    for patches in (one, two):
        with worn(base.sites(), patches):
            alone.append({k: v.clone() for k, v in base.denoiser.named_parameters()})
    with worn(base.sites(), two), worn(base.sites(), one):
        for name, value in base.denoiser.named_parameters():
            expected = torch.where(alone[0][name] != start[name], alone[0][name], alone[1][name])
            assert torch.equal(value, expected)


def test_merged_weights_and_dense_exports_hold_weights_and_biases_and_a_lora_only_on_request(recipe, tmp_path):
    adapter, base = trained_adapter(recipe, tmp_path / "run"), StableDiffusion.tiny()
    export_adapter(adapter, base, "checkpoint", tmp_path / "pipeline")
    merged = load_base(str(tmp_path / "pipeline"))
    with worn(base.sites(), {name: terms["main"] for name, terms in adapter.patches.items()}):
        for one, two in zip(merged.denoiser.parameters(), base.denoiser.parameters(), strict=True):
            assert torch.equal(one, two)
    assert export_adapter(adapter, base, "diff", tmp_path / "dense.safetensors").status == "exact"
    dense = load_file(tmp_path / "dense.safetensors")
    biases = {name: terms["main"].bias_delta() for name, terms in adapter.patches.items()}
    for name, change in biases.items():
        if change is not None:
            assert torch.equal(dense[f"lora_{name.replace('.', '_')}.diff_b"], change)
    assert sum(name.endswith(".diff_b") for name in dense) > 20
    with pytest.raises(ExportRefused, match=r"neither a linear layer nor a convolution|bias that is changed"):
        export_adapter(adapter, base, "diffusers", tmp_path / "lora", allow_approximate=True)
    thin = trained_adapter(recipe, tmp_path / "thin", "method.target_modules=[attention]", "method.biases=false")
    with pytest.raises(ExportRefused, match="no exact low-rank form"):
        export_adapter(thin, base, "diffusers", tmp_path / "lora")
    report = export_adapter(thin, base, "diffusers", tmp_path / "lora", rank=4, allow_approximate=True)
    assert report.status != "exact"
    assert 0.1 < report.max_error < 1


@pytest.mark.parametrize("damage", ["unsorted", "outside", "short", "unknown", "incomplete"])
def test_a_damaged_file_is_refused_with_the_site(recipe, tmp_path, damage):
    trained_adapter(recipe, tmp_path / "run")
    path = tmp_path / "run" / "adapter.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("conv1.main.weight_index"))
    prefix = name.removesuffix("index")
    if damage == "unsorted":
        tensors[name] = tensors[name].flip(0).contiguous()
    elif damage == "outside":
        tensors[name][-1] = 10**8
    elif damage == "short":
        tensors[f"{prefix}change"] = tensors[f"{prefix}change"][1:].clone()
    elif damage == "unknown":
        tensors[f"{prefix}extra"] = torch.zeros(2)
    else:
        del tensors[f"{prefix}base"]
    save_file(tensors, path, header)
    with pytest.raises(AdapterError, match="conv1"):
        load_adapter(path)


def test_a_site_without_any_entry_has_an_empty_patch():
    _, patches = patches_of(network(), threshold=1e-6)
    empty = patches["net.linear"]
    assert isinstance(empty, SparsePatch)
    assert not empty.state_dict()
    assert not empty.writes()
    assert empty.delta(torch.ones(16, 8)).abs().sum() == 0
    assert math.prod(empty.shape.weight) == 128
