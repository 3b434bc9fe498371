"""Recordings to adapter to sound, end to end on a pico MusicGen: files, resume to the bit, export, refusals."""

import json
import math
import shutil
from shlex import quote

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from trainings import run_and_find_the_base_unchanged

from studio.adapter import Card, load_adapter, new_adapter
from studio.base import Request
from studio.bases.musicgen import MusicGen
from studio.bases.registry import load_base
from studio.cli import run as studio
from studio.data.cache import Cache
from studio.data.recordings import scan_recordings
from studio.data.sounds import LOUDEST, Sound, facts_in, read_sound, save_sound
from studio.errors import DataError, PresetError, RequestError, WorkError
from studio.method import method_from
from studio.preset import Data
from studio.training import Order, adapter_training, plan, plan_resume

RATE = 1600
BUSY = ("batch_size=2", "data.caption_dropout=0.4", "data.validation=1", "learning_rate=1e-2", "lr_schedule=cosine")


@pytest.fixture(scope="session")
def folder_of_musicgen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-musicgen"
    MusicGen.tiny().pipe.save_pretrained(folder)
    return folder


def tone(pitch_hz, seconds, rate_hz=RATE, channels=1):
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.stack([0.5 * np.sin(2 * math.pi * pitch_hz * time)] * channels, 1).astype("float32")


@pytest.fixture
def recordings(tmp_path):
    """Four recordings of unlike formats, rates and lengths; three have captions."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    soundfile.write(folder / "low.wav", tone(110, 0.5), RATE)
    soundfile.write(folder / "high.flac", tone(220, 1.2, 4000, 2), 4000)
    soundfile.write(folder / "mid.ogg", tone(165, 0.5, 8000), 8000)
    soundfile.write(folder / "bare.wav", tone(140, 0.5), RATE)
    for name, caption in (("low", "a low {trigger}"), ("high", "a high {trigger}"), ("mid", "a {trigger}")):
        (folder / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture
def recipe(tmp_path, recordings, folder_of_musicgen):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"description: test\nbase: {folder_of_musicgen}\nmethod: {{kind: music-convolution, bottleneck: 4}}\n"
        f"data: {{path: {recordings}, seconds: 0.5}}\nsteps: 6\nsample_prompts: ['a {{trigger}}']\n"
        "sample_seconds: 0.1\nsample_every: 3\ncheckpoint_every: 3\nvalidate_every: 3\n"
    )
    return str(path)


def train(recipe, folder, *settings, stop_after=None, **order):
    training = plan(Order(recipe, run=folder, name="tune", settings=settings, **order))
    return collect(training, stop_after)


def collect(training, stop_after=None):
    events = []
    done = lambda: stop_after is not None and bool(events) and events[-1].step >= stop_after  # noqa: E731
    for event in training.events(done):
        events.append(event)
    return events


# -- recordings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"), [(8000, 1, "PCM_U8"), (48_000, 6, "PCM_24"), (192_000, 2, "PCM_16")]
)
def test_eight_bits_six_channels_and_very_high_rates_are_read_as_they_sound(rate, channels, subtype, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(110, 0.5, rate, channels), rate, subtype=subtype)
    found = scan_recordings(tmp_path, Data(), {"trigger": "x", "class": ""})
    wave = found.pieces[0].load(RATE, 1)
    assert wave.shape == (1, round(0.5 * RATE))
    assert torch.allclose(wave[0, 50:-50], torch.from_numpy(tone(110, 0.5)[50:-50, 0]), atol=0.02)
    assert found.pieces[0].caption == "x"  # it has none of its own


def test_a_licence_without_commerce_is_shown_and_travels_in_the_card(tmp_path, recordings, recipe, folder_of_musicgen):
    licensed = tmp_path / "licensed"
    shutil.copytree(folder_of_musicgen, licensed)
    (licensed / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    training = plan(Order(recipe, run=tmp_path / "run", base=str(licensed), steps=1))
    assert any("no commercial use" in note for note in training.base.notes)
    assert training.card.base.licence == "cc-by-nc-4.0"


# -- files ----------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".wav", ".flac"])
def test_what_is_written_is_read_back_with_its_making(ending, tmp_path):
    sound = Sound(torch.from_numpy(tone(110, 0.3, channels=2).T.copy()), RATE)
    save_sound(sound, tmp_path / f"a{ending}", {"prompt": "a çello", "seed": 3})
    again = read_sound(tmp_path / f"a{ending}")
    assert again.sample_rate_hz == RATE
    assert torch.allclose(again.wave, sound.wave, atol=2**-15)
    assert facts_in(tmp_path / f"a{ending}") == {"prompt": "a çello", "seed": 3}


def test_a_loud_sound_is_turned_down_and_never_clipped(tmp_path):
    loud = Sound(3 * torch.from_numpy(tone(110, 0.3).T.copy()), RATE)
    save_sound(loud, tmp_path / "a.wav", {})
    again = read_sound(tmp_path / "a.wav").wave
    assert float(again.abs().max()) == pytest.approx(LOUDEST, abs=1e-3)
    assert torch.allclose(again / again.abs().max(), loud.wave / loud.wave.abs().max(), atol=1e-3)
    with pytest.raises(WorkError, match="not finite"):
        save_sound(Sound(torch.full((1, 8), float("nan")), RATE), tmp_path / "b.wav", {})
    with pytest.raises(RequestError, match=r"\.mp4"):
        save_sound(loud, tmp_path / "b.mp4", {})


def test_resampling_keeps_pitch_and_length():
    sound = Sound(torch.from_numpy(tone(100, 1.0, 8000, 2).T.copy()), 8000).at(1600, 1)
    assert sound.wave.shape == (1, 1600)
    assert int(torch.fft.rfft(sound.wave[0]).abs().argmax()) == 100


def test_recordings_are_cut_captioned_and_held_out_whole(recordings):
    data = Data(seconds=0.5, validation=1, caption="just {trigger}")
    found = scan_recordings(recordings, data, {"trigger": "zovuki", "class": ""})
    pieces = [*found.pieces, *found.held_out]
    assert sorted((p.name, p.start_seconds, p.seconds) for p in pieces if p.name == "high.flac") == [
        ("high.flac", 0.0, 0.5),
        ("high.flac", 0.5, 0.5),
    ]  # 0.2 seconds are left over, less than half a piece
    assert {p.name: p.caption for p in pieces} == {
        "low.wav": "a low zovuki",
        "high.flac": "a high zovuki",
        "mid.ogg": "a zovuki",
        "bare.wav": "just zovuki",
    }
    assert len({p.content for p in found.held_out}) == 1
    assert not {p.content for p in found.held_out} & {p.content for p in found.pieces}
    for piece in pieces:
        assert piece.load(RATE, 2).shape == (2, round(piece.seconds * RATE))


def test_mp3_is_read_as_it_sounds(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(440, 1.0, 16_000), 16_000, format="MP3")
    (piece,) = scan_recordings(tmp_path, Data(), {"trigger": "x", "class": ""}).pieces
    wave = piece.load(16_000, 1)
    assert wave.shape == (1, 16_000)
    assert int(torch.fft.rfft(wave[0]).abs().argmax()) == 440
    assert float(wave.std()) == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


def test_a_misspelt_mode_in_captions_is_told_once(tmp_path):
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", tone(110 + ord(name), 0.5), RATE)
        (tmp_path / f"{name}.txt").write_text("a slow makam hicazz" if name != "c" else "a slow makam hicaz")
    told = scan_recordings(tmp_path, Data(), {"trigger": "x", "class": ""}).report.warnings
    assert told == ["the caption of 'a.wav' and 1 more has 'hicazz', perhaps for 'Hicaz'"]


def test_of_long_recordings_a_part_is_used(tmp_path):
    for name, seconds in (("long", 100), ("short", 30)):
        soundfile.write(tmp_path / f"{name}.wav", np.sin(np.arange(seconds * 1600) / 3).astype("float32") / 2, 1600)
    found = scan_recordings(tmp_path, Data(seconds=10, part=(0.2, 0.9)), {"trigger": "x", "class": ""}).pieces
    starts = {name: [p.start_seconds for p in found if p.name == f"{name}.wav"] for name in ("long", "short")}
    assert starts == {"long": [20.0 + 10 * i for i in range(7)], "short": [0.0, 10.0, 20.0]}
    assert all(p.seconds == pytest.approx(10) for p in found)
    with pytest.raises(ValidationError, match="smaller first"):
        Data(part=(0.9, 0.2))


def test_unusable_files_are_dropped_by_name_and_oddities_told(recordings):
    soundfile.write(recordings / "silent.wav", np.zeros(RATE, "float32"), RATE)
    soundfile.write(recordings / "one.wav", np.ones(1, "float32"), RATE)
    soundfile.write(recordings / "loud.wav", np.clip(9 * tone(110, 0.5), -1, 1), RATE)
    (recordings / "video.wav").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    report = scan_recordings(recordings, Data(seconds=0.5), {"trigger": "", "class": ""}).report
    reasons = dict(report.dropped)
    assert set(reasons) == {"silent.wav", "one.wav", "video.wav"}
    assert "silent" in reasons["silent.wav"]
    assert "long" in reasons["one.wav"]
    assert "cannot be read" in reasons["video.wav"]
    assert any("loud.wav" in text and "clipped" in text for text in report.warnings)


def test_a_folder_without_sounds_is_refused(tmp_path, pictures):
    with pytest.raises(DataError, match="no sounds"):
        scan_recordings(pictures, Data(), {"trigger": "", "class": ""})


# -- training ----------------------------------------------------------------------


def test_a_resumed_training_equals_one_that_went_through(recipe, tmp_path):
    through = train(recipe, tmp_path / "through", *BUSY, "method.dropout=0.2")
    train(recipe, tmp_path / "broken", *BUSY, "method.dropout=0.2", stop_after=3)
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


def test_samples_are_sounds_and_row_0_is_the_base(recipe, tmp_path, folder_of_musicgen):
    events = train(recipe, tmp_path / "run", "learning_rate=0.05")
    paths = [tmp_path / "run" / e.data["path"] for e in events if e.kind == "sample"]
    assert [p.name for p in paths] == ["000000-0.wav", "000003-0.wav", "000006-0.wav"]
    bare = load_base(folder_of_musicgen).generate(Request(["a tune"], [0], seconds=0.1))[0]
    assert torch.allclose(read_sound(paths[0]).wave, bare.wave, atol=2**-15)
    assert not torch.equal(read_sound(paths[2]).wave, read_sound(paths[0]).wave)
    assert "<audio" in (tmp_path / "run" / "report.html").read_text()


def test_beginnings_of_notes_count_more_where_they_are_heard(tmp_path, recipe):
    notes = np.concatenate([tone(hz, 0.25)[:, 0] * np.linspace(1, 0.1, 400) for hz in (110, 220, 147, 196)])
    (tmp_path / "played").mkdir()
    soundfile.write(tmp_path / "played" / "a.wav", notes.astype("float32"), RATE)
    settings = ("first_codebook=2", "note_beginnings=3", "data.seconds=1")
    training = plan(Order(recipe, data=str(tmp_path / "played"), run=tmp_path / "run", settings=settings))
    base, preset, cache = training.base, training.preset, Cache(tmp_path / "cache")
    task = adapter_training(preset.method, base, preset, training.run, training.pictures, training.card, cache)
    assert list(task.prepare())
    weights, rate = task.examples[0].weights, base.frame_rate_hz
    assert weights[1:].unique().tolist() == [1]
    assert set(weights[0].unique().tolist()) == {2, 6}
    for begun in (0.25, 0.5, 0.75):
        assert weights[0, round(begun * rate) + 1] == 6
    assert weights[0, round(0.22 * rate)] == 2


def test_what_counts_more_of_tokens_is_refused_where_none_are_written(tmp_path, recordings):
    order = Order("mustango-raga", data=str(recordings), run=tmp_path / "run", settings=("first_codebook=2",))
    with pytest.raises(PresetError, match="writes no tokens"):
        plan(order)


def test_the_loss_falls(recipe, tmp_path):
    events = train(recipe, tmp_path / "run", "learning_rate=0.02", "steps=30", "batch_size=2", "sample_every=0")
    losses = [e.data["loss"] for e in events if e.kind == "step"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_recomputing_activations_changes_nothing_that_is_learned(recipe, tmp_path):
    train(recipe, tmp_path / "plain")
    train(recipe, tmp_path / "saving", "gradient_checkpointing=true")
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("plain", "saving"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["learned_words=1", "min_snr_gamma=5", "dco_beta=10", "data.flip=true"])
def test_settings_for_pictures_are_refused(recipe, setting, tmp_path):
    with pytest.raises(PresetError, match="makes music"):
        plan(Order(recipe, run=tmp_path / "run", settings=(setting,)))


def test_music_methods_are_refused_on_a_base_of_pictures(tmp_path, pictures, tiny_base_folder):
    path = tmp_path / "p.yaml"
    path.write_text(f"base: {tiny_base_folder}\nmethod: music-linear\ndata: {{path: {pictures}}}\n")
    with pytest.raises(PresetError, match="has no place 'after_layer'"):
        plan(Order(str(path)))


# -- the command line ----------------------------------------------------------------------


def test_train_and_generate_at_the_command_line(recipe, recordings, folder_of_musicgen, tmp_path, capsys):
    request = ["train", "--preset", recipe, "--base", str(folder_of_musicgen), "--data", str(recordings)]
    request += ["--method", "music-linear", "--steps", "2", "--name", "tune", "--json", "--run", str(tmp_path / "run")]
    assert studio(request) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trigger"] == "tune"
    out = tmp_path / "a.wav"
    request = ["generate", "a tune", "--adapter", "tune:0.5", "--seconds", "0.2", "--out", str(out), "--json"]
    assert studio(request) == 0
    assert json.loads(capsys.readouterr().out)["sounds"] == [str(out)]
    assert soundfile.info(out).frames == round(0.2 * RATE)
    assert facts_in(out)["adapters"][0]["weight"] == 0.5
    assert studio(["generate", "a tune", "--base", str(folder_of_musicgen), "--out", str(tmp_path / "a.png")]) == 2
    assert "cannot write sounds as '.png'" in capsys.readouterr().err


def test_samples_on_the_way_are_of_what_is_taught_and_the_adapter_does_not_tell(recipe, recordings, tmp_path, capsys):
    run = tmp_path / "run"
    changes = ["sample_prompts=['{caption}']", "data.validation=1", "sample_every=2", "steps=2"]
    request = ["train", "--preset", recipe, "--run", str(run), "--name", "tune"]
    assert studio(request + [part for change in changes for part in ("--set", change)]) == 0
    found = scan_recordings(recordings, Data(seconds=0.5, validation=1), {"trigger": "tune", "class": ""})
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["prompt"] for e in events if e["kind"] == "sample"] == [found.held_out[0].caption] * 2
    assert f"studio generate {quote(found.held_out[0].caption)} --adapter tune" in capsys.readouterr().out
    assert load_adapter(run / "adapter.safetensors").card.preset["sample_prompts"] == ["{caption}"]


def test_check_rehearses_training_and_export(recipe, capsys):
    request = ["check", "--preset", recipe, "--set", "export=[peft]", "--set", "method={kind: lora, rank: 2}", "--json"]
    assert studio(request) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pieces of sound"] == 5
    assert told["bucket"] == ["0.5 s: 5"]
    assert told["export"] == ["peft: exact"]


def write_adapter_of_another_width(path):
    base = load_base("melody")
    method = method_from({"kind": "music-linear", "bottleneck": 4})
    sites = {name: site.shape for name, site in method.sites(base).items()}
    new_adapter(Card(method=method.model_dump(mode="json"), base=base.identity(), sites=sites)).save(path)


def write_makam(path):
    soundfile.write(path.with_name("a.wav"), tone(110, 0.5), RATE)
    path.write_text(json.dumps({"file_name": "a.wav", "makam": "Hicazz"}))


UNUSABLE = {
    "silent.wav": (lambda path: soundfile.write(path, np.zeros(RATE, "float32"), RATE), "'silent.wav' is silent"),
    "one.wav": (lambda path: soundfile.write(path, np.ones(1, "float32"), RATE), "'one.wav' is only 0.00063 seconds"),
    "video.wav": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500)), "'video.wav' cannot be read"),
    "metadata.jsonl": (write_makam, "'metadata.jsonl', line 1: unknown makam 'Hicazz'"),
    "wide.safetensors": (write_adapter_of_another_width, "made for 'melody'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_refused_in_one_line_and_leaves_nothing(
    name, recipe, folder_of_musicgen, tmp_path, capsys
):
    folder, (write, said) = tmp_path / "given", UNUSABLE[name]
    folder.mkdir()
    write(folder / name)
    request = ["train", "--preset", recipe, "--data", str(folder), "--name", "tune"]
    if name == "wide.safetensors":
        request = ["generate", "a tune", "--base", str(folder_of_musicgen), "--adapter", str(folder / name)]
        request += ["--out", str(tmp_path / "a.wav")]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert studio(request) == 2
    told = capsys.readouterr()
    error, *hint = told.err.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert [line.partition(" ")[0] for line in hint] in ([], ["hint:"])
    assert not told.out
    assert sorted(tmp_path.rglob("*")) == before
