"""The interference report: every figure equals its dense definition, and the words follow the figures."""

import json
import math
import re

import pytest
import torch
from test_merging import moment, trained, with_sketches
from test_methods import tiny_adapter

from studio.adapter import load_adapter
from studio.bases.sdxl import StableDiffusionXL
from studio.deltas import LowRank, Overlaps
from studio.errors import RequestError
from studio.importing.opening import open_sources
from studio.inputs import Sketch, sketch
from studio.interference import survey
from studio.interference.activation import energies, weight_energy
from studio.interference.clusters import dendrogram
from studio.interference.command import interference
from studio.interference.findings import size_outliers
from studio.interference.page import page
from studio.interference.report import group_of


@pytest.fixture
def pair(tmp_path):
    one = trained(tmp_path / "one.safetensors", 1, targets=("attention",), alpha=7.0)
    other = trained(tmp_path / "other.safetensors", 2, targets=("attention", "conv"), rank=5)
    return [with_sketches(path, 100 * number) for number, path in enumerate((one, other))]


def opened(paths):
    return open_sources([str(path) for path in paths], lambda name: None)


def matrix(adapter, site):
    terms = adapter.patches[site].values()
    return sum(patch.delta(torch.zeros(adapter.card.sites[site].weight)).double() for patch in terms).flatten(1)


def test_overlaps_of_different_ranks_equal_the_dense_ones_and_angles_those_of_orthonormal_bases():
    generator = torch.Generator().manual_seed(0)
    deltas = [
        LowRank(torch.randn(r, 20, generator=generator), torch.randn(12, r, generator=generator), (12, 20))
        for r in (2, 5, 3)
    ]
    found, dense = Overlaps(deltas), [delta.matrix().double() for delta in deltas]
    for i, a in enumerate(dense):
        for j, b in enumerate(dense):
            scale = a.norm() * b.norm()
            torch.testing.assert_close(found.cosine[i, j], (a * b).sum() / scale, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.input_overlap[i, j], (a @ b.T).norm() / scale, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.output_overlap[i, j], (a.T @ b).norm() / scale, rtol=1e-5, atol=1e-6)
            p, q = (torch.linalg.qr(deltas[k].down.double().T)[0] for k in (i, j))
            wanted = torch.linalg.svdvals(p.T @ q).clamp(max=1).acos()
            angles = found.principal_angles(i, j)
            assert len(angles) == min(deltas[i].rank, deltas[j].rank)
            torch.testing.assert_close(angles, wanted, rtol=1e-3, atol=2e-3)
            if i != j:
                torch.testing.assert_close(found.smallest_angle[i, j], wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("places", [1, 4])
def test_the_energy_of_a_change_on_sketched_inputs_is_the_trace_it_stands_for(places):
    generator = torch.Generator().manual_seed(1)
    deltas = [
        LowRank(
            torch.randn(r, 10 * places, generator=generator), torch.randn(6, r, generator=generator), (6, 10, places)
        )
        for r in (2, 3)
    ]
    sketches = [sketch(moment(seed, 10), 4) for seed in (0, 1, 2)]
    found = energies(deltas, sketches)
    for s, one in enumerate(sketches):
        whole = torch.kron(one.matrix().double(), torch.eye(places, dtype=torch.float64))
        for d, delta in enumerate(deltas):
            dense = delta.matrix().double()
            torch.testing.assert_close(found[s, d], torch.trace(dense @ whole @ dense.T), rtol=1e-5, atol=1e-8)
        weight = torch.randn(6, 10, places, generator=generator)
        wanted = torch.trace(weight.flatten(1).double() @ whole @ weight.flatten(1).double().T)
        assert math.isclose(weight_energy(weight, one), float(wanted), rel_tol=1e-5)


def test_the_report_over_all_layers_equals_the_dense_definitions(pair):
    report, adapters = survey(opened(pair)), [load_adapter(path) for path in pair]
    sites = [set(adapter.card.sites) for adapter in adapters]
    assert {layer.site for layer in report.layers} == sites[0] | sites[1]
    both = sorted(sites[0] & sites[1])
    inner = sum(float((matrix(adapters[0], s) * matrix(adapters[1], s)).sum()) for s in both)
    norms = [sum(float(matrix(a, s).square().sum()) for s in own) ** 0.5 for a, own in zip(adapters, sites)]
    assert math.isclose(float(report.total.cosine[0, 1]), inner / norms[0] / norms[1], rel_tol=1e-4)
    assert [round(n, 4) for n in norms] == [round(a["norm"], 4) for a in report.adapters]
    crossed = sum(float((matrix(adapters[0], s) @ matrix(adapters[1], s).T).norm()) for s in both)
    scale = sum(float(matrix(adapters[0], s).norm() * matrix(adapters[1], s).norm()) for s in both)
    assert math.isclose(float(report.total.input_overlap[0, 1]), crossed / scale, rel_tol=1e-4)
    sources, on_own, on_other = opened(pair), 0.0, 0.0
    for site in sites[0]:
        c = sources[0].sketch(site).matrix().double()
        on_own += float(torch.trace(matrix(adapters[0], site) @ c @ matrix(adapters[0], site).T))
        on_other += float(torch.trace(matrix(adapters[1], site) @ c @ matrix(adapters[1], site).T))
    assert math.isclose(float(report.total.crosstalk[0, 1]), (on_other / on_own) ** 0.5, rel_tol=1e-4)
    assert float(report.total.crosstalk[0, 0]) == 1.0


def test_groups_add_up_to_everything(pair):
    report = survey(opened(pair))
    assert sum(figures.layers for figures in report.groups.values()) == report.total.layers == len(report.layers)
    for name in ("inner", "acts", "products"):
        whole = sum(getattr(figures, name) for figures in report.groups.values())
        torch.testing.assert_close(whole, getattr(report.total, name))
    assert group_of("unet.down_blocks.1.attentions.0.to_q") == "unet.down_blocks.1"
    assert group_of("unet.mid_block.attentions.0.to_q") == "unet.mid_block"
    assert group_of("text_encoder_2.text_model.encoder.layers.3.mlp.fc1") == "text_encoder_2"


def test_what_layers_see_decides_over_a_sum_and_directions_only_where_that_is_unknown(tmp_path):
    slots = [
        trained(tmp_path / f"s{slot}.safetensors", slot, "orthogonal", ("attention",), basis="slots", slot=slot)
        for slot in (0, 1)
    ]
    for path in slots:
        file = load_adapter(path)
        for terms in file.patches.values():  # `trained` fills all numbers; a training leaves the columns alone
            assert terms["main"].down.abs().sum() > 0
    apart = survey(opened(slots))
    assert apart.total.worst(apart.total.input_overlap)[0] < 1e-6
    assert "read different input directions" in apart.verdict[0]
    assert math.isclose(apart.row("all", apart.total)["smallest_angle_degrees"], 90, abs_tol=0.1)
    for number, path in enumerate(slots):
        with_sketches(path, 100 * number)
    assert "by gram" in survey(opened(slots)).verdict[0]  # inputs have a part in both directions
    free = [trained(tmp_path / f"f{seed}.safetensors", seed, targets=("attention",)) for seed in (1, 2)]
    assert "--calibrate" in survey(opened(free)).verdict[1]
    for number, path in enumerate(free):
        with_sketches(path, 100 * number)
    assert "by gram" in survey(opened(free)).verdict[0]


def test_the_drift_of_the_base_is_measured_against_its_own_outputs(tmp_path, tiny_base_folder):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from studio.bases.registry import load_base

    base = load_base(str(tiny_base_folder))
    paths = [trained(tmp_path / f"{n}.safetensors", n, targets=("attention",), base=base) for n in (1, 2)]
    for path in paths:
        with_sketches(path, 7)
        with safe_open(path, "pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        tensors |= {k.replace(".sketch.", ".base_sketch."): v.clone() for k, v in tensors.items() if ".sketch." in k}
        save_file(tensors, path, header)
    report, own, source = survey(opened(paths), base), load_adapter(paths[0]), opened(paths)[0]
    change = output = 0.0
    for site in own.card.sites:
        c = source.sketch(site, "base_sketch").matrix().double()
        weight = base.sites()[site].module.weight.detach().double()
        change += float(torch.trace(matrix(own, site) @ c @ matrix(own, site).T))
        output += float(torch.trace(weight @ c @ weight.T))
    assert math.isclose(float(report.total.base_drift[0]), (change / output) ** 0.5, rel_tol=1e-4)
    assert survey(opened(paths)).total.base_drift is None
    assert math.isclose(float(report.total.generic_share[0]), 1.0, rel_tol=1e-6)  # the same sketch stands for both


def test_clashes_mismatches_and_outliers_are_told(tmp_path):
    paths = [trained(tmp_path / f"{n}.safetensors", n, targets=("attention",)) for n in (1, 2, 3)]
    for path, word in zip(paths, ("blip", "blip", "blipzorp"), strict=True):
        adapter = load_adapter(path)
        adapter.card.trigger = word
        if path == paths[2]:
            adapter.card.base = adapter.card.base.model_copy(update={"architecture": "x", "name": "another"})
        adapter.save(path)
    told = " ".join(survey(opened(paths)).findings)
    assert "'1' and '2' have the same trigger word, 'blip'" in told
    assert "one holds the other" in told
    assert "built otherwise" in told
    norms = torch.ones(12, 3)
    norms[4, 1], norms[:, 2] = 20.0, 9.0
    told = size_outliers(["a", "b", "c"], [f"unet.layer{n}" for n in range(12)], norms)
    assert any("'b' changes 1 layers" in line and "unet.layer4" in line for line in told)
    assert not any("'a'" in line for line in told)


def test_an_adapter_of_another_architecture_shares_no_layers(tmp_path):
    one = trained(tmp_path / "one.safetensors", 1, targets=("attention",))
    other = trained(tmp_path / "other.safetensors", 2, targets=("conv",))
    assert "no layer in common" in survey(opened([one, other])).verdict[0]
    assert StableDiffusionXL.tiny().identity().architecture != load_adapter(one).card.base.architecture


def test_sparse_changes_are_compared_too(tmp_path):
    one = trained(tmp_path / "one.safetensors", 1, targets=("attention",))
    _, _, sparse = tiny_adapter("sara")
    generator = torch.Generator().manual_seed(1)
    for parameter in sparse.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    sparse.save(tmp_path / "sara.safetensors")
    report, own = survey(opened([one, tmp_path / "sara.safetensors"])), load_adapter(one)
    both = [layer for layer in report.layers if len(layer.who) == 2]
    layer = next(layer for layer in both if float(layer.figures.norms.min()) > 0)
    a, b = matrix(own, layer.site), matrix(sparse, layer.site)
    wanted = float((a @ b.T).norm() / a.norm() / b.norm())
    assert math.isclose(float(layer.figures.input_overlap[0, 1]), wanted, rel_tol=1e-4)


def test_a_tree_joins_the_nearest_first():
    distance = torch.tensor([[0, 0.1, 0.9, 0.8], [0.1, 0, 0.9, 0.8], [0.9, 0.9, 0, 0.3], [0.8, 0.8, 0.3, 0]])
    root = dendrogram(distance.double())
    assert sorted(map(sorted, (part.leaves for part in root.parts))) == [[0, 1], [2, 3]]
    assert math.isclose(root.height, 0.85, rel_tol=1e-6)
    assert sorted(round(part.height, 6) for part in root.parts) == [0.1, 0.3]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(pair, tmp_path):
    paths = [trained(tmp_path / f"<b>{n}.safetensors", n, targets=("attention",)) for n in range(5)]
    text = page(survey(opened(paths)))
    assert "<b>0" not in text
    assert "&lt;b&gt;0" in text
    assert not re.search(r"<script|https?://|src=|@import|url\(", text)
    assert text.count("<svg") == text.count("</svg>") >= 5  # three measures, the tree, the layers
    assert "crosstalk: pictures" not in text
    assert "crosstalk: pictures" in page(survey(opened(pair)))


def command(capsys, *words):
    from studio.cli import run as cli

    code = cli(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_a_table_json_and_writes_a_page(pair, tmp_path, capsys):
    code, text, _ = command(capsys, *pair, "--html", tmp_path / "r.html")
    assert code == 0
    assert "everything" in text
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    code, text, _ = command(capsys, *pair, "--json")
    facts = json.loads(text)
    assert facts["adapters"][0]["name"] == "one"
    assert facts["total"]["input_overlap"][0][1] == facts["total"]["input_overlap"][1][0] > 0
    assert len(facts["layers"]) == facts["groups"][0]["layers"] + sum(g["layers"] for g in facts["groups"][1:])
    code, text, _ = command(capsys, pair[0], "--json")
    assert json.loads(text)[0]["method"] == "lora"


def test_the_command_refuses_in_one_line(pair, tmp_path, capsys):
    (tmp_path / "taken.html").write_text("mine")
    for words, message in (
        ([pair[0], "--html", tmp_path / "x.html"], "two adapters or more"),
        ([pair[0], pair[0]], "named twice"),
        ([*pair, "--html", tmp_path / "x.txt"], "no HTML file"),
        ([*pair, "--html", tmp_path / "taken.html"], "exists already"),
        ([pair[0], "nowhere"], "there is no adapter 'nowhere'"),
    ):
        code, text, error = command(capsys, *words)
        assert (code, text) == (2, ""), words
        assert error.startswith("error: ")
        assert message in error
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_inputs_recorded_anew_serve_where_files_tell_nothing(tmp_path, tiny_base_folder):
    from studio.bases.registry import load_base

    base = load_base(str(tiny_base_folder))
    targets = ("*.mid_block.*.attn2.to_q", "*.mid_block.*.attn2.to_k")
    paths = [trained(tmp_path / f"{n}.safetensors", n, targets=targets, base=base) for n in (1, 2)]
    report = interference([str(p) for p in paths], base=str(tiny_base_folder), calibrate=True)
    assert report.total.crosstalk is not None
    assert report.total.base_drift is not None
    with pytest.raises(RequestError, match="two adapters"):
        from studio.commands.inspect import inspect

        inspect([str(paths[0])], calibrate=True)
    assert isinstance(sketch(moment(0), 3), Sketch)
