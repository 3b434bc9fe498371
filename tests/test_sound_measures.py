"""What measures music: pitch, scales, tempo and timbre, against sounds whose truth is known."""

import numpy as np
import pytest

from studio.data.melodies.cycles import USULS
from studio.data.melodies.modes import MAKAMS, MODES, RAGAS
from studio.data.melodies.source import draw_melody
from studio.evaluate.beats import cycle_correlation, estimate_tempo, f_measure, onset_envelope, onsets
from studio.evaluate.lines import mode_likelihood, moves_a_second, weights_of
from studio.evaluate.pitch import compare_pitch, track_pitch
from studio.evaluate.scales import in_scale_share, log_likelihood
from studio.evaluate.timbre import TimbreJudge, timbre_features

RATE = 12_000


def tone(hz, seconds=0.5, partials=5):
    time = np.arange(round(seconds * RATE)) / RATE
    kept = [n for n in range(1, partials + 1) if n * hz < 0.45 * RATE]
    return sum(np.sin(2 * np.pi * n * hz * time) / n for n in kept)


def clicks(times, seconds):
    rng = np.random.default_rng(0)
    wave = 1e-3 * rng.standard_normal(round(seconds * RATE))
    for at in times:
        first = round(at * RATE)
        room = wave[first : first + 600]
        room += (rng.standard_normal(600) * np.exp(-np.arange(600) / 150))[: len(room)]
    return wave


# -- pitch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hz", [41.2, 110.0, 261.63, 440.0, 987.77, 1760.0])
@pytest.mark.parametrize("partials", [1, 5])
def test_the_pitch_of_a_tone_is_found_within_a_cent(hz, partials):
    track = track_pitch(tone(hz, partials=partials), RATE)
    assert track.voiced.all()
    assert np.abs(1200 * np.log2(track.hz / hz)).max() < 1


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert track_pitch(noise, RATE).voiced.mean() < 0.02
    assert not track_pitch(np.zeros(RATE), RATE).voiced.any()
    assert len(track_pitch(np.zeros(10), RATE).hz) == 0


def test_a_glide_is_followed():
    time = np.arange(RATE) / RATE
    hz = 200 * 2**time
    track = track_pitch(np.sin(2 * np.pi * np.cumsum(hz) / RATE), RATE)
    errors = 1200 * np.log2(track.hz / (200 * 2 ** (track.seconds - 0.5 / 36)))
    assert np.abs(errors - np.median(errors)).max() < 10


def test_a_line_equals_itself_and_is_a_semitone_from_its_transposition():
    low, high = track_pitch(tone(220.0), RATE), track_pitch(tone(220.0 * 2 ** (1 / 12)), RATE)
    assert compare_pitch(low, low) == {"voiced_kept": 1.0, "median_cents": 0.0, "within_25_cents": 1.0}
    moved = compare_pitch(high, low)
    assert moved["median_cents"] == pytest.approx(100, abs=0.5)
    assert moved["within_25_cents"] == 0
    assert compare_pitch(track_pitch(np.zeros(RATE // 2), RATE), low)["voiced_kept"] == 0


# -- scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [0, 1, 4])
def test_moves_of_a_line_are_counted_through_noise_and_vibrato_is_none(moves):
    at = np.arange(5 * RATE) / RATE
    turns = np.floor(at * moves) % 2
    cents = 300 * turns + 20 * np.sin(2 * np.pi * 5 * at)
    wave = np.sin(2 * np.pi * np.cumsum(220 * 2 ** (cents / 1200)) / RATE)
    noisy = wave + 0.01 * np.random.default_rng(0).standard_normal(len(wave))
    assert moves_a_second(track_pitch(noisy, RATE)) == pytest.approx(moves, abs=0.3)
    assert moves_a_second(track_pitch(noisy[:10], RATE)) == 0


def test_a_line_on_its_degrees_is_in_its_scale_and_one_between_them_is_not():
    degrees = MODES["western"]["major"].degrees
    assert in_scale_share(np.array(degrees) + 2400, degrees) == 1
    assert in_scale_share(np.array([100.0, 300.0, 600.0]) - 1200, degrees) == 0
    assert np.isnan(in_scale_share(np.empty(0), degrees))
    assert np.isnan(log_likelihood(np.empty(0), degrees))


@pytest.mark.parametrize("modes", [RAGAS, MAKAMS], ids=["ragas", "makams"])
def test_a_line_that_dwells_on_a_scale_is_likeliest_in_it(modes):
    rng = np.random.default_rng(0)
    for name, mode in modes.items():
        cents = rng.choice(mode.degrees, 400, p=weights_of(mode)) + 8 * rng.standard_normal(400)
        found = {name: mode_likelihood(cents, mode) for name, mode in modes.items()}
        assert max(found, key=found.get) == name


def test_pieces_are_told_by_their_scales():
    right = 0
    for number in range(6):
        tradition = ("western", "raga", "makam")[number % 3]
        piece = draw_melody(("scales", number), 8.0, RATE, (tradition,), stem=True)
        cents = track_pitch(piece.wave[0].numpy(), RATE).cents(piece.score.tonic_hz)
        found = {name: mode_likelihood(cents, mode) for name, mode in MODES[tradition].items()}
        right += max(found, key=found.get) == piece.score.mode.name
        assert in_scale_share(cents, piece.score.mode.degrees) > 0.7
    assert right >= 5


# -- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tempo", [60, 96, 132, 180])
def test_the_tempo_and_the_beats_of_clicks_are_found(tempo):
    times = np.arange(0.2, 7.5, 60 / tempo)
    envelope = onset_envelope(clicks(times, 8.0), RATE)
    octaves = np.log2(estimate_tempo(envelope) / tempo)  # half and double are easily taken for each other
    assert abs(octaves - round(octaves)) < 0.09
    assert abs(octaves) < 1.1
    assert f_measure(onsets(envelope), times) > 0.95
    assert f_measure(onsets(envelope), times + 30 / tempo, tolerance=0.05) < 0.1


def test_silence_has_no_tempo_and_f_measure_knows_its_ends():
    assert np.isnan(estimate_tempo(onset_envelope(np.zeros(RATE), RATE)))
    assert f_measure([], [1.0]) == 0
    assert f_measure([1.0, 2.0], [1.05, 2.0]) == 1
    assert f_measure([1.0, 1.01], [1.0]) == pytest.approx(2 / 3)


def test_a_cycle_fits_its_own_strokes_best():
    for name in ("Aksak", "Düyek", "Devr-i Hindi"):
        usul = USULS[name]
        beat = 60 / 200
        strokes = [b for b, _ in usul.strokes]
        times = [0.4 + beat * (turn * usul.beats + b) for turn in range(4) for b in strokes]
        envelope = onset_envelope(clicks(times, 4 * usul.beats * beat + 1), RATE)
        fits = {
            other: cycle_correlation(envelope, [b for b, _ in USULS[other].strokes], USULS[other].beats, 200)
            for other in ("Aksak", "Düyek", "Devr-i Hindi")
        }
        assert max(fits, key=fits.__getitem__) == name


# -- timbre ------------------------------------------------------------------------------------------------------


def test_instruments_are_told_apart_on_pieces_the_judge_never_heard():
    drawn = [draw_melody(("judge test", i), 2.0, RATE, ("western",)) for i in range(70)]
    features = np.stack([timbre_features(piece.wave[0].numpy(), RATE) for piece in drawn])
    names = [piece.score.fields.instrument for piece in drawn]
    judge = TimbreJudge.fitted(features[:50], names[:50])
    right = [judge.name(row) == name for row, name in zip(features[50:], names[50:])]
    assert np.mean(right) > 0.75  # one in five by chance
