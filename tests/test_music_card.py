"""How an adapter of music is measured, and what is drawn of sounds: against sounds and lines whose truth is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from studio.bases.musicgen import MusicGen
from studio.bases.registry import load_base
from studio.cli import run as studio
from studio.data.melodies.fields import Fields, misspelt_mode, mode_in
from studio.data.melodies.folder import Pieces, write_folder
from studio.data.melodies.modes import RAGAS
from studio.data.melodies.source import draw_melody
from studio.data.sounds import Sound
from studio.errors import DataError, MissingPart
from studio.evaluate.clap import Clap, clap_figures
from studio.evaluate.frechet import embed, frechet, frechet_of, spread_of
from studio.evaluate.lines import direction_kept, likeliest_tonic, notes_of, ornament_distance
from studio.evaluate.music_card import figures_of
from studio.evaluate.pitch import PitchTrack
from studio.evaluate.recital import Asked, Played, Playing, Recital, Recording, fields_in, read_recordings
from studio.sound_pictures import pitch_histogram, spectrogram
from studio.waves import HEAT, LOWEST_HZ

RATE = 12_000


def line(cents, tonic_hz=220.0, frames=20):
    """A pitch track that rests on each of these pitches for a while."""
    hz = tonic_hz * 2 ** (np.repeat(np.asarray(cents, float), frames) / 1200)
    return PitchTrack(np.arange(len(hz)) * 0.01, hz, np.ones(len(hz)))


def pieces(mode, tradition, instrument, count, name="card", key=""):
    found = []
    for number in range(count):
        fields = Fields(tradition, instrument, mode, "", "", key)
        drawn = Fields(tradition, instrument, mode, {"western": "steady"}.get(tradition, "Dadra"), "", key)
        drawn = drawn if tradition != "makam" else Fields(tradition, instrument, mode, "Sofyan")
        melody = draw_melody((name, number), 6.0, RATE, (tradition,), fields=drawn, stem=True)
        found.append(Recording(melody.caption, fields, sound=Sound(melody.wave, RATE)))
    return found


# -- the measures ------------------------------------------------------------------------------------------------


def test_the_frechet_distance_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    one = rng.standard_normal((4000, 3))
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    moved = 2 * rng.standard_normal((4000, 3)) + np.array([3.0, 0, 0])
    assert frechet(one, moved) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.06)
    assert frechet(one, moved) == pytest.approx(frechet(moved, one))
    assert np.isnan(frechet(one[:1], one))


def test_pieces_of_one_instrument_are_nearer_to_each_other_than_to_another_s():
    sets = [
        [embed(r.sound.wave[0].numpy(), RATE) for r in pieces("Saba", "makam", who, 6, name)]
        for who, name in (("ney", "a"), ("ney", "b"), ("oud", "c"))
    ]
    floor, other = frechet_of(sets[0], sets[1]), frechet_of(sets[0], sets[2])
    assert floor < 0.5 * other
    assert spread_of(sets[0]) < spread_of([sets[0][0], sets[2][0]])


def test_a_line_becomes_the_notes_it_rests_on():
    track = line([0, 204, 204, 386, 300, 1200, 0])
    assert notes_of(track, RAGAS["Yaman"].degrees, 220.0) == pytest.approx([0, 203.91, 386.31, 1200, 0])
    assert likeliest_tonic(track, RAGAS["Yaman"].degrees) == 220.0


def test_a_degree_played_in_the_wrong_direction_breaks_the_rule():
    yaman = RAGAS["Yaman"]  # no fifth rising
    rising, falling = [590.22, 701.96, 884.36], [884.36, 701.96, 590.22]
    assert direction_kept(rising, yaman) == 0.5
    assert direction_kept(falling, yaman) == 1.0
    assert np.isnan(direction_kept([0.0], yaman))


def test_glides_and_shakes_tell_lines_apart_that_plain_notes_do_not():
    plain, other = line([0, 200, 400]), line([700, 0, 500])
    shaken = line([0, 200, 400])
    shaken = PitchTrack(shaken.seconds, shaken.hz * 2 ** (0.1 * np.sin(shaken.seconds * 30)), shaken.level)
    assert ornament_distance([plain], [other]) < 0.05
    assert ornament_distance([plain], [shaken]) > 0.5


def test_true_pieces_of_a_mode_score_high_and_others_low():
    truth, floor, others = (pieces("Hicaz", "makam", "ney", 5, name) for name in ("a", "b", "c"))
    wrong = pieces("Rast", "makam", "violin", 5, "d")
    known = [Asked("a tune in D major on a flute", Fields("western", "flute", "major", "steady", "", "D"))]
    in_key = [r.sound for r in pieces("major", "western", "flute", 1, "e", "D")]
    out_of_key = [r.sound for r in pieces("major", "western", "flute", 1, "e", "A flat")]
    worn, alone = Played([r.sound for r in others], in_key), Played([r.sound for r in wrong], out_of_key)
    found = figures_of(Recital(truth, floor, known, worn, alone), load_base("melody"))
    assert found["mode_right"] > 0.5 > found["mode_right_base"]
    assert found["in_scale"] > max(0.85, found["in_scale_base"])
    assert found["mode_margin"] > 0 > found["mode_margin_base"]
    assert found["mode_likelihood"] > found["mode_likelihood_base"]
    assert found["direction"] > 0.95
    assert found["instrument_right"] > found["instrument_right_base"]
    assert found["frechet"] < found["frechet_base"]
    assert found["known_in_scale"] > 0.9 > found["known_in_scale_base"] + 0.3
    assert found["in_scale_references"] > 0.85


def test_of_other_recordings_captions_tell_the_mode_and_the_beats():
    """Without a tonic: the one under which a line fits best, of every mode its own."""
    told = [
        replace(r, fields=None, caption=f"{r.caption} | beats: 120 bpm 4/4") for r in pieces("Saba", "makam", "ney", 5)
    ]
    wrong = [r.sound for r in pieces("Rast", "makam", "ney", 5, "d")]
    worn, alone = Played([r.sound for r in told], []), Played(wrong, [])
    found = figures_of(Recital(told, told, [], worn, alone), MusicGen.tiny())
    assert found["mode_right"] > 0.5 > found["mode_right_base"]
    assert found["in_scale"] > max(0.85, found["in_scale_base"])
    assert 0 < found["beats_met"] < 1
    assert np.isnan(found["instrument_right"])
    clicks = torch.zeros(1, 6 * RATE)
    clicks[0, torch.arange(0, 6 * RATE, RATE // 2)[:, None] + torch.arange(60)] = 0.5
    exact = Played([Sound(clicks, RATE)] * 5, [])
    assert figures_of(Recital(told, told, [], exact, exact), MusicGen.tiny())["beats_met"] > 0.9


def test_silence_fails_what_is_asked_and_breaks_nothing():
    truth = pieces("Hicaz", "makam", "ney", 4)
    silent = Played([Sound(torch.zeros(1, 4 * RATE), RATE) for _ in truth], [])
    found = figures_of(Recital(truth, truth, [], silent, silent), load_base("melody"))
    assert found["in_scale"] == found["mode_right"] == 0
    assert np.isnan(found["known_in_scale"])


# -- recordings and the command ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_folder(Pieces(tmp_path / "hicaz", 6, 1.0, 4000, mode="hicaz", stems=True))
    return tmp_path / "hicaz"


def test_recordings_know_what_they_are_by_their_files(folder):
    found = read_recordings(folder, MusicGen.tiny(), Playing(2, 1.0), "{trigger}", ("x", ""))
    assert len(found) == 4
    assert all(r.fields is not None and r.fields.mode == "Hicaz" and r.fields.tradition == "makam" for r in found)
    assert all("makam hicaz" in r.caption and r.caption.endswith("solo") for r in found)
    assert fields_in({}) is None
    assert fields_in({"makam": "Aksak", "instrument": "oud"}) is None
    (folder.parent / "few").mkdir()
    with pytest.raises(DataError, match="0 sounds"):
        read_recordings(folder.parent / "few", MusicGen.tiny(), Playing(), "x", ("", ""))


def test_an_adapter_of_music_gets_its_card_from_one_command(folder, tmp_path, capsys):
    MusicGen.tiny().pipe.save_pretrained(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tmp_path / 'base'}\nmethod: {{kind: music-linear, bottleneck: 4}}\nsteps: 2\n"
        f"data: {{path: {folder}, seconds: 1, validation: 2}}\nlearning_rate: 1.0\n"
    )
    assert studio(["train", "--preset", str(recipe), "--run", str(tmp_path / "run"), "--name", "tune"]) == 0
    capsys.readouterr()
    asked = ["evaluate", "tune", "--sounds", "2", "--seconds", "1", "--out", str(tmp_path / "card"), "--json"]
    assert studio(asked) == 0
    card = json.loads(capsys.readouterr().out)
    figures = card["figures"]
    assert {"in_scale", "in_scale_base", "in_scale_references", "held_out_loss", "frechet"} <= set(figures)
    assert figures["held_out_loss"] != figures["held_out_loss_base"]
    assert card["medium"] == "audio"
    page = (tmp_path / "card" / "card.html").read_text()
    assert page.count("<audio") == 2 * 3
    assert str(tmp_path) not in page
    assert len(list((tmp_path / "card").glob("*/*.wav"))) == 4
    assert studio(["evaluate", "tune", "--references", str(tmp_path / "card" / "base")]) == 2
    # Another that was trained on all there is: nothing is held out then, and a table of both has a gap.
    again = ["train", "--preset", str(recipe), "--set", "data.validation=0", "--run", str(tmp_path / "more")]
    assert studio([*again, "--name", "again"]) == 0
    capsys.readouterr()
    assert studio(["evaluate", "tune", "again", *asked[2:-1]]) == 0
    told = capsys.readouterr()
    assert "no held_out_loss" in told.err + told.out
    assert "held_out_loss" not in json.loads((tmp_path / "card" / "again" / "card.json").read_text())["figures"]


# -- pictures ------------------------------------------------------------------------------------------------------


def test_a_spectrogram_is_brightest_where_the_tone_is():
    time = np.arange(2 * RATE) / RATE
    picture = np.asarray(spectrogram(np.sin(2 * np.pi * 600 * time), RATE)).astype(int)
    inside = picture[10:-26, 60:-20].sum(2).mean(1)
    height = len(inside)
    expected = height * (1 - np.log(600 / LOWEST_HZ) / np.log(RATE / 2 / LOWEST_HZ))
    assert abs(int(inside.argmax()) - expected) < 4
    assert picture[10:-26, 60:-20].sum(2).max() == pytest.approx(sum(HEAT[-1][1]), abs=3)


@pytest.mark.parametrize("samples", [0, 1, 700])
def test_very_short_sounds_have_pictures(samples):
    wave = np.zeros(samples, np.float32)
    assert spectrogram(wave, RATE).size == (720, 220)
    assert pitch_histogram(wave, RATE, RAGAS["Yaman"]).size == (720, 220)


def test_a_mode_is_known_in_any_spelling_and_a_misspelt_one_is_told():
    assert mode_in("a slow Ussak taksim on a ney").name == "Uşşak"
    assert mode_in("a tune in d Minor").name == "minor"
    assert mode_in("makam nihavend").name == "Buselik"
    assert mode_in("a drum") is None
    assert misspelt_mode("a slow makam hicazz") == "'hicazz', perhaps for 'Hicaz'"
    assert misspelt_mode("raga yaman on a sitar") == misspelt_mode("raga hamsadhwani") == misspelt_mode("a raga") == ""


# -- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"raga": "Yaman", "instrument": "sitar", "tala": "Teental"}, "raga yaman on a sitar in teental"),
        ({"raga": "Yamn"}, "did you mean 'Yaman'"),
        ({"makam": "Düyek"}, "perhaps the fields 'makam' and 'usul' are swapped"),
    ],
)
def test_fields_of_recordings_are_checked_and_put_into_words(row, said, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(2000) / 3).astype("float32") / 2, 1600)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", **row}, ensure_ascii=False))
    from studio.data.recordings import scan_recordings
    from studio.preset import Data

    if said.startswith("raga"):
        assert scan_recordings(tmp_path, Data(), {"trigger": "x", "class": ""}).pieces[0].caption == said
        return
    with pytest.raises(DataError, match=r"metadata.jsonl', line 1") as caught:
        scan_recordings(tmp_path, Data(), {"trigger": "x", "class": ""})
    assert said in caught.value.hint


# -- CLAP ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    """A pico CLAP of the real classes, with its tokenizer and its ear."""
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        ClapTextConfig,
        RobertaTokenizer,
    )

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    tokenizer = RobertaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    text = ClapTextConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=96, projection_dim=12, pad_token_id=1,
    )  # fmt: skip
    audio = ClapAudioConfig(
        hidden_size=32, patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], spec_size=64,
        num_mel_bins=16, window_size=4, projection_dim=12, patch_size=4, patch_stride=[4, 4], num_hidden_layers=2,
    )  # fmt: skip
    ear = ClapFeatureExtractor(
        feature_size=16, sampling_rate=4000, hop_length=80, max_length_s=1, fft_window_size=256, frequency_max=2000,
        truncation="rand_trunc",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    config = ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12)
    ClapModel(config).save_pretrained(folder)
    ClapProcessor(ear, tokenizer).save_pretrained(folder)
    return folder


def test_clap_gives_the_cosines_that_transformers_own_forward_gives(clap_folder):
    clap = Clap(clap_folder)
    sounds = [Sound(torch.sin(torch.arange(4000) / n)[None], 4000) for n in (3, 7)]
    heard = clap.processor.feature_extractor(
        [sound.wave[0].numpy() for sound in sounds], sampling_rate=4000, return_tensors="pt"
    )
    said = clap.processor.tokenizer(["a flute", "an oud"], padding=True, return_tensors="pt")
    with torch.no_grad():
        told = clap.model(input_ids=said.input_ids, attention_mask=said.attention_mask, **heard)
    own = clap.hear(sounds) @ clap.read(["a flute", "an oud"]).T
    torch.testing.assert_close(own, told.logits_per_audio / clap.model.logit_scale_a.exp(), rtol=1e-4, atol=1e-5)
    truth = [Recording("a flute", sound=sound) for sound in sounds]
    played = Played(sounds, [])
    figures = clap_figures(clap_folder, Recital(truth, truth, [], played, played))
    assert figures["clap_text"] == pytest.approx(figures["clap_text_references"], abs=1e-4)
    assert figures["clap_frechet"] == pytest.approx(0, abs=1e-6)


def test_a_folder_without_clap_is_told(tmp_path):
    with pytest.raises(MissingPart, match="cannot be loaded as CLAP"):
        Clap(tmp_path)
