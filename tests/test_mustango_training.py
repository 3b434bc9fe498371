"""Adapters on Mustango: the contract of methods, and recordings to adapter to sound, end to end on a pico base."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from trainings import run_and_find_the_base_unchanged

from studio.adapter import Card, load_adapter, new_adapter
from studio.attachment import attach
from studio.base import Request
from studio.bases.musicgen import MusicGen
from studio.bases.mustango import Mustango
from studio.bases.mustango.encoders import chord_ids
from studio.bases.mustango.family import without
from studio.bases.registry import load_base
from studio.cli import run as studio
from studio.data.sounds import facts_in, read_sound
from studio.errors import DataError, PresetError
from studio.method import PatchMethod, method_from, methods
from studio.music.denoising import scores_of
from studio.music.inserted import MusicMethod
from studio.music.score import Score
from studio.music.score_sheet import ScoreSheet
from studio.training import Order, plan, plan_resume

MUSIC = [kind for kind, cls in methods().items() if issubclass(cls, MusicMethod)]
WEIGHTS = [
    kind for kind, cls in methods().items() if issubclass(cls, PatchMethod) and cls.trainable and cls.has_weight_form
]
PLACES = ["text_states", "after_layer", "after_block"]
PROMPTS = ("a cat | beats: 120 bpm", "a dog | chords: Am F")
RATE = 1600
BUSY = ("batch_size=2", "data.caption_dropout=0.3", "data.validation=1", "min_snr_gamma=5", "method.dropout=0.2")


@pytest.fixture(scope="module")
def base():
    return Mustango.tiny()


def adapter_on(base, kind, seed=3, **settings):
    method = method_from({"kind": kind, **settings})
    sites = method.sites(base)
    card = Card(
        method=method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: site.shape for name, site in sites.items()},
        concept="c",
        seed=seed,
    )
    return sites, new_adapter(card, {name: site.module for name, site in sites.items()})


def shaken(adapter, std=0.3):
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return adapter


def some_latents(seed=0, steps=16):
    return torch.randn(2, 2, steps, 4, generator=torch.Generator().manual_seed(seed))


def heard(base, noisy=None):
    noisy = some_latents() if noisy is None else noisy
    return base.predict(noisy, torch.full((2,), 500), base.encode_prompts(PROMPTS))


# -- inserted modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MUSIC)
def test_a_fresh_adapter_changes_nothing_then_acts_and_detach_restores(base, kind, place, tmp_path):
    sites, adapter = adapter_on(base, kind, bottleneck=4, placement=place)
    assert len(sites) == {"text_states": 1, "after_layer": 4, "after_block": 3}[place]
    with torch.no_grad():
        bare = heard(base)
        with attach(sites, adapter.by_site()) as attachment:
            assert torch.equal(heard(base), bare)
            assert attachment.silent_sites({}) == []
        with attach(sites, shaken(adapter).by_site()) as attachment:
            acting = heard(base)
            attachment.weight = 0.0
            assert torch.equal(heard(base), bare)
        assert not torch.allclose(acting, bare, atol=1e-4)
        assert torch.equal(heard(base), bare)
        adapter.save(tmp_path / "one")
        loaded = load_adapter(tmp_path / "one")
        with attach(loaded.method.sites(base), loaded.by_site()):
            assert torch.equal(heard(base), acting)


@pytest.mark.parametrize("kind", MUSIC)
def test_size_counts_what_a_planar_patch_has_and_gradient_reaches_all_of_it(base, kind):
    sites, adapter = adapter_on(base, kind, bottleneck=5)
    for name, site in sites.items():
        patch = adapter.patches[name]["main"]
        assert site.shape.kind == "plane"
        assert sum(p.numel() for p in patch.parameters()) == adapter.method.size(site.shape.weight[0], 5, True)
    optimizer = torch.optim.SGD(adapter.parameters(), 1.0)
    with attach(sites, adapter.by_site(), train=True):
        for _ in range(2):
            optimizer.zero_grad()
            (heard(base) - 1).square().mean().backward()
            optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in base.denoiser.parameters())


@pytest.mark.parametrize("kind", ["music-convolution", "music-transformer"])
def test_a_spectrogram_is_heard_in_both_directions_and_in_pitch(base, kind):
    sites, adapter = adapter_on(base, kind, bottleneck=4)
    patch = next(iter(shaken(adapter).patches.values()))["main"]
    plane = torch.randn(1, patch.shape.weight[0], 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = patch.output_term(plane, plane, None)
        for time, band in ((5, 0), (0, 3)):  # later, higher
            changed = plane.clone()
            changed[:, :, time, band] += 1
            assert not torch.allclose(patch.output_term(changed, changed, None)[:, :, 0, 0], added[:, :, 0, 0])


def test_places_are_those_of_the_base(base):
    with pytest.raises(PresetError) as refusal:
        method_from({"kind": "music-linear", "placement": "after_ffn"}).sites(base)
    assert "after_block" in refusal.value.hint
    with pytest.raises(PresetError) as refusal:
        method_from({"kind": "music-linear", "placement": "after_block"}).sites(MusicGen.tiny())
    assert "after_ffn" in refusal.value.hint


# -- methods of weights ------------------------------------------------------------------------------------------------


def on_mustango():
    """A base, layers of it, what it makes of some prompts, and a loss."""
    base, noisy, target = Mustango.tiny(), some_latents(4), some_latents(5)
    layers = ["attention", "scores", "conv"]
    return base, layers, lambda: heard(base), lambda: (heard(base, noisy) - target).square().mean()


def on_musicgen():
    base, codes = MusicGen.tiny(), torch.randint(0, 32, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    losses = lambda: base.losses(codes, base.encode_prompts(("a cat", "a dog")))  # noqa: E731
    return base, ["linear", "text-encoder"], losses, lambda: losses().mean()


@pytest.mark.parametrize("made", [on_mustango, on_musicgen])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_methods_of_weights_learn_on_bases_of_music_and_merge_to_what_they_are(kind, made):
    base, layers, said, loss_of = made()
    rank = {"rank": 2} if "rank" in methods()[kind].model_fields else {}
    sites, adapter = adapter_on(base, kind, target_modules=layers, **rank)
    with torch.no_grad():
        bare = said()
    optimizer, losses = torch.optim.Adam(adapter.parameters(), 1e-2), []
    with attach(sites, adapter.by_site(), train=True) as attachment:
        with torch.no_grad():
            assert torch.equal(said(), bare)
        for _ in range(6):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            attachment.refresh()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            learned = said()
    with torch.no_grad():
        assert torch.equal(said(), bare)
        for name, site in sites.items():
            patch = adapter.patches[name]["main"]
            delta, shift = patch.delta(site.module.weight), patch.bias_delta()
            site.module.weight += delta.to(site.module.weight)
            if shift is not None:
                site.module.bias += shift
        torch.testing.assert_close(said(), learned, rtol=1e-3, atol=1e-4)


def test_a_lora_leaves_as_a_folder_that_peft_reads(base, tmp_path, monkeypatch):
    from studio.exporting import export_adapter

    # The process that reads it back needs our class of network, so the studio is on its path, as where it is installed.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    _, adapter = adapter_on(base, "lora", rank=2, target_modules=["attention"])
    report = export_adapter(shaken(adapter), base, "peft", tmp_path / "lora")
    assert report.to_dict()["status"] == "exact"
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


# -- recordings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder_of_mustango(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-mustango"
    Mustango.tiny().pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def recordings(tmp_path):
    """Three tones; one tells beats and chords in its caption, one in the metadata file."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name, pitch, seconds in (("low", 110, 0.6), ("mid", 165, 0.6), ("high", 220, 1.3)):
        time = np.arange(round(seconds * RATE)) / RATE
        soundfile.write(folder / f"{name}.wav", (0.5 * np.sin(2 * math.pi * pitch * time)).astype("float32"), RATE)
    (folder / "low.txt").write_text("a low {trigger} | beats: 240 bpm 3/4 | chords: Am")
    rows = [
        {
            "file_name": "mid.wav",
            "text": "a {trigger}",
            "beats": [[0.1, 0.4], [1, 2]],
            "chords": ["Am"],
            "chords_time": [0],
        },
        {"file_name": "high.wav", "text": "a high {trigger}", "chords": ["C", "G7"], "chords_time": [0, 0.7]},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def recipe(tmp_path, recordings, folder_of_mustango):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"description: test\nbase: {folder_of_mustango}\nmethod: {{kind: music-convolution, bottleneck: 4}}\n"
        f"data: {{path: {recordings}, seconds: 0.6}}\nsteps: 4\nsample_prompts: ['a {{trigger}} | chords: Am']\n"
        "sample_seconds: 0.1\nsample_steps: 2\nsample_every: 2\ncheckpoint_every: 2\nvalidate_every: 2\n"
    )
    return str(path)


def train(recipe, folder, *settings, stop_after=None):
    return collect(plan(Order(recipe, run=folder, name="tune", settings=settings)), stop_after)


def collect(training, stop_after=None):
    events = []
    done = lambda: stop_after is not None and bool(events) and events[-1].step >= stop_after  # noqa: E731
    for event in training.events(done):
        events.append(event)
    return events


def test_a_resumed_training_equals_one_that_went_through(recipe, tmp_path):
    through = train(recipe, tmp_path / "through", *BUSY)
    train(recipe, tmp_path / "broken", *BUSY, stop_after=2)
    resumed = collect(plan_resume(tmp_path / "broken"))
    assert "resumed" in [event.kind for event in resumed]
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("through", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [e.data["loss"] for e in through if e.kind == "validation"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_a_training_leaves_every_value_of_the_base_as_it_was(recipe, tmp_path):
    run_and_find_the_base_unchanged(plan(Order(recipe, run=tmp_path / "run", name="tune", settings=BUSY)))


def test_train_and_generate_at_the_command_line(recipe, folder_of_mustango, tmp_path, capsys):
    request = ["train", "--preset", recipe, "--set", "learning_rate=0.05", "--name", "tune", "--json"]
    assert studio([*request, "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    samples = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in samples] == ["000000-0.wav", "000002-0.wav", "000004-0.wav"]
    bare = load_base(folder_of_mustango).generate(Request(["a tune | chords: Am"], [0], steps=2, seconds=0.1))[0]
    assert torch.allclose(read_sound(samples[0]).wave, bare.wave, atol=2**-14)
    assert not torch.equal(read_sound(samples[2]).wave, read_sound(samples[0]).wave)
    out = tmp_path / "a.wav"
    request = ["generate", "a tune | beats: 120 bpm", "--base", str(folder_of_mustango), "--adapter", "tune:0.5"]
    asked = ["--steps", "2", "--seconds", "0.2", "--negative", "noise"]
    assert studio([*request, *asked, "--out", str(out), "--json"]) == 0
    capsys.readouterr()
    assert soundfile.info(out).frames == round(0.2 * RATE)
    told = facts_in(out)
    assert told["adapters"][0]["weight"] == 0.5
    assert {name: told[name] for name in ("steps", "negative", "seconds", "seed")} == {
        "steps": 2,
        "negative": "noise",
        "seconds": 0.2,
        "seed": 0,
    }
    wrong = ["generate", "a tune | chords: Zm", "--base", str(folder_of_mustango), "--out", str(tmp_path / "b.wav")]
    assert studio(wrong) == 2
    assert "'Zm' is no chord" in capsys.readouterr().err


def test_beats_and_chords_come_from_captions_and_metadata(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", name="tune"))
    scores = scores_of(training.base, training.preset, training.pictures)
    assert {(piece.name, piece.start_seconds): score for piece, score in scores.items()} == {
        ("low.wav", 0.0): Score("a low tune", ((0.0, 1), (0.25, 2), (0.5, 3)), (("Am", 0.0),)),
        ("mid.wav", 0.0): Score("a tune", ((0.1, 1), (0.4, 2)), (("Am", 0.0),)),
        ("high.wav", 0.0): Score("a high tune", None, (("C", 0.0),)),
        ("high.wav", 0.6): Score("a high tune", None, (("C", 0.0), ("G7", 0.1))),  # what still sounds, then the next
    }


def test_a_step_tells_the_network_the_scores_of_its_pieces(recipe, tmp_path):
    training = plan(Order(recipe, run=tmp_path / "run", name="tune", settings=("steps=1", "sample_every=0")))
    told = []
    for encoder in (training.base.modules["beat_encoder"], training.base.modules["chord_encoder"]):
        encoder.register_forward_pre_hook(lambda _, args: told.append(args[0][0]))
    collect(training)
    assert len(told) == 2
    assert any(torch.equal(told[1][:1], torch.tensor([chord_ids(name)])) for name in ("Am", "C"))


def test_dropping_leaves_parts_out():
    score = Score("a", ((0.0, 1),), (("Am", 0.0),))
    assert without(score, "text", "chords") == Score("", ((0.0, 1),), ())
    assert without(score) == score


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"beats": [1, 2]}, "no beats"),
        ({"beats": [[0.1], [1, 2]]}, "no beats"),
        ({"chords": ["Am"]}, "has a time"),
        ({"chords": ["H"], "chords_time": [0]}, "no chord"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_by_name(recordings, row, fault):
    (recordings / "metadata.jsonl").write_text(json.dumps({"file_name": "mid.wav", "text": "a", **row}))
    with pytest.raises(DataError, match=fault) as refusal:
        ScoreSheet(recordings)
    assert "mid.wav" in refusal.value.message


def test_a_table_tells_beats_and_chords_as_well(recordings):
    cells = '"a","[[0.1],[2]]","[""Am""]","[0.0]"'
    (recordings / "metadata.jsonl").unlink()
    (recordings / "metadata.csv").write_text(f"file_name,text,beats,chords,chords_time\nmid.wav,{cells}\n")
    found = ScoreSheet(recordings).completed(recordings / "mid.wav", Score("a"))
    assert found == Score("a", ((0.1, 2),), (("Am", 0.0),))
    assert ScoreSheet(recordings).completed(recordings / "low.wav", Score("a")) == Score("a")


def test_what_cannot_be_trained_is_refused(recipe, recordings, tmp_path):
    for setting in ("learned_words=1", "dco_beta=10", "data.flip=true"):
        with pytest.raises(PresetError, match="makes music"):
            plan(Order(recipe, run=tmp_path / "run", settings=(setting,)))
    with pytest.raises(PresetError, match=r"data\.seconds"):
        plan(Order(recipe, run=tmp_path / "run", settings=("data.seconds=2",)))
    (recordings / "low.txt").write_text("a low tune | chords: H")
    with pytest.raises(DataError, match=r"low\.wav.*'H' is no chord"):
        plan(Order(recipe, run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
