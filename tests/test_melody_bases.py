"""The bundled bases of music: small enough to travel along, able to play, and true to the pitch of lines."""

import pytest
import torch

from studio.base import Request
from studio.bases.registry import bundled, load_base
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


def test_the_codec_of_melody_keeps_lines_and_their_pitch():
    kept = measure_codec(load_base("melody"), pieces=12)
    assert kept["all"]["voiced_kept"] >= 0.93
    assert kept["all"]["median_cents"] < 5
    assert all(book["perplexity"] > 64 for book in kept["codebooks"])  # of 256 codes: none collapsed
