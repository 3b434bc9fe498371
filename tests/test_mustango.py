"""Mustango: the network is the published one, hears beats and chords as its authors have it, and keeps the contract."""

import math
import time

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from studio.base import Request, same_values
from studio.bases.mustango import Mustango
from studio.bases.mustango.building import SMALL_MEL, assembled, melody_diffusion, pico, published
from studio.bases.mustango.encoders import BeatEncoder, ChordEncoder, chord_ids, waves_of
from studio.bases.mustango.mel import Mel, levelled
from studio.bases.mustango.network import aligned, series_of
from studio.bases.registry import load_base
from studio.bases.tiny import tiny_t5
from studio.data.melodies.modes import TRADITIONS
from studio.data.melodies.source import draw_melody
from studio.data.melodies.voices import VOICES
from studio.errors import AdapterError, BaseError, PresetError, RequestError
from studio.evaluate.beats import f_measure, onset_envelope, onsets
from studio.evaluate.pitch import track_pitch
from studio.keyed import numpy_generator
from studio.method import method_from
from studio.music.score import Score, parse_chord, read_score

PROMPT = "a cat | beats: 120 bpm 3/4 | chords: Am F"


@pytest.fixture(scope="module")
def base():
    return Mustango.tiny()


@pytest.fixture(scope="module")
def real():
    """The published networks, without memory."""
    return published()


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def some_latents(number=2, seed=0, steps=16):
    return torch.randn(number, 2, steps, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predicted(base, prompts=(PROMPT, "a dog")):
    return base.predict(some_latents(len(prompts)), torch.full((len(prompts),), 500), base.encode_prompts(prompts))


def features(lengths=(5, 50, 20), number=2):
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        yield torch.randn(number, length, 16, generator=generator)
        yield torch.ones(number, length)


# -- the published network ---------------------------------------------------------------------------------------------


def test_parameter_counts_are_those_of_the_published_files(real):
    assert count(real["unet"]) == 1_413_192_008
    assert 4 * (count(real["vae"]) + count(real["vocoder"])) == 442_567_080
    table = 5000 * 1024  # of positions, which nothing reads
    main = sum(count(real[part]) for part in ("unet", "text_encoder", "beat_encoder", "chord_encoder"))
    assert 4 * (main + table) == 7_050_861_856
    assert count(real["chord_predictor"]) == 783_150_080
    assert count(real["beat_predictor"]) == 436_116_485


def test_a_munet_that_hears_no_beats_and_chords_is_diffusers_own_unet():
    network = pico(3).denoiser
    stock = UNet2DConditionModel.from_config(network.config)
    for series in series_of(network).values():
        for part in (series.beat, series.chord):
            torch.nn.init.zeros_(part.proj_out.weight)
            torch.nn.init.zeros_(part.proj_out.bias)
    own = {name.replace(".text.", "."): value for name, value in network.state_dict().items()}
    stock.load_state_dict({name: own[name] for name in stock.state_dict()})
    text, text_mask, *rest = features()
    text_mask[0, 3:] = 0
    x, moments = some_latents(), torch.tensor([3, 700])
    with torch.no_grad():
        ours = network(x, moments, text, text_mask, *rest)
        theirs = stock.eval()(x, moments, text, encoder_attention_mask=text_mask).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_attention_is_text_then_beats_then_chords(base):
    heard = []
    series = series_of(base.denoiser)
    assert list(series) == [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        *(f"up_blocks.1.attentions.{i}" for i in (0, 1)),
    ]
    hooks = [
        getattr(triple, part).register_forward_pre_hook(
            lambda _, __, told, where=(path, part): heard.append((*where, told["encoder_hidden_states"].shape[1])),
            with_kwargs=True,
        )
        for path, triple in series.items()
        for part in ("text", "beat", "chord")
    ]
    predicted(base)
    for hook in hooks:
        hook.remove()
    assert heard == [(path, *told) for path in series for told in (("text", 8), ("beat", 56), ("chord", 24))]


@torch.no_grad()
def test_padding_to_lengths_that_xformers_takes_is_not_heard(base):
    text, text_mask, beats, beat_mask, chords, chord_mask = features((5, 13, 9))
    beat_mask[0] = 0  # a piece without beats: the mask is empty, and attention the same to all
    chord_mask[1, 4:] = 0
    x, moments = some_latents(), torch.tensor([3, 700])
    padded = base.denoiser(x, moments, text, text_mask, beats, beat_mask, chords, chord_mask)
    told = {"beat": (beats, beat_mask), "chord": (chords, chord_mask)}
    bare = UNet2DConditionModel.forward(
        base.denoiser, x, moments, text, encoder_attention_mask=text_mask, cross_attention_kwargs=told
    ).sample
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded, bare, rtol=1e-4, atol=1e-5)
    assert [part.shape[1] for part in aligned(beats, beat_mask)] == [16, 16]


def test_recomputing_activations_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        base = Mustango.tiny()
        if recompute:
            base.enable_gradient_checkpointing()
        weight = base.denoiser.down_blocks[0].attentions[0].chord.proj_in.weight.requires_grad_(True)
        condition = base.encode_prompts([PROMPT])
        base.predict(some_latents(1), torch.tensor([500]), condition).square().mean().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_beats_and_chords_have_the_ids_of_the_published_weights():
    ids, seconds = BeatEncoder(8).ids_of([(1.1, 2), (0.5, 1), (1.7, 5)])
    assert ids.tolist() == [2, 3, 6] + [0] * 47
    assert seconds.tolist() == pytest.approx([0.5, 1.1] + [1.7] * 48)
    assert BeatEncoder(8).ids_of([])[0].tolist() == [0] * 50
    with pytest.raises(RequestError, match="count to 6"):
        BeatEncoder(8).ids_of([(0.5, 6)])
    known = {
        "N": (1, 1, 1),
        "A": (2, 2, 3),
        "Bb": (3, 2, 3),
        "Cm7b5": (5, 7, 3),
        "G#dim/B": (13, 11, 2),
        "F#6": (11, 8, 3),
    }
    assert {name: chord_ids(name) for name in known} == known
    ids, seconds = ChordEncoder(8).ids_of([("Am", 2.0), ("F", 0.0)])
    assert ids[:3].tolist() == [[10, 2, 3], [2, 4, 3], [0, 0, 0]]
    assert seconds.tolist() == [0.0] + [2.0] * 19
    assert ChordEncoder(8).ids_of([])[0][0].tolist() == [1, 1, 1]


def test_times_are_sines_and_cosines_of_the_papers_rates():
    told = waves_of(torch.tensor([[2.0]]), 4, 10001.0)[0, 0]
    slow = 2 / math.sqrt(10001)
    assert told.tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(slow), math.cos(slow)])
    root = waves_of(torch.tensor([[3]]), 4, 1.0)[0, 0]
    assert root.tolist() == pytest.approx([math.sin(3), math.cos(3)] * 2)


def sines(number, width, base):
    """Sine and cosine in turn, of ever slower waves: the encoding of a time, and where the base is 1 of a root."""
    rates = [base ** (-2 * pair / width) for pair in range(width // 2)]
    return [wave(number * rate) for rate in rates for wave in (math.sin, math.cos)]


def one_of(count, number):
    return [float(place == number) for place in range(count)]


def through(layer, rows):
    """A linear layer's output, number by number."""
    return [
        [bias + sum(w * x for w, x in zip(weights, row, strict=True)) for weights, bias in zip(*layer, strict=True)]
        for row in rows
    ]


@torch.no_grad()
def test_beats_are_their_count_and_time_through_one_layer():
    encoder = BeatEncoder(4, length=3)
    ids, seconds = encoder.ids_of([(0.5, 2), (1.25, 5)])
    rows = [one_of(7, 3) + sines(0.5, 4, 10001), one_of(7, 6) + sines(1.25, 4, 10001)]
    rows += [one_of(7, 0) + sines(1.25, 4, 10001)]  # padding
    expected = through([part.tolist() for part in (encoder.ffn.weight, encoder.ffn.bias)], rows)
    torch.testing.assert_close(encoder(ids[None], seconds[None])[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_chords_are_their_root_type_inversion_and_time_through_one_layer():
    encoder = ChordEncoder(4, length=3)
    ids, seconds = encoder.ids_of([("Am", 0.5), ("F#m7b5/A", 2.0)])
    bias = encoder.root_bias[0].tolist()
    known = [(2, 4, 3, 0.5), (11, 7, 2, 2.0), (0, 0, 0, 2.0)]  # the last is padding
    rows = [
        [wave + own for wave, own in zip(sines(root, 4, 1), bias, strict=True)]
        + one_of(12, kind) + one_of(4, inversion) + sines(time, 4, 10001)
        for root, kind, inversion, time in known
    ]  # fmt: skip
    expected = through([part.tolist() for part in (encoder.ffn.weight, encoder.ffn.bias)], rows)
    torch.testing.assert_close(encoder(ids[None], seconds[None])[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_prompt_tells_beats_and_chords():
    score = read_score("a waltz | beats: 60 bpm 3/4 | in red | chords: Am@0 F#m7/A@2.5 N@4").within(1.0, 3.0)
    assert score.text == "a waltz | in red"
    assert score.beats == ((0.0, 2), (1.0, 3), (2.0, 1))
    assert score.timed_chords == (("Am", 0.0), ("F#m7/A", 1.5))
    evenly = read_score("a | chords: C G").within(0.0, 5.0)
    assert evenly.timed_chords == (("C", 0.0), ("G", 2.5))
    assert evenly.beats is None
    assert read_score("a | beats: none").beats == ()
    assert read_score("a | beats: 1@0.5 2@0.25").beats == ((0.25, 2), (0.5, 1))
    assert parse_chord("Cmin7") == ("C", "m7", False)


@pytest.mark.parametrize(
    "told",
    ["beats: fast", "beats: 900 bpm", "beats: 0@1", "beats: 1@x", "chords: H", "chords: Am@0 F", "chords: C#sus"],
)
def test_beats_and_chords_that_make_no_sense_are_refused(told):
    with pytest.raises(RequestError):
        read_score(f"a tune | {told}")


def test_words_beats_and_chords_are_all_heard(base):
    bare = predicted(base, ("a cat",))
    for prompt in ("a dog", "a cat | beats: 90 bpm", "a cat | chords: Am F"):
        assert not torch.allclose(predicted(base, (prompt,)), bare, atol=1e-6)
    assert torch.equal(predicted(base, ("a cat | beats: none | chords: none",)), bare)


def test_samples_do_not_meet(base):
    together = predicted(base)
    with torch.no_grad():
        alone = base.predict(some_latents()[:1], torch.tensor([500]), base.encode_prompts([PROMPT]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


# -- predictors --------------------------------------------------------------------------------------------------------


def with_predictors(base):
    """The base, with random predictors of the real classes."""
    from transformers import DebertaV2Config, T5Config, T5ForConditionalGeneration

    from studio.bases.mustango.predictors import BeatPredictor

    tokenizer = base.pipe.tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DebertaV2Config(
            vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["p2c", "c2p"], **sizes
        )
        beats = BeatPredictor(config).eval()
        beats.regressor.bias.data.fill_(0.4)
        chords = T5ForConditionalGeneration(
            T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)
        ).eval()
    base.pipe.register_modules(
        beat_predictor=beats, beat_tokenizer=tokenizer, chord_predictor=chords, chord_tokenizer=tokenizer
    )
    return base


def test_predictors_tell_what_the_prompt_does_not(tmp_path):
    from studio.bases.mustango.predictors import read_chords

    base = with_predictors(Mustango.tiny())
    told = base.pipe.complete(Score("a cat"))
    assert told.beats
    assert all(0 <= seconds < 10 and 1 <= number <= 4 for seconds, number in told.beats)
    assert [seconds for seconds, _ in told.beats] == sorted(seconds for seconds, _ in told.beats)
    assert isinstance(told.chords, tuple)
    given = Score("a cat", beats=((0.5, 1),), chords=())
    assert base.pipe.complete(given) == given
    assert read_chords("Am at 0.46 n F at 2.3 n H at 3 n G at n N at 4") == (("Am", 0.46), ("F", 2.3), ("N", 4.0))
    base.pipe.save_pretrained(tmp_path / "saved")
    loaded = load_base(tmp_path / "saved")
    assert loaded.pipe.complete(Score("a cat")) == told
    assert loaded.pipe.chord_predictor.config.scale_decoder_outputs is False


# -- sounds ------------------------------------------------------------------------------------------------------------


def tone(pitch_hz, seconds, rate_hz):
    return 0.5 * torch.sin(2 * math.pi * pitch_hz * torch.arange(round(seconds * rate_hz)) / rate_hz)[None]


def test_a_spectrogram_has_a_frame_a_hop_and_the_tone_in_its_band():
    mel = Mel()
    low, high = (mel.of(tone(pitch, 1.0, 16000))[0, 0] for pitch in (220, 3000))
    assert low.shape == (100, 64)
    assert low[50].argmax() < high[50].argmax()
    loud = mel.of(torch.ones(1, 16000) * 0.1)
    assert float(loud.min()) == pytest.approx(math.log(1e-5))


def test_a_spectrogram_gives_the_pitch_back():
    mel = Mel(8000, 512, 128, 64, 0.0, 4000.0)
    wave = tone(440, 1.024, 8000)
    heard = mel.heard(mel.of(wave))
    assert heard.shape == wave.shape
    assert np.median(np.abs(track_pitch(heard[0].numpy(), 8000).cents(440.0))) < 3
    assert torch.equal(heard, mel.heard(mel.of(wave)))
    both = mel.heard(mel.of(torch.cat([wave, tone(330, 1.024, 8000)])))
    assert torch.allclose(both[:1], heard, atol=1e-4)
    assert torch.isfinite(mel.heard(torch.full((1, 1, 8, 64), -11.5))).all()


def test_a_note_begins_once_through_the_bands_and_back():
    mel, begun, found = Mel(**SMALL_MEL), 0, []
    for number in range(4):
        line = draw_melody(("onsets", number), 4.096, 8000, TRADITIONS, stem=True).wave
        true, heard = (onsets(onset_envelope(wave[0].numpy(), 8000)) for wave in (line, mel.heard(mel.of(line))))
        begun += len(true)
        found.append(f_measure(heard, true))
    assert begun > 20
    assert np.mean(found) > 0.7  # 0.55 with phases that 64 rounds of Griffin and Lim find


def test_the_small_base_s_bands_keep_the_pitch_of_a_bass():
    def in_tune(mel):
        """The share of frames of bass notes within 25 cents, through the bands and back."""
        found = []
        for pitch in (61.7, 65.4, 69.3, 73.4, 77.8):  # B to E flat
            note = VOICES["bass"].play(np.full(8192, pitch, np.float32), numpy_generator("bass", pitch), 8000)
            heard = mel.heard(mel.of(levelled(torch.from_numpy(note)[None])))
            found.append(np.abs(track_pitch(heard[0].numpy(), 8000).cents(pitch)) < 25)
        return float(np.concatenate(found).mean())

    assert in_tune(Mel(**SMALL_MEL)) > in_tune(Mel(**SMALL_MEL | {"scale": "slaney"})) + 0.2


def test_waves_are_brought_to_the_level_that_the_networks_know():
    wave = levelled(tone(50, 0.5, 1600) * 3 + 0.2)
    assert float(wave.abs().max()) == pytest.approx(0.5, abs=1e-4)
    assert float(wave.mean()) == pytest.approx(0.0, abs=1e-4)


@torch.no_grad()
def test_latents_are_scaled_as_the_autoencoder_says_and_deterministic(base):
    base.pipe.vae.register_to_config(scaling_factor=0.5)
    wave = tone(200, 0.3, 1600)[None]
    latents = base.encode_sounds(wave)
    assert latents.shape == (1, 2, 16, 4)  # 0.3 s are 30 frames, rounded up to 32, halved
    assert torch.equal(latents, base.encode_sounds(wave))
    vae, mel = base.pipe.vae, base.pipe.spectrogram
    padded = torch.nn.functional.pad(levelled(wave[:, 0]), (0, 32))
    direct = vae.encode(mel.of(padded)).latent_dist.mode()
    assert torch.allclose(latents, direct * 0.5)
    assert torch.allclose(base.pipe.decode_mel(latents), vae.decode(direct).sample, atol=1e-5)
    assert base.decode_sounds(latents).shape == (1, 1, 512)
    base.pipe.vae.register_to_config(scaling_factor=0.18215)


def test_playing_is_seeded_and_a_sound_does_not_depend_on_its_neighbours(base):
    played = base.generate(Request([PROMPT] * 3, [1, 2, 1], steps=2, seconds=0.3))
    again = base.generate(Request([PROMPT], [1], steps=2, seconds=0.3))[0]
    assert torch.equal(played[0].wave, again.wave)
    assert torch.equal(played[0].wave, played[2].wave)
    assert not torch.equal(played[0].wave, played[1].wave)
    assert again.wave.shape == (1, 480)
    assert again.sample_rate_hz == 1600


def test_a_pipeline_knows_its_own_number_of_steps(tmp_path):
    assert Mustango.tiny().pipe.config.steps == 100
    base = melody_diffusion(["tune"])
    base.pipe.save_pretrained(tmp_path / "base")
    seen = []
    request = Request(["tune"], [0], seconds=0.5, on_step=lambda done, total: seen.append(total))
    load_base(str(tmp_path / "base")).generate(request)
    assert seen == [25] * 25


def test_playing_counts_its_steps_and_guidance_acts(base):
    seen = []
    request = Request([PROMPT], [1], steps=3, seconds=0.1, on_step=lambda done, total: seen.append((done, total)))
    usual = base.generate(request)[0].wave
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for options in ({"guidance": 1.0}, {"negative": "dog"}):
        other = base.generate(Request([PROMPT], [1], steps=3, seconds=0.1, **options))[0].wave
        assert not torch.equal(other, usual)


@pytest.mark.parametrize("asked", [{"width": 64}, {"seconds": 99.0}, {"seconds": -1.0}])
def test_what_mustango_has_not_is_refused(base, asked):
    with pytest.raises(RequestError, match="tiny-mustango"):
        base.generate(Request(["a cat"], [1], **asked))


# -- the contract of a base --------------------------------------------------------------------------------------------


def test_target_is_what_the_scheduler_turns_back_into_the_sound(base):
    scheduler = base.pipe.scheduler
    assert base.objective.prediction_type == "v_prediction"
    scheduler.set_timesteps(10)
    moment = scheduler.timesteps[3]
    clean, noise = some_latents(1, 1), some_latents(1, 2)
    noisy, target = (f(clean, noise, moment.reshape(1)) for f in (base.objective.noised, base.objective.target))
    assert torch.allclose(scheduler.step(target, moment, noisy).pred_original_sample, clean, atol=1e-4)


def test_min_snr_is_that_of_v_prediction(base):
    moments = torch.tensor([10, 500, 990])
    snr = base.objective.snr(moments)
    weights = base.objective.min_snr_weight(moments, 5.0)
    assert torch.allclose(weights.double(), snr.clamp(max=5) / (snr + 1), atol=1e-6)  # and not / snr


def test_every_site_exists_and_fires(base):
    fired, sites = set(), base.sites()
    hooks = [s.module.register_forward_hook(lambda *_, name=name: fired.add(name)) for name, s in sites.items()]
    predicted(base)
    for hook in hooks:
        hook.remove()
    assert fired == set(sites)
    assert not any("vae" in name or "vocoder" in name for name in sites)


def test_every_group_matches_what_it_says(base):
    kinds = ("linear", "conv2d", "embedding", "block", "plane", "norm")
    counts = {group: len(base.select([group], kinds)) for group in base.groups}
    assert counts["attention"] == 4 * 3 * 8
    assert counts["cross-attention"] == counts["attention"] / 2
    assert [counts[f"{part}-attention"] for part in ("text", "beat", "chord")] == [4 * 8] * 3
    assert (counts["after_layer"], counts["after_block"], counts["text_states"], counts["scores"]) == (4, 3, 1, 2)
    assert counts["all"] == counts["linear"] + counts["conv"]
    with pytest.raises(PresetError, match="attentoin"):
        base.select(["attentoin"])


@pytest.mark.parametrize("kind", ["music-linear", "music-convolution", "music-transformer"])
def test_targets_are_met_on_the_published_networks_shapes(real, kind):
    parts = {name: network for name, network in real.items() if "predictor" not in name}
    whole = assembled("mustango", {**parts, "tokenizer": tiny_t5()[1]}, {}, 1024, "")
    for place, places in (("after_layer", 16), ("after_block", 7)):
        for target in (2_000_000, 8_000_000, 20_000_000, 40_000_000, 70_000_000):
            method = method_from({"kind": kind, "placement": place, "target_parameters": target})
            shapes = {name: site.shape for name, site in method.sites(whole).items()}
            assert len(shapes) == places
            widths = method.bottlenecks(shapes)
            total = sum(method.size(shapes[site].weight[0], width, True) for site, width in widths.items())
            assert abs(total - target) <= 0.02 * target


def test_tiny_is_built_from_its_seed_alone():
    state = torch.get_rng_state()
    started = time.process_time()
    one, again, other = Mustango.tiny(0), Mustango.tiny(0), Mustango.tiny(1)
    assert time.process_time() - started < 4
    assert torch.equal(torch.get_rng_state(), state)
    assert one.identity() == again.identity()
    assert not same_values(one.identity().values, other.identity().values)
    assert "other weights" in other.check(one.identity())
    with pytest.raises(AdapterError, match="depends on the weights"):
        other.check(one.identity(), needs_values=True)


def test_a_base_is_at_rest(base):
    for module in base.modules.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_saved_and_loaded_base_is_the_same(base, tmp_path):
    base.pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    loaded = load_base(tmp_path / "saved")
    assert type(loaded) is Mustango
    assert loaded.check(base.identity(), needs_values=True) == ""
    request = Request([PROMPT], [3], steps=2, seconds=0.2)
    assert torch.equal(loaded.generate(request)[0].wave, base.generate(request)[0].wave)
    test_a_base_is_at_rest(loaded)
    half = load_base(tmp_path / "saved", dtype="bf16")
    assert half.denoiser.dtype == torch.bfloat16
    assert half.pipe.vae.dtype == half.pipe.vocoder.dtype == torch.float32  # what turns latents into sound stays exact
    assert half.generate(request)[0].wave.dtype == torch.float32
    expected = predicted(base)
    assert torch.allclose(predicted(half).float(), expected, atol=0.1 * expected.abs().max().item())
    weights = tmp_path / "saved" / "beat_encoder" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(BaseError, match="no weights"):
        load_base(tmp_path / "saved")


def test_the_small_base_fits_into_four_megabytes_and_plays_without_a_vocoder(tmp_path):
    small = melody_diffusion("a slow fast melody in yaman on a flute with drum".split())
    halves = sum(count(small.modules[part]) for part in ("unet", "vae"))
    whole = sum(count(module) for module in small.modules.values()) - halves
    assert 2 * halves + 4 * whole < 3_900_000  # bytes; the rest is for tokenizer and configurations
    assert len(small.pipe.tokenizer("a slow melody in yaman").input_ids) == 6  # a word a token, and the end
    sound = small.generate(Request(["a slow melody | chords: Am"], [0], steps=1, seconds=0.5))[0]
    assert sound.wave.shape == (1, 4000)
    assert small.pipe.vocoder is None
