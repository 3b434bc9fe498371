"""The bundled bases of music: small enough to travel along, able to play, and true to the pitch of lines."""

import pytest
import torch

from studio.base import Request
from studio.bases.registry import bundled, load_base
from studio.cli import run as studio
from studio.evaluate.melody_card import measure_codec

OTHERWISE = {"melody": {}, "melody-diffusion": {"steps": 2}}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_bundled_base_of_music_is_at_most_four_megabytes(name):
    sizes = [path.stat().st_size for path in bundled()[name].rglob("*") if path.is_file()]
    assert 1_000_000 < sum(sizes) <= 4_000_000


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_bundled_base_of_music_plays_a_second(name):
    base = load_base(name)
    prompt = "a slow melody in d minor on a flute"
    sound = base.generate(Request([prompt], [0], seconds=1.0, **OTHERWISE[name]))[0]
    assert sound.sample_rate_hz == base.sample_rate_hz
    assert sound.wave.shape == (1, base.sample_rate_hz)
    assert torch.isfinite(sound.wave).all()
    assert float(sound.wave.std()) > 0.05


@pytest.mark.parametrize("name", OTHERWISE)
def test_capitals_are_read_as_words(name):
    base = load_base(name)
    read = base.pipe.encode_text if name == "melody-diffusion" else base.encode_prompts
    capital, small = (read([text])["text"] for text in ("A slow Raga Yaman on a Sitar", "a slow raga yaman on a sitar"))
    assert capital.shape == small.shape
    assert torch.equal(capital, small) == (name == "melody-diffusion")  # the other has words of its own for them


@pytest.mark.parametrize("name", OTHERWISE)
def test_words_that_a_base_has_not_learned_are_told(name, tmp_path, capsys):
    steps = ["--steps", "2"] if name == "melody-diffusion" else []
    asked = ["--base", name, *steps, "--seconds", "0.5", "--out", str(tmp_path / "a.wav")]
    assert studio(["generate", "a slow raga yamn on a banjo, in teental", *asked]) == 0
    assert f"'{name}' has not learned 'yamn' (yaman?), 'banjo'" in " ".join(capsys.readouterr().err.split())
    assert studio(["generate", "A calm melody in C sharp major on a flute.", *asked, "--force"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert studio(["generate", "a calm melody | beats: 90 bpm", *asked, "--force"]) == 0
    deaf = name == "melody"  # to which beats are words
    assert ("has not learned 'beats', '90', 'bpm'" in " ".join(capsys.readouterr().err.split())) == deaf


def test_the_codec_of_melody_keeps_lines_and_their_pitch():
    kept = measure_codec(load_base("melody"), pieces=12)
    assert kept["all"]["voiced_kept"] >= 0.93
    assert kept["all"]["median_cents"] < 5
    assert all(book["perplexity"] > 64 for book in kept["codebooks"])  # of 256 codes: none collapsed
