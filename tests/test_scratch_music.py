"""The base `melody` from nothing: codebooks that learn, a codec and a decoder through the one loop, files that load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from studio.base import Request
from studio.bases.melody import build_melody
from studio.bases.musicgen import MusicGen
from studio.bases.mustango.building import SMALL_VAE, mel_vae, melody_diffusion
from studio.bases.registry import load_base
from studio.bases.tiny import fixed_seed
from studio.data.melodies.fields import KEYS, Fields, vocabulary
from studio.data.melodies.modes import MAKAMS, RAGAS, TAUGHT, TRADITIONS, UNTAUGHT
from studio.data.melodies.source import draw_melody
from studio.data.sounds import Sound
from studio.errors import BaseError, PresetError
from studio.evaluate.melody_card import (
    Heard,
    fit_judge,
    listen,
    marks,
    measure_codec,
    measure_prompts,
    usual_moves,
)
from studio.evaluate.melody_card import main as card
from studio.music.codebooks import Codebooks, k_means, nearest
from studio.music.score import read_score
from studio.music.spectra import magnitudes, spectral_distance
from studio.training import Order, plan, plan_resume
from trainers.scratch_music.whitening import whitened

CODEC = ("batch_size=2", "data.seconds=0.25", "data.pool=2", "steps=6", "checkpoint_every=3", "warmup_steps=0")
DECODER = ("batch_size=2", "data.seconds=1", "data.pool=3", "data.refresh=1", "steps=6", "warmup_steps=0")
QUIET = ("sample_every=0", "validate_every=0")


@pytest.fixture(scope="module")
def codec_run(tmp_path_factory):
    """The folder of a codec's training of six steps, of which the last three had codes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDIO_HOME", str(tmp_path_factory.mktemp("home")))
        folder = tmp_path_factory.mktemp("runs") / "codec"
        events = events_of("base-melody-codec", folder, *CODEC, *QUIET, "method.unquantised=0.4")
        assert events[-1].kind == "finished"
        return folder


@pytest.fixture
def codec():
    return build_melody(0).denoiser.audio_encoder


def frames(count, seed=0, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def begun(codec, seed=0):
    books = Codebooks(codec)
    books.begin(frames(2000, seed), torch.Generator().manual_seed(seed))
    return books


def events_of(preset, folder, *settings, stop_after=None):
    training = plan(Order(preset, run=folder, settings=settings))
    return collect(training, stop_after)


def collect(training, stop_after=None):
    events = []
    for event in training.events(lambda: stop_after is not None and bool(events) and events[-1].step >= stop_after):
        events.append(event)
    return events


# -- codebooks ---------------------------------------------------------------------------------------------------


def test_frames_are_quantised_as_the_codec_itself_does(codec):
    books = begun(codec)
    heard = frames(50, 3).T[None]
    said, _ = books.quantise(heard, learn=False)
    own = codec.quantizer.decode(codec.quantizer.encode(heard, 1.6))
    assert torch.allclose(said, own, atol=1e-5)


def test_each_book_takes_error_away_and_gradients_pass_straight_through(codec):
    books = begun(codec)
    heard = frames(400, 4).view(2, 200, 32).transpose(1, 2).clone().requires_grad_(True)
    said, commitment = books.quantise(heard, learn=False)
    said.sum().backward()
    assert torch.equal(heard.grad, torch.ones_like(heard))
    assert commitment.shape == (2,)
    left, errors = heard.detach().transpose(1, 2).flatten(0, 1), []
    for book in books.books:
        left = left - book.embed[nearest(left, book.embed)]
        errors.append(float(left.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5


def test_centres_follow_the_mean_of_what_falls_to_them(codec):
    books = begun(codec)
    book = books.books[0]
    target = frames(300, 5) + 1.0
    error = lambda: float((target - book.embed[nearest(target, book.embed)]).square().mean())  # noqa: E731
    before = error()
    for step in range(1, 60):
        books.quantise(target.T[None], learn=True)
        books.update(step, torch.Generator().manual_seed(step))
    assert error() < 0.7 * before


def test_dead_centres_start_again_where_frames_are(codec):
    books = begun(codec)
    book = books.books[0]
    book.embed[:200] += 100  # nothing falls to these any more
    book.cluster_size[:200] = 1e-3
    book.cluster_size[200:] *= 0.2
    book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
    for step in range(1, 61):
        books.quantise(frames(400, step).T[None], learn=True)
        books.update(step, torch.Generator().manual_seed(step))
    used = torch.unique(nearest(frames(3000, 999), book.embed))
    assert len(used) > 200


def test_k_means_finds_clusters_and_survives_too_few_frames():
    middles = 10 * frames(8, 1)
    points = middles.repeat(50, 1) + 0.1 * frames(400, 2)
    centres = k_means(points, 16, torch.Generator().manual_seed(0))
    assert float((points - centres[nearest(points, centres)]).square().mean()) < 0.05
    assert k_means(frames(3), 16, torch.Generator().manual_seed(0)).shape == (16, 32)


def test_spectra_of_a_sine_peak_at_one_and_equal_sounds_have_no_distance():
    time = torch.arange(6000) / 12_000
    sine = torch.sin(2 * torch.pi * 750 * time)[None]
    assert float(magnitudes(sine, 512)[0, :, 5:-5].max()) == pytest.approx(1, abs=0.05)
    assert float(spectral_distance(sine, sine)) < 0.01
    assert float(spectral_distance(torch.zeros_like(sine), sine)) > float(spectral_distance(0.8 * sine, sine))


# -- the two stages ----------------------------------------------------------------------------------------------


def test_a_codec_trains_quantises_and_resumes_to_the_bit(tmp_path, codec_run):
    settings = (*CODEC, *QUIET, "method.unquantised=0.4")
    stopped = events_of("base-melody-codec", tmp_path / "part", *settings, stop_after=4)
    assert stopped[-1].kind == "stopped"
    collect(plan_resume(tmp_path / "part"))
    one, other = (load_file(run / "base" / "model.safetensors") for run in (codec_run, tmp_path / "part"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert float(one["audio_encoder.quantizer.layers.0.codebook.cluster_size"].sum()) > 0


def test_a_trained_base_is_small_and_loads_as_stock_classes(codec_run):
    from transformers import AutoTokenizer, MusicgenForConditionalGeneration

    folder = codec_run / "base"
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert str(codec_run.parent) not in "".join(path.read_text() for path in folder.glob("*.json"))
    stock = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours = load_base(folder, dtype="fp32", device="cpu")
    wave = draw_melody(("stock",), 1.0, 12_000, ("western",)).wave[None]
    assert torch.equal(stock.audio_encoder.encode(wave).audio_codes[0], ours.encode_sounds(wave))
    told = AutoTokenizer.from_pretrained(folder)(["a slow raga yaman on a sitar"], return_tensors="pt")
    assert told.input_ids.shape[1] == 8
    made = stock.generate(**told, do_sample=False, max_new_tokens=13)
    assert made.shape[-1] == 10 * 240


def test_a_decoder_learns_on_the_codes_of_the_codec_that_it_is_given(tmp_path, codec_run):
    given = f"method.init_from={codec_run / 'base'}"
    settings = (*DECODER, "sample_every=6", "validate_every=6", "sample_seconds=0.2", "sample_prompts=[a tune]", given)
    settings = (*settings, "method.fresh=[text_encoder,enc_to_dec_proj,decoder]")
    found = events_of("base-melody", tmp_path / "run", *settings)
    losses = [event.data["loss"] for event in found if event.kind == "step"]
    assert losses[-1] < losses[0]
    assert [event.data["path"] for event in found if event.kind == "sample"] == [
        f"samples/{step:06d}-0.wav" for step in (0, 6)
    ]
    codec, both = (load_file(run / "base" / "model.safetensors") for run in (codec_run, tmp_path / "run"))
    same = {key: torch.equal(codec[key], both[key]) for key in both}
    assert all(equal for key, equal in same.items() if key.startswith("audio_encoder."))
    assert not all(equal for key, equal in same.items() if key.startswith("text_encoder."))


def test_frames_count_more_in_which_a_piece_of_the_batch_begins_a_note(tmp_path, codec_run):
    settings = (*DECODER, *QUIET, f"method.init_from={codec_run / 'base'}", "note_beginnings=5")
    training = plan(Order("base-melody", run=tmp_path / "run", settings=settings))
    task = training.preset.method.task(training.base, training.preset, training.run)
    codes, captions = task.pool.batch(4, 0, range(2))
    keys = task.pool.keys(4, 0, range(2))
    weights = task._weights(keys, codes)
    assert weights.shape == codes.shape
    assert torch.equal(weights[:, 1:], torch.ones(2, 3, 50))
    for key, caption, row in zip(keys, captions, weights[:, 0], strict=True):
        piece = draw_melody(key, 1.0, 12_000, TRADITIONS, modes=TAUGHT)
        assert caption.startswith(piece.caption)
        begun = {int(note.start * 50) + i for note in piece.score.notes for i in range(5)} & set(range(50))
        assert {frame for frame in range(50) if row[frame] == 20} == begun
        assert row.sum() == 4 * (50 + 4 * len(begun))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.source=stickers",), "draws its own data"),
        (("base=sticker",), "no blueprint"),
        (("method.init_from=sticker",), "is no musicgen"),
        (("method.train=denoiser",), "has no denoiser"),
        (("method.fresh=[vae]",), "no network 'vae'"),
        (("data.seconds=40", "method.train=decoder"), "at once"),
        (("data.modes=[Rasd]",), "no mode 'Rasd'"),
        (("data.modes=[Rast]", "method.basses=0.1"), "a bass plays none"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_trains(settings, message, tmp_path):
    with pytest.raises(PresetError, match=message):
        events_of("base-melody-codec", tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_the_small_mustango_trains_in_two_stages_and_what_comes_out_plays(tmp_path):
    few = ("batch_size=2", "data.pool=2", "warmup_steps=0", "steps=2", *QUIET)
    first = events_of("base-melody-diffusion-vae", tmp_path / "vae", *few)
    losses = [event.data["loss"] for event in first if event.kind == "step"]
    assert max(losses) < 4  # its start is near what spectrograms are
    encoder = load_base(tmp_path / "vae" / "base", dtype="fp32", device="cpu")
    assert encoder.pipe.vae.config.scaling_factor != pytest.approx(0.18215, abs=1e-3)
    fresh = "method.fresh=[unet,text_encoder,beat_encoder,chord_encoder]"
    given = (f"method.init_from={tmp_path / 'vae' / 'base'}", fresh)
    found = events_of("base-melody-diffusion", tmp_path / "run", *few, *given, "method.words_first=1")
    assert found[-1].kind == "finished"
    base = load_base(tmp_path / "run" / "base", dtype="fp32", device="cpu")
    assert base.pipe.vae.config.scaling_factor == encoder.pipe.vae.config.scaling_factor
    sound = base.generate(Request(["a tune | beats: 90 bpm 3/4 | chords: Dm"], [0], steps=1, seconds=1.0))[0]
    assert sound.wave.shape == (1, 8000)
    assert sum(path.stat().st_size for path in (tmp_path / "run" / "base").rglob("*") if path.is_file()) < 4_000_000


@torch.no_grad()
def test_whitened_latents_are_as_loud_in_every_direction_and_decode_to_the_same():
    with fixed_seed(0):
        vae, mels = mel_vae(SMALL_VAE), torch.randn(4, 1, 32, 16)
    vae.quant_conv.weight[0] *= 20  # one channel that drowns the others
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    latents = vae.encode(mels).latent_dist.mode()
    decoded = vae.decode(latents).sample
    scale = vae.config.scaling_factor
    variances = torch.linalg.eigvalsh(torch.cov(latents.transpose(0, 1).flatten(1)))
    with whitened(vae, latents):
        even = vae.encode(mels).latent_dist.mode()
        assert vae.config.scaling_factor == 1
        assert torch.allclose(vae.decode(even).sample, decoded, atol=1e-4)
    assert float(even.mean((0, 2, 3)).abs().max()) < 1e-4
    found = torch.linalg.eigvalsh(torch.cov(even.transpose(0, 1).flatten(1)))
    assert torch.allclose(found, variances / (variances + 0.1 * variances.mean()), atol=1e-4)
    assert vae.config.scaling_factor == scale
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_share_of_the_pieces_is_turned_into_those_of_a_bass(tmp_path, codec_run):
    settings = (*DECODER, *QUIET, f"method.init_from={codec_run / 'base'}", "method.basses=0.5")
    training = plan(Order("base-melody", run=tmp_path / "run", settings=settings))
    task = training.preset.method.task(training.base, training.preset, training.run)
    pieces = {key: task._drawn(key, stem=True) for key in ((7, slot) for slot in range(40))}
    basses = [piece for piece in pieces.values() if piece.score.fields.instrument == "bass"]
    assert 12 <= len(basses) <= 30
    assert all("bass" in piece.caption for piece in basses)
    rate = training.base.frame_rate_hz
    for key, piece in pieces.items():  # the score of which notes count more is that of what is played
        assert task._beginnings(key) == [int(note.start * rate) for note in piece.score.notes]


def test_words_are_learned_first_from_noise_alone_and_the_mean_of_pieces_under_them(tmp_path, monkeypatch):
    settings = ("batch_size=1", "data.pool=1", *QUIET, "method.words_first=1")
    training = plan(Order("base-melody-diffusion", run=tmp_path / "run", settings=settings))
    task = training.preset.method.task(training.base, training.preset, training.run)
    seen = []

    def predict(noisy, time, told):
        seen.append((noisy, time))
        return torch.zeros_like(noisy)

    monkeypatch.setattr(training.base, "predict", predict)
    loss = task.losses(0, 0, range(1))
    waves, caption = task._kind((training.preset.seed, 0, 0))
    assert len({float(wave.square().sum()) for wave in waves}) == len(waves) == 8
    assert task.kinds.captions == [caption]
    mean = torch.stack([training.base.encode_sounds(wave[None, None])[0] for wave in waves]).mean(0)
    assert torch.allclose(loss, mean.square().mean(), rtol=1e-3)  # at the last time v is minus the latents
    task.losses(1, 0, range(1))
    assert seen[0][1].tolist() == [999]
    assert seen[1][1].tolist() != [999]
    assert seen[0][0].std() == pytest.approx(1, abs=0.05)
    assert "|" in task.pool.captions[0]


def test_times_of_a_denoiser_can_be_moved_to_where_the_words_decide(tmp_path, monkeypatch):
    settings = (
        "batch_size=2",
        "data.pool=2",
        *QUIET,
        "data.modes=[major]",
        "method.timestep_shift=1e9",
        "method.words_first=0",
    )
    training = plan(Order("base-melody-diffusion", run=tmp_path / "run", settings=settings))
    task = training.preset.method.task(training.base, training.preset, training.run)
    seen = []
    monkeypatch.setattr(
        training.base, "predict", lambda noisy, time, told: seen.append(time) or torch.zeros_like(noisy)
    )
    assert task.losses(0, 0, range(2)).shape == (2,)
    assert seen[0].tolist() == [999, 999]
    assert all("major" in caption for caption in task.pool.captions)


def test_a_piece_is_told_by_its_beats_and_the_chord_of_its_key():
    fields = Fields("western", "flute", "minor", "waltz", "slow", "E flat")
    piece = draw_melody(("told",), 4.0, 8000, ("western",), fields=fields)
    score = read_score(piece.told).within(0.0, 4.0)
    assert score.text == piece.caption
    assert [count for _, count in score.beats][:4] == [1, 2, 3, 1]
    assert score.timed_chords == (("Ebm", 0.0),)
    raga = draw_melody(("told",), 4.0, 8000, ("raga",))
    assert read_score(raga.told).within(0.0, 4.0).chords == ()


def test_bundled_bases_are_never_taught_what_is_left_to_adapters():
    shown = {draw_melody(("left", i), 0.5, 4000, ("raga", "makam"), modes=TAUGHT).score.fields.mode for i in range(120)}
    assert not shown & UNTAUGHT
    assert len(shown) > 10
    assert {*RAGAS, *MAKAMS} > UNTAUGHT


def test_a_network_built_otherwise_is_refused_naming_the_part(tmp_path):
    MusicGen.tiny().pipe.save_pretrained(tmp_path / "tiny")
    with pytest.raises(BaseError, match="audio_encoder"):
        events_of("base-melody", tmp_path / "run", f"method.init_from={tmp_path / 'tiny'}")


# -- the card ----------------------------------------------------------------------------------------------------


def test_a_perfect_codec_scores_perfectly_and_an_untrained_one_does_not():
    base = build_melody(0)

    class Perfect:
        sample_rate_hz = 12_000
        encode_sounds = staticmethod(lambda waves: torch.cat([(waves * 10_000).long(), 0 * waves.long()], 1) + 10_000)
        decode_sounds = staticmethod(lambda codes: (codes[:, :1].float() - 10_000) / 10_000)

    best = measure_codec(Perfect(), 3)["all"]
    assert best["voiced_kept"] > 0.98
    assert best["median_cents"] < 0.5
    begun(base.denoiser.audio_encoder)
    worst = measure_codec(base, 3)
    assert worst["all"]["voiced_kept"] < 0.9 or worst["all"]["median_cents"] > 100
    assert len(worst["codebooks"]) == 4


def test_marks_are_full_for_what_was_asked_and_low_for_another_key():
    judge, _ = fit_judge(load_base("melody"), 2.0, 40)
    fields = Fields("western", "flute", "major", "steady", "fast", "C")
    piece = draw_melody(("marks", 1), 6.0, 12_000, ("western",), fields=fields)
    heard = listen(piece.wave[0].numpy(), 12_000, judge)
    told = marks(heard, fields)
    assert told["begins"] == 1
    assert told["in_scale"] > 0.9
    assert told["mode"] == 1
    assert told["tempo"] == 1
    off = marks(heard, replace(fields, key="F sharp"))
    assert off["in_scale"] < 0.5
    assert off["begins"] == 0
    assert KEYS[9] == "A"


@pytest.mark.parametrize("word", ["slow", "", "fast"])
def test_the_pace_of_a_line_is_that_of_the_word_whose_lines_move_as_often(word):
    heard = Heard(np.zeros(9), usual_moves("western", word), 100.0, "flute")
    fields = Fields("western", "flute", "major", "steady", "", "C")
    told = {tempo: marks(heard, replace(fields, tempo=tempo))["pace"] for tempo in ("slow", "", "fast")}
    assert told == {tempo: float(tempo == word) for tempo in told}


def test_the_card_is_written_by_one_command(tmp_path):
    base = build_melody(0)
    begun(base.denoiser.audio_encoder)
    base.pipe.save_pretrained(tmp_path / "base")
    assert base.generate(Request(["a tune"], [0], seconds=0.2))[0].seconds == pytest.approx(0.2)
    assert card([str(tmp_path / "base"), "--out", str(tmp_path / "card"), "--pieces", "3", "--prompts", "0"]) == 0
    told = json.loads((tmp_path / "card" / "card.json").read_text())
    assert set(told["codec"]) >= {"western", "raga", "makam", "all", "codebooks"}
    assert len(list((tmp_path / "card").glob("codec-*.wav"))) == 3
    assert card(["sticker", "--out", str(tmp_path / "no")]) == 2
    assert card(["melody", "--out", str(tmp_path / "no"), "--modes", "Rasd"]) == 2
    assert card(["melody", "--out", str(tmp_path / "no"), "--modes", "Rast"]) == 2  # it has no held-out combination
    assert not (tmp_path / "no").exists()


def test_a_base_that_hears_beats_and_chords_is_told_those_of_the_true_rendering_and_then_words_alone(monkeypatch):
    base = melody_diffusion(vocabulary(), 0)
    asked = []

    def played(request):
        asked.append(request.prompts[0])
        return [Sound(torch.zeros(1, round(request.seconds * 8000)), 8000)]

    monkeypatch.setattr(base, "generate", played)
    found = measure_prompts(base, 2, 0.8)
    first, second = (read_score(prompt).within(0.0, 0.8) for prompt in asked[::2])
    assert (first.beats[0], second.beats[0]) == ((0.0, 1), (0.0, 1))
    assert len(first.timed_chords) == 1  # a western piece
    assert second.timed_chords == ()  # a raga
    assert all("|" not in prompt for prompt in asked[1::2])
    assert found["generated"]["begins"] == 0 < found["rendered"]["begins"]
    assert found["through the base"].keys() == found["held out"].keys()
    assert measure_codec(base, 3)["codebooks"] == []
