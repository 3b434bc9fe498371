"""The benchmark's own arithmetic: what it counts is there, what it compares is comparable. Nothing here is timed."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from studio.attachment import find_sites
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.bench import cases, merge
from studio.bench.cases import Case
from studio.bench.memory import LiveBytes, fake_patches, footprint
from studio.bench.peers import FullFineTuning, PeftLora, SaraReference
from studio.bench.rows import Bar, Ratio, Row, judge, markdown
from studio.bench.run import machine, memory_rows, speed_rows
from studio.bench.speed import ratio, take_turns
from studio.bench.trainee import Ours, equal_method, lora_share, trainable_kinds
from studio.bench.workload import SD15, SDXL, Workload, bare_base, single_layer, training
from studio.cli import run as cli
from studio.method import methods

KIND_NAMES = trainable_kinds()
PICO = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def pico(checkpointing=False):
    return training(bare_base(StableDiffusion, PICO), 2, checkpointing)


def layer(width=24):
    return single_layer(nn.Linear(width, width), torch.randn(2, 5, width))


def fake_mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


def measured(name, make=pico, rank=2, made=None):
    """The footprint of a contender; the contender itself is put into `made`."""
    mode, case = fake_mode(), Case("", make, ("all",), rank)

    def trainee(workload):
        one = case.trainee(name, workload, fake_patches(mode))
        if made is not None:
            made.append(one)
        return one

    return footprint(mode, make, trainee)


# -- memory --------------------------------------------------------------------------------------------------------


def test_tracked_peak_of_a_known_chain_equals_the_hand_count():
    with LiveBytes() as live:
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000
        c = b.view(10, 100)[3]  # a view has no bytes of its own
        del a  # 4000
        d = b.double()  # 12000
        assert (live.now, live.peak) == (12000, 12000)
        del b, d  # the view still holds 4000
        assert live.now == 4000
        del c
        assert (live.now, live.peak) == (0, 12000)


def test_tracked_peak_of_a_backward_pass_equals_the_hand_count():
    """y = tanh(x w), x (8, 64): forward keeps y and not x w; backward adds the gradients of x w, then of w."""
    unit, weight, scalar = 8 * 64 * 4, 64 * 64 * 4, 4
    with fake_mode(), LiveBytes() as live:
        x, w = torch.empty(8, 64), torch.empty(64, 64, requires_grad=True)
        assert live.now == unit + weight
        y = torch.tanh(x @ w)
        assert live.now == 2 * unit + weight
        assert live.peak == 3 * unit + weight
        y.sum().backward()
        assert live.peak == 3 * unit + 2 * weight + 2 * scalar  # the loss, and the 1 that backward starts from
        del y
        assert live.now == unit + 2 * weight


def test_fake_tensors_count_as_real_ones():
    def bytes_of(mode):
        with mode, LiveBytes() as live:
            layer = nn.Linear(32, 16)
            loss = torch.nn.functional.silu(layer(torch.ones(8, 32))).square().mean()
            loss.backward()
            return live.peak, live.now

    assert bytes_of(fake_mode()) == bytes_of(nullcontext())


@pytest.mark.parametrize("name", ["lora", "peft-lora", "full"])
def test_optimizer_state_takes_eight_bytes_per_trained_number(name):
    made = []
    measured(name, layer, made=made)
    state = made[0].optimizer.state.values()
    assert sum(s[key].numel() * s[key].element_size() for s in state for key in ("exp_avg", "exp_avg_sq")) == (
        8 * made[0].trained
    )


def test_full_fine_tuning_keeps_its_moments_and_step_counters():
    found = measured("full", layer)
    assert found.kept == 8 * found.trained + 2 * 4  # weight and bias each have a counter of 4 bytes
    assert found.kept_with_gradients == found.kept + 4 * found.trained


def test_sara_keeps_twenty_bytes_per_entry_and_some_witnesses():
    made = []
    found = measured("sara", lambda: layer(256), 8, made)
    witnesses = sum(
        b.numel() * 4 for p in made[0].patches.values() for n, b in p.named_buffers() if n.endswith("_base")
    )
    assert found.kept == 20 * found.trained + witnesses + 4 * len(made[0].parameters)
    assert found.kept < 20.2 * found.trained


def chain():
    module = nn.ModuleDict({"layers": nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])}).requires_grad_(False)
    x = torch.randn(4, 64)
    return Workload(module, [x], lambda *_: find_sites({"unet": module}), lambda: module["layers"](x).sum().backward())


def test_the_dense_way_to_sara_holds_all_gradients_at_once_and_hooks_one_at_a_time():
    dense, hooked = measured("sara-reference", chain), measured("sara", chain)
    matrix = 64 * 64
    assert dense.trained == pytest.approx(hooked.trained, rel=0.05)
    assert dense.kept > 12 * matrix + 12 * dense.trained  # a byte of mask per entry, beside values and moments
    for_gradients = [found.peak - found.kept for found in (dense, hooked)]
    assert for_gradients[0] - for_gradients[1] == pytest.approx(11 * 4 * matrix, rel=0.1)


def test_lora_of_peft_and_ours_train_the_same_numbers_and_ours_needs_no_more_memory():
    ours, theirs = measured("lora"), measured("peft-lora")
    assert ours.trained == theirs.trained
    assert ours.peak <= theirs.peak


def test_checkpointing_lowers_the_peak():
    def peak(checkpointing):
        base = {**PICO, "sample_size": 32}
        return footprint(
            fake_mode(), lambda: training(bare_base(StableDiffusion, base), 4, checkpointing), FullFineTuning
        ).peak

    assert peak(True) < peak(False)


def test_true_shapes_have_the_published_number_of_weights():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        counts = [sum(p.numel() for p in UNet2DConditionModel(**config).parameters()) for config in (SD15, SDXL)]
    assert counts == [859_520_964, 2_567_463_684]


def test_the_memory_table_has_a_row_for_every_method_and_peer():
    rows = list(memory_rows([Case("layer", layer, ("all",), 2, cases.EVERYWHERE)]))
    assert {row.name for row in rows} == {*KIND_NAMES, *cases.PEERS}
    assert all(row.figures["peak_gib"] > 0 for row in rows)
    assert {"lora", "dora", "orthogonal", "flora", "tlora", "sara"} <= set(KIND_NAMES)


# -- equal coverage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("all",), ("attention",)])
def test_sara_trains_as_many_numbers_as_lora(targets):
    workload = pico()
    case = Case("pico", pico, targets, 2)
    lora, sara = (case.trainee(name, pico()).trained for name in ("lora", "sara"))
    assert lora_share(workload, targets, 2, methods()["sara"].kinds) < 0.5
    assert sara == pytest.approx(lora, rel=1e-3)


def test_the_dense_way_to_sara_trains_as_many_numbers_too():
    case = Case("pico", pico, ("all",), 2)
    assert case.trainee("sara-reference", pico()).trained == pytest.approx(
        case.trainee("sara", pico()).trained, rel=0.05
    )


# -- who is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KIND_NAMES, *cases.PEERS])
def test_every_contender_learns(name):
    torch.manual_seed(0)
    one = Case("layer", layer, ("all",), 2).trainee(name, layer())
    for group in one.optimizer.param_groups:
        group["lr"] = 1e-3
    before = [p.detach().clone() for p in one.parameters]
    for _ in range(2):
        one.step()
    assert all(p.grad is None for p in one.parameters)
    moved = [not torch.equal(p, q) for p, q in zip(one.parameters, before)]
    assert sum(moved) > 0.9 * len(moved)


def test_the_dense_way_to_sara_equals_ours_step_by_step():
    """Same entries, same AdamW without decay: same weights, so the peer is no straw man."""
    torch.manual_seed(0)
    mine, peers = (single_layer(nn.Linear(24, 20), torch.ones(3, 24)) for _ in "12")
    peers.module.load_state_dict(mine.module.state_dict())
    peers.batch[1].copy_(mine.batch[1])
    ours = Ours(equal_method("sara", ("all",), 1, 0.25, biases=False), mine)
    theirs = SaraReference(peers, 0.25)
    for one in (ours, theirs):
        for group in one.optimizer.param_groups:
            group["weight_decay"] = 0.0
        for _ in range(4):
            one.step()
    for entry in theirs.entries:
        entry.write()
    torch.testing.assert_close(mine.module["layer"].weight, peers.module["layer"].weight.detach(), rtol=0, atol=1e-7)


def test_peft_gets_our_rank_at_every_site():
    case = Case("pico", pico, ("all",), 8)
    ours, theirs = case.trainee("lora", pico()), case.trainee("peft-lora", pico())
    assert isinstance(theirs, PeftLora)
    assert sorted(p.shape for p in ours.parameters) == sorted(p.shape for p in theirs.parameters)


def test_a_half_precision_base_takes_half_the_memory_and_trains_in_fp32():
    def half():
        return training(bare_base(StableDiffusion, PICO, torch.bfloat16), 1, autocast=True)

    for name in ("lora", "peft-lora", "sara"):
        made = []
        measured(name, half, made=made)
        assert {p.dtype for p in made[0].parameters} == {torch.float32}, name
    assert {p.dtype for p in half().module.parameters()} == {torch.bfloat16}


def test_sdxl_is_fed_its_sizes_and_pooled_text():
    config = {
        **PICO,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 48,
    }
    workload = training(bare_base(StableDiffusionXL, config), 1)
    Ours(equal_method("lora", ("attention",), 2, 0.1), workload).step()
    assert any(tensor.shape == (1, 24) for tensor in workload.batch)


# -- time ----------------------------------------------------------------------------------------------------------


def test_everybody_has_as_many_turns_and_nobody_always_the_first():
    turns = []
    seconds = take_turns({name: lambda name=name: turns.append(name) for name in "abc"}, 3)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert {turns[i] for i in range(0, len(turns), 3)} == {"a", "b", "c"}
    assert [sorted(turns[i : i + 3]) for i in range(0, len(turns), 3)] == [["a", "b", "c"]] * 5


def test_ratios_are_taken_within_rounds():
    """The machine is twice as slow in the last round: ratios do not see it."""
    found = ratio({"a": [1.0, 1.1, 4.0], "b": [2.0, 2.2, 8.0]}, "a", "b")
    assert (found.low, found.median, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_speed_table_has_a_row_for_every_method_and_peer():
    rows = speed_rows(Case("layer", layer, ("all",), 2, cases.EVERYWHERE), rounds=1)
    assert {row.name for row in rows} == {*KIND_NAMES, *cases.PEERS}
    assert all("lora" in row.ratios for row in rows if row.name != "lora")


def test_a_method_that_does_not_fit_says_why_in_its_row():
    odd = 3 * 257  # has no three small factors
    rows = speed_rows(Case("odd", lambda: layer(odd), ("all",), 2), rounds=1)
    refused = [row for row in rows if row.note]
    assert [row.name for row in refused] == ["tlora"]
    assert "771" in refused[0].note


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_what_is_timed_as_a_merge_equals_the_attached_layer(kind):
    from studio.attachment import attach
    from studio.bench.trainee import fresh_patches

    torch.manual_seed(0)
    sites = find_sites({"unet": nn.ModuleDict({"layer": nn.Linear(24, 16, bias=False)}).requires_grad_(False)})
    (site,) = sites.values()
    patches = fresh_patches(equal_method(kind, ("all",), 4, 0.25), sites)
    merge._as_after_training(patches.values())
    x, whole = torch.randn(5, 24), merge.merged(*patches.values(), site.module.weight)
    assert not torch.equal(whole, site.module.weight)
    with attach(sites, {name: [patch] for name, patch in patches.items()}), torch.no_grad():
        torch.testing.assert_close(site.module(x), x @ whole.T, rtol=1e-4, atol=1e-5)


def test_the_merge_table_has_a_row_for_every_method(monkeypatch):
    small = {"pico": lambda: nn.ModuleDict({"layer": nn.Linear(32, 32)}).requires_grad_(False)}
    monkeypatch.setattr(merge, "CASES", small)
    rows = merge.measure(rounds=2)
    assert [row.name for row in rows] == KIND_NAMES
    assert all({"attach and detach", "merge"} == set(row.ratios) for row in rows)


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_bar_is_held_against_every_case_that_it_names():
    rows = [Row(f"case {n}", "lora", 1, {}, {"peft-lora": Ratio(r, r, r)}) for n, r in enumerate((1.004, 1.02))]
    verdicts = judge([Bar("case*", "lora", "peft-lora", 1.00, "peak")], [*rows, Row("other", "lora")])
    assert [verdict["met"] for verdict in verdicts] == [True, False]
    text = markdown(rows, verdicts)
    assert "| case 1 | lora | 1 | 1.020 |" in text
    assert "| NO |" in text


def test_the_command_prints_one_document_and_saves_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "MEMORY", (Case("pico", layer, ("all",), 2, who=("lora",)),))
    assert cli(["bench", "memory", "--json", "--out", str(tmp_path / "bench.md")]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["peft-lora", "lora"]
    assert result["machine"] == machine()
    assert "| pico | lora |" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize("arguments", [["bench", "memry"], ["bench", "speed", "--case", "nothing-like-it"]])
def test_an_unknown_part_or_case_is_refused_with_what_there_is(arguments, capsys):
    assert cli(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]


@pytest.mark.gpu
def test_on_a_gpu_every_backend_has_rows():
    from studio.bench import gpu

    case = Case("pico", pico, ("attention",), 2, who=("lora", "sara"))
    expected = [(f"pico, {b} on the GPU", name) for b in gpu.attention_backends() for name in case.names]
    for rows in (list(gpu.peak_rows([case])), list(gpu.time_rows([case], rounds=2))):
        assert [(row.case, row.name) for row in rows] == expected
        assert not [row.note for row in rows if row.note]


def test_the_clip_network_is_measured_beside_one_of_the_same_widths():
    from studio.bench import video

    small = {**video.CONFIG, "block_out_channels": (16, 32, 32), "norm_num_groups": 8}
    own, stock = video.ours(small), video.theirs(small)
    assert own.image.config.block_out_channels == stock.config.block_out_channels
    assert (own.image.config.in_channels, own.image.config.out_channels) == (stock.config.in_channels, 16)
    for network in (own, stock):
        seen = []
        network.register_forward_hook(lambda m, i, o: seen.append(o.sample.shape))  # noqa: B023
        video.step(network, 3, 3, clips=2)()
        assert seen == [(2, 16, 3, 8, 8)]
    # Weights, their gradients, and what the backward pass needs.
    weights = sum(4 * parameter.numel() for parameter in own.parameters())
    assert (
        2 * weights
        < video.peak_bytes(lambda: video.ours(small), clips=2)
        < video.peak_bytes(lambda: video.ours(small), clips=4)
    )
    names = {bar.case for bar in video.BARS}
    assert names == {"8 frames", "peak memory", *(f"{n} frames" for n in video.LENGTHS)}
