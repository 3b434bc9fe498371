"""The melody world: scales as the theory has them, pieces that keep to them, captions that tell the truth."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from studio.data.cache import Cache
from studio.data.melodies.__main__ import main as write_melodies
from studio.data.melodies.composing import compose, tonic_of
from studio.data.melodies.cycles import TALAS, USULS
from studio.data.melodies.fields import PLAYED_KEYS, Fields, caption_of, check_fields, draw_fields, fold, vocabulary
from studio.data.melodies.modes import COMMA, MAKAMS, MODES, PERFORMED, RAGAS, SWARAS, TRADITIONS
from studio.data.melodies.playing import pitch_of, play
from studio.data.melodies.pool import MelodyPool
from studio.data.melodies.source import draw_melody
from studio.data.melodies.voices import PLAYED, VOICES
from studio.data.recordings import scan_recordings
from studio.errors import DataError
from studio.evaluate.pitch import track_pitch
from studio.keyed import numpy_generator
from studio.preset import Data

RATE = 12_000
STEPS_OF_MAKAMS = {  # in commas, from the literature
    "Rast": "9 8 5 9 9 8 5",
    "Uşşak": "8 5 9 9 4 9 9",
    "Hüseyni": "8 5 9 9 8 5 9",
    "Hicaz": "5 12 5 9 4 9 9",
    "Uzzal": "5 12 5 9 8 5 9",
    "Zirgüleli": "5 12 5 9 5 12 5",
    "Buselik": "9 4 9 9 4 9 9",
    "Kürdi": "4 9 9 9 4 9 9",
    "Segâh": "5 9 8 9 5 13 4",
    "Karcığar": "8 5 9 5 12 5 9",
    "Nikriz": "9 5 12 5 9 8 5",
    "Saba": "8 5 5 13 4 9 9",
}


def drawn(number, tradition="western", seconds=4.0, **how):
    return draw_melody(("test", number), seconds, RATE, (tradition,), **how)


# -- scales ------------------------------------------------------------------------------------------------------


def test_swaras_are_the_ratios_of_small_numbers():
    ratios = {"r": 16 / 15, "R": 9 / 8, "g": 6 / 5, "G": 5 / 4, "m": 4 / 3, "M": 45 / 32}
    ratios |= {"P": 3 / 2, "d": 8 / 5, "D": 5 / 3, "n": 9 / 5, "N": 15 / 8}
    for swara, ratio in ratios.items():
        assert SWARAS[swara] == pytest.approx(1200 * np.log2(ratio), abs=0.01)


@pytest.mark.parametrize("name", MAKAMS)
def test_every_makam_divides_the_octave_into_its_steps(name):
    places = [*MAKAMS[name].up, 1200.0]
    assert [round(step / COMMA) for step in np.diff(places)] == list(map(int, STEPS_OF_MAKAMS[name].split()))
    assert sum(map(int, STEPS_OF_MAKAMS[name].split())) == 53


def test_played_makams_differ_from_theory_by_less_than_two_commas_and_some_do():
    moved = {name for name in MAKAMS if PERFORMED[name].up != MAKAMS[name].up}
    assert {"Uşşak", "Hicaz"} <= moved
    assert {"Rast", "Buselik"}.isdisjoint(moved)
    for name in moved:
        assert max(np.abs(np.subtract(PERFORMED[name].up, MAKAMS[name].up))) < 2 * COMMA


def test_cycles_have_the_lengths_they_are_known_for():
    lengths = {name: cycle.beats for name, cycle in {**USULS, **TALAS}.items()}
    known = {"Sofyan": 4, "Düyek": 8, "Aksak": 9, "Curcuna": 10, "Semai": 3, "Yürük Semai": 6, "Devr-i Hindi": 7}
    known |= {"Türk Aksağı": 5, "Teental": 16, "Jhaptal": 10, "Ektal": 12, "Rupak": 7, "Keherwa": 8, "Dadra": 6}
    assert lengths == known


# -- pieces ------------------------------------------------------------------------------------------------------


def test_a_key_gives_the_same_piece_and_another_key_another():
    one, again, other = drawn(1, "raga"), drawn(1, "raga"), drawn(2, "raga")
    assert one.wave.equal(again.wave)
    assert one.caption == again.caption
    assert not one.wave.equal(other.wave)


def test_a_stem_has_the_same_line_and_nothing_else():
    whole, stem = drawn(3, "raga"), drawn(3, "raga", stem=True)
    assert whole.score == stem.score
    assert not whole.wave.equal(stem.wave)
    lines = np.corrcoef(whole.wave[0], stem.wave[0])[0, 1]
    assert 0.5 < lines < 0.999


@pytest.mark.parametrize("tradition", TRADITIONS)
def test_every_note_is_a_degree_of_the_mode(tradition):
    for number in range(12):
        score = drawn(number, tradition, 3.0).score
        for note in score.notes:
            assert min(abs((note.cents - d + 600) % 1200 - 600) for d in score.mode.degrees) < 1e-6


def test_a_rising_line_leaves_out_what_only_falling_lines_have():
    fields = Fields("raga", "sitar", "Bhimpalasi", "Teental", "fast")
    forbidden = {SWARAS["R"], SWARAS["D"]}
    reached_down = set()
    for number in range(20):
        notes = compose(fields, numpy_generator("rule", number), 8.0).notes
        for before, after in pairwise(notes[:-1]):
            degree = round(after.cents % 1200, 2)
            if degree in forbidden and before.cents != after.cents:
                assert after.cents < before.cents
                reached_down.add(degree)
    assert reached_down == forbidden


@pytest.mark.parametrize("name", sorted(VOICES))
def test_an_instrument_sounds_at_the_pitch_of_its_notes(name):
    tradition = next(t for t in TRADITIONS if name in PLAYED[t])
    mode, cycle = next(iter(MODES[tradition])), {"western": "steady", "raga": "Dadra", "makam": "Sofyan"}[tradition]
    score = compose(Fields(tradition, name, mode, cycle, "slow", "C" * (tradition == "western")), _rng(), 3.0)
    note = max(score.notes, key=lambda n: n.seconds * (n.glide_from is None) * (n.shake_hz == 0))
    alone = type(score)(score.fields, score.mode, score.tonic_hz, 60.0, (note,), (), 3.0)
    track = track_pitch(play(alone, _rng(), RATE, stem=True), RATE)
    meant = float(np.median(pitch_of(note, score.tonic_hz, 100)))
    heard = track.hz[(track.seconds > note.start + 0.1) & (track.seconds < note.start + note.seconds)]
    assert abs(1200 * np.log2(np.nanmedian(heard) / meant)) < 3


def _rng():
    return numpy_generator("fixed")


def test_a_key_is_the_concert_pitch_of_its_tonic():
    for instrument in PLAYED["western"]:
        tonic = tonic_of(Fields("western", instrument, "major", "steady", "", "A"))
        octaves = np.log2(tonic / 440)
        assert octaves == pytest.approx(round(octaves), abs=1e-9)
        assert 0.99 <= tonic / VOICES[instrument].tonic_hz < 2


def test_ragas_and_makams_stand_on_what_the_instrument_is_tuned_to():
    for tradition in ("raga", "makam"):
        for number in range(6):
            score = draw_melody(("tonic", number), 0.5, RATE, (tradition,), stem=True).score
            assert score.tonic_hz == VOICES[score.fields.instrument].tonic_hz


def test_western_pieces_are_in_the_keys_that_the_world_plays_in():
    drawn = {draw_fields(numpy_generator("keys", i), ("western",)).key for i in range(80)}
    assert drawn == set(PLAYED_KEYS)


def test_kinds_of_pieces_are_drawn_in_given_modes_and_of_a_side_of_the_split_or_refused():
    modes = frozenset({"minor", "Bhupali", "Bhimpalasi"})
    drawn = [draw_fields(numpy_generator("modes", i), TRADITIONS, modes=modes) for i in range(80)]
    assert {fields.mode for fields in drawn} == modes
    assert (
        20 < sum(fields.tradition == "raga" for fields in drawn) < 60
    )  # a tradition is not rarer for having few modes
    assert draw_fields(_rng(), ("raga",), True, modes) == draw_fields(_rng(), ("raga", "makam"), True, modes)
    with pytest.raises(DataError, match="no makam piece in Rast is held out"):
        draw_fields(_rng(), ("makam",), True, frozenset({"Rast"}))


def test_tempo_words_mean_beats():
    def tempo(word):
        return compose(Fields("western", "piano", "major", "steady", word, "C"), _rng(), 2.0).beats_per_minute

    assert tempo("slow") < 75 < tempo("") < 120 < tempo("fast")


def test_training_never_has_the_held_out_combinations_and_there_are_some():
    shown = {drawn(i, "makam", 0.5).score.fields for i in range(40)}
    hidden = {drawn(i, "makam", 0.5, held_out=True).score.fields for i in range(10)}
    assert not any(fields.is_held_out for fields in shown)
    assert all(fields.is_held_out for fields in hidden)


def test_a_pool_holds_the_same_at_a_step_however_it_came_there():
    def pool():
        draw = lambda key: (drawn(("pool", *key), "western", 0.5).wave, str(key))  # noqa: E731
        return MelodyPool(draw, lambda waves: waves, 4, 1, 0)

    walked, jumped = pool(), pool()
    for step in range(4):
        at_last = walked.batch(step, 0, range(3))
    other = jumped.batch(3, 0, range(3))
    assert at_last[0].equal(other[0])
    assert at_last[1] == other[1]


def test_a_pool_finds_its_first_filling_on_disk_again(tmp_path):
    made = []

    def pool(source="a"):
        def draw(key):
            made.append(key)
            return drawn(("pool", *key), "western", 0.5).wave, f"şarkı {key}"

        found = MelodyPool(draw, lambda waves: waves, 20, 1, 0, Cache(tmp_path), source)
        assert list(found.fill()) == [0, 16]
        return found

    first = pool().batch(0, 0, range(5))
    assert len(made) == 20
    again = pool()
    assert again.batch(0, 0, range(5))[1] == first[1]
    assert again.batch(0, 0, range(5))[0].equal(first[0])
    assert len(made) == 20
    walked, jumped = again.batch(3, 0, range(5)), pool().batch(3, 0, range(5))
    assert len(made) == 20 + 3 + 3  # what is renewed is drawn
    assert walked[1] == jumped[1]
    assert walked[0].equal(jumped[0])
    pool("b")
    assert len(made) == 26 + 20  # of something else


# -- captions ----------------------------------------------------------------------------------------------------


def test_every_word_of_a_caption_is_one_token():
    from studio.bases.melody import melody_tokenizer

    tokenizer = melody_tokenizer(vocabulary())
    rng = _rng()
    for number in range(60):
        caption = caption_of(draw_fields(rng, TRADITIONS), rng)
        for text in (caption, " ".join(map(str.capitalize, caption.split()))):
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text, number
            assert len(tokenizer(text).input_ids) == len(text.split()) + 1
    assert len(tokenizer("zither").input_ids) > 2  # other words fall apart into letters


def test_a_caption_tells_mode_and_instrument():
    rng = _rng()
    for _ in range(60):
        fields = draw_fields(rng, TRADITIONS)
        told = fold(caption_of(fields, rng))
        assert fold(fields.mode) in told
        assert fold(VOICES[fields.instrument].phrase) in told
        assert fold(fields.key) in told


@pytest.mark.parametrize(
    ("told", "message", "hint"),
    [
        ({"makam": "Düyek"}, "name of a usul", "swapped"),
        ({"usul": "hicaz"}, "name of a makam", "swapped"),
        ({"raga": "Teental"}, "name of a tala", "swapped"),
        ({"raga": "Yamann"}, "unknown raga", "Yaman"),
        ({"makam": "Hicazz"}, "unknown makam", "Hicaz"),
        ({"makan": "Hicaz"}, "unknown field", "makam"),
    ],
)
def test_a_wrong_field_is_refused_naming_where_and_what_was_meant(told, message, hint):
    with pytest.raises(DataError) as caught:
        check_fields(told, "metadata.jsonl, line 3")
    assert caught.value.message.startswith("metadata.jsonl, line 3: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_names_are_known_without_accents_and_by_their_other_names():
    assert check_fields({"makam": "ussak", "usul": "turk-aksagi"}) == {"makam": "Uşşak", "usul": "Türk Aksağı"}
    assert check_fields({"makam": "Nihâvend", "raga": "TODI"}) == {"makam": "Buselik", "raga": "Todi"}


def test_the_facts_of_any_piece_are_fields_that_hold():
    rng = _rng()
    for _ in range(40):
        facts = draw_fields(rng, TRADITIONS).facts()
        assert check_fields(facts) == facts


# -- as a folder -------------------------------------------------------------------------------------------------


def test_pieces_are_written_as_recordings_that_training_reads(tmp_path):
    out = tmp_path / "yaman"
    asked = ["--out", str(out), "--count", "3", "--seconds", "1", "--mode", "yaman"]
    assert write_melodies(asked) == 0
    found = scan_recordings(out, Data(seconds=1), {"trigger": "", "class": ""})
    assert found.count == 3
    assert all("yaman" in piece.caption for piece in found.pieces)
    assert not found.report.dropped
    assert len(RAGAS) == 10


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--mode", "Yamann"], "Yaman"),
        (["--instrument", "flut"], "flute"),
        (["--instrument", "piano", "--tradition", "raga"], "leave"),
        (["--count", "0"], "at least 1"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_plainly(arguments, hint, tmp_path, capsys):
    assert write_melodies(["--out", str(tmp_path / "new"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert hint in told


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    Path(tmp_path / "mine.wav").write_bytes(b"mine")
    assert write_melodies(["--out", str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine.wav"]


def test_a_folder_broken_off_is_not_there(tmp_path, monkeypatch, capsys):
    asked = ["--out", str(tmp_path / "a" / "new"), "--count", "3", "--seconds", "1"]
    drawn = iter(range(3))

    def broken_off(*args, **kwargs):
        if next(drawn) == 2:
            raise KeyboardInterrupt
        return draw_melody(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("studio.data.melodies.folder.draw_melody", broken_off)
        assert write_melodies(asked) == 130
    assert list((tmp_path / "a").iterdir()) == []
    assert "broken off" in capsys.readouterr().err
    assert write_melodies(asked) == 0
    assert len(list((tmp_path / "a" / "new").iterdir())) == 4


@pytest.mark.parametrize(("out", "code"), [("taken", 2), ("taken/new", 1)])
def test_a_file_in_the_way_of_a_folder_is_told(out, code, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert write_melodies(["--out", str(tmp_path / out), "--count", "1", "--seconds", "1"]) == code
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert out in told
    assert (tmp_path / "taken").read_text() == "mine"
