"""Sketches of inputs travel in the adapter, and merging by them needs neither base nor data."""

import time

import pytest
import torch
from test_training import collect, recipe  # noqa: F401

from studio.adapter import load_adapter
from studio.attachment import attach
from studio.bases.registry import load_base
from studio.importing.opening import open_sources
from studio.inputs import _leading, record_inputs, sketch
from studio.merging import Merger, make_plan, make_recipe
from studio.training import Order, plan

QUICK = ("steps=12", "learning_rate=2e-2", "batch_size=2", "method.rank=4", "checkpoint_every=99")


def taught(recipe, folder, name, *settings):  # noqa: F811
    collect(plan(Order(recipe, run=folder / name, name=name, settings=(*QUICK, *settings))))
    return folder / name / "adapter.safetensors"


@pytest.fixture(scope="module")
def concepts(tmp_path_factory, tiny_base_folder):
    """Two concepts that learned different pictures of one base, with sketches wide enough to be the whole matrix."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("concepts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDIO_HOME", str(folder / "home"))
        paths = []
        for name, colour in (("blip", "red"), ("zorp", "blue")):
            data = folder / f"{name}-pictures"
            data.mkdir()
            for number in range(2):
                image = Image.new("RGB", (64, 64), "white" if name == "blip" else "black")
                ImageDraw.Draw(image).ellipse([10 + number, 10, 40, 50 - number], fill=colour)
                image.save(data / f"{number}.png")
            preset = folder / f"{name}.yaml"
            preset.write_text(
                f"description: test\nbase: {tiny_base_folder}\nmethod: {{kind: lora, rank: 2}}\n"
                f"data: {{path: {data}, caption: 'a {{trigger}}'}}\nsketches: 512\n"
            )
            paths.append(taught(str(preset), folder, name))
    return paths


def opened(paths):
    return open_sources([str(path) for path in paths], lambda name: None)


def merged(paths, **settings):
    return Merger(make_plan(make_recipe({"adapters": [str(p) for p in paths], **settings}))).adapter()


def change(adapter, site):
    """The change of a weight as a matrix in fp64, zero where there is none."""
    weight = torch.zeros(adapter.card.sites[site].weight)
    return sum(patch.delta(weight).double() for patch in adapter.patches[site].values()).flatten(1)


def losses(adapter, paths, inputs):
    """For each concept: how far the adapter's effect on its own inputs is from the concept's own, over that effect."""
    found = []
    for path, grams in zip(paths, inputs, strict=True):
        own, wrong, whole = load_adapter(path), 0.0, 0.0
        for site in own.card.sites:
            c, wanted = grams[site].double(), change(own, site)
            error = change(adapter, site) - wanted
            wrong += float(torch.trace(error @ c @ error.T))
            whole += float(torch.trace(wanted @ c @ wanted.T))
        found.append((wrong / whole) ** 0.5)
    return found


def test_a_training_leaves_sketches_of_the_concepts_and_the_bases_inputs(concepts):
    sources = opened(concepts)
    for source in sources:
        assert source.card.shared_inputs.keys() == source.card.sites.keys()
        for site in source.shapes:
            for term in ("sketch", "base_sketch"):
                found = source.sketch(site, term)
                assert found is not None
                assert found.basis.shape[0] == source.shapes[site].weight[1]
    a, b = (source.sketch("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k") for source in sources)
    assert not torch.equal(a.basis, b.basis)  # other words, other inputs
    own = load_adapter(concepts[0])
    holders = {key.rsplit(".", 2)[0] for key in own.sketches}
    assert holders == set(own.card.shared_inputs.values())
    assert len(holders) < len(own.card.sites)  # q, k and v have one


def test_the_same_sketches_come_from_a_recording_by_hand(concepts, tiny_base_folder):
    base, own = load_base(str(tiny_base_folder)), load_adapter(concepts[0])
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with attach(base.sites(), own.by_site()):
        grams = record_inputs(base, {site: base.sites()[site]}, ["a blip", "a blip on the left", "a large blip",
                              "a small blip, on a blue background"], steps=5)  # fmt: skip
    found = opened(concepts)[0].sketch(site)
    assert (found.matrix() - grams[site].matrix).norm() < 2e-3 * grams[site].matrix.norm()


def test_gram_from_the_files_alone_keeps_each_concept_on_its_own_inputs_better_than_the_sum(
    concepts, tiny_base_folder, monkeypatch
):
    """On the sketched inputs by construction; on inputs recorded anew, with other prompts and seeds, by what it is."""
    monkeypatch.setattr("studio.bases.registry.load_base", None)  # nobody asks for the base
    gram, plain = (merged(concepts, strategy=s) for s in ("gram", "sum"))
    monkeypatch.undo()
    sketched = [{site: s.sketch(site).matrix() for site in s.shapes} for s in opened(concepts)]
    base = load_base(str(tiny_base_folder))
    fresh = []
    for path, word in zip(concepts, ("blip", "zorp"), strict=True):
        own = load_adapter(path)
        sites = {name: site for name, site in base.sites().items() if name in own.card.sites}
        with attach(base.sites(), own.by_site()):
            grams = record_inputs(base, sites, [f"a {word}", f"a {word} at the top"], [77, 78], steps=6)
        fresh.append({name: gram.matrix for name, gram in grams.items()})
    for inputs in (sketched, fresh):
        of_gram, of_sum = losses(gram, concepts, inputs), losses(plain, concepts, inputs)
        assert all(g < s for g, s in zip(of_gram, of_sum, strict=True)), (of_gram, of_sum)


def test_auto_takes_gram_where_trained_concepts_overlap(concepts):
    assert make_plan(make_recipe({"adapters": [str(p) for p in concepts]})).choice.strategy == "gram"


def test_calibrate_records_anew_and_comes_near_what_the_files_say(concepts, tmp_path, tiny_base_folder):
    travelled = merged(concepts, strategy="gram")
    calibrated = merged(concepts, strategy="gram", calibrate=True, base=str(tiny_base_folder))
    plain = merged(concepts, strategy="sum")
    far = near = 0.0
    for site in plain.card.sites:
        near += float((change(calibrated, site) - change(travelled, site)).square().sum())
        far += float((change(calibrated, site) - change(plain, site)).square().sum())
    assert 0 < near < 0.5 * far


def test_zero_opts_out_and_the_trained_numbers_stay_the_same(recipe, tmp_path):  # noqa: F811
    with_them = load_adapter(taught(recipe, tmp_path, "one", "data.trigger=blip"))
    without = load_adapter(taught(recipe, tmp_path, "two", "data.trigger=blip", "sketches=0"))
    assert with_them.sketches
    assert not without.sketches
    assert not without.card.shared_inputs
    own, other = with_them.tensors(), without.tensors()
    assert all(torch.equal(own[name], value) for name, value in other.items())


@pytest.mark.parametrize("kind", ["sara", "orthogonal"])
def test_every_kind_of_training_leaves_them_and_the_base_as_it_was(recipe, tmp_path, kind):  # noqa: F811
    training = plan(Order(recipe, run=tmp_path / kind, method=kind, settings=("steps=1",)))
    before = {k: v.clone() for k, v in training.base.denoiser.state_dict().items()}
    events = collect(training)
    assert not [e for e in events if e.kind == "warning" and "sketches" in e.data["text"]]
    assert load_adapter(tmp_path / kind / "adapter.safetensors").sketches
    after = training.base.denoiser.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_wide_sketch_by_subspace_iteration_holds_nearly_all_that_the_best_one_holds():
    generator = torch.Generator().manual_seed(0)
    fall = torch.logspace(0, -1.5, 768)  # slower than inputs do
    rows = torch.randn(2000, 768, generator=generator, dtype=torch.float64) * fall
    matrix = rows.T @ rows / len(rows)
    best = torch.linalg.eigvalsh(matrix).flip(0)[:32].sum()
    began = time.monotonic()
    energies, directions = _leading(matrix, 32)
    assert time.monotonic() - began < 5
    assert (directions.T @ directions - torch.eye(32)).abs().max() < 1e-12
    assert best - energies.sum() < 1e-3 * matrix.trace()
    found = sketch(matrix, 32)
    torch.testing.assert_close(found.matrix().trace().double(), matrix.trace(), rtol=1e-5, atol=0)
