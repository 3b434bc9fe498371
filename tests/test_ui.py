"""The pages as a browser meets them: forms from schemas, drafts, runs, library, drawing; no torch in the server."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from studio import jobs, library
from studio.data.animations import AnimationSet
from studio.data.pictures import PictureSet
from studio.data.recordings import SoundSet
from studio.drawing import Engine
from studio.errors import AdapterError, PresetError, RequestError, StudioError
from studio.files import write_atomically
from studio.paths import studio_home
from studio.run import Event, Run
from studio.schemas import gather, schemas
from studio.thumbnails import make_thumbnails

pytest.importorskip("gradio", reason="the browser pages need gradio")

from ui import adapters, brought, form, live, order, pieces, settings, works
from ui.blend import trial_of
from ui.draft import Draft, draft_of
from ui.estimate import estimate, remember_check
from ui.order import Order, changed, order_of, request_of, without
from ui.pages import compare, generate, merge, runs, train
from ui.pages import library as library_page
from ui.sweep import sweep_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gathered():
    return gather()


@pytest.fixture(autouse=True)
def known(gathered, monkeypatch):
    """The schemas as this process computes them, so that no test waits for another to do so."""
    for module in (settings, merge, order, adapters):
        monkeypatch.setattr(module, "schemas", lambda: gathered)
    settings.preset_fields.cache_clear()
    settings.method_fields.cache_clear()


@pytest.fixture
def finished_run(home):
    """A run as a training leaves it, with two rows of samples."""
    run = Run(library.runs_dir() / "20261121-000000-cat")
    run.prepare()
    run.append(Event("started", 0, {"steps": 20}))
    for step in (0, 20):
        path = run.samples / f"{step:06d}-0.png"
        Image.new("RGB", (32, 32), "red").save(path)
        run.append(Event("sample", step, {"path": f"samples/{path.name}", "prompt": "a <b>cat</b>", "seed": 1}))
    for step in range(1, 21):
        facts = {"loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0, "samples_per_second": 2.0, "peak_memory_gib": 0.5}
        run.append(Event("step", step, facts))
    run.append(Event("validation", 20, {"loss": 0.25}))
    run.append(Event("finished", 20, {"seconds": 12.0}))
    write_atomically(run.folder / "report.html", "<p>report</p>")
    return run


def adapter_of(base_name, path: Path) -> Path:
    """A real adapter, fresh, of two layers of a base."""
    from studio.adapter import Card, new_adapter
    from studio.bases.registry import load_base

    base = load_base(base_name)
    sites = {name: site.shape for name, site in list(base.select(("attention",)).items())[:2]}
    card = Card(method={"kind": "lora", "rank": 2}, base=base.identity(), sites=sites, trigger="blip", steps=3)
    new_adapter(card).save(path)
    return path


@pytest.fixture
def adapter_file(tiny_base_folder, tmp_path):
    """An adapter of the tiny base, as a file outside the library."""
    return adapter_of(tiny_base_folder, tmp_path / "my cat.safetensors")


class Clicked:
    """What a page's own elements tell the server."""

    def __init__(self, **data):
        self._data = data


# -- forms -------------------------------------------------------------------------------------------------------


def test_every_setting_of_every_preset_survives_the_way_through_the_widgets(gathered):
    for name, content in settings.presets().items():
        assert settings.content_of(name, settings.values_of(content)) == content, name


def test_another_base_changes_what_the_preset_says_and_nothing_else():
    content = settings.presets()["subject"]
    other = settings.values_for_base("subject", "sdxl")
    assert other["batch_size"] == "1"
    assert other["orthogonal:target_modules"] == other["tlora:target_modules"] == "attention"
    assert "seed" not in other
    own = settings.values_for_base("subject", content["base"])
    assert own["batch_size"] == str(content["batch_size"])


def test_yaml_goes_both_ways():
    content = settings.presets()["subject"]
    changed = settings.content_of("subject", settings.values_of(settings.from_yaml(settings.to_yaml(content))))
    assert changed == content


def test_a_form_carries_the_descriptions_and_limits_of_the_schema():
    fields = {field.key: field for field in settings.preset_fields()}
    assert fields["steps"].hint == "Optimizer steps. At least 1."
    assert fields["learning_rate"].hint.endswith("Above 0.")
    assert fields["data.caption_dropout"].limits() == "From 0 to 1."
    assert fields["lr_schedule"].choices == ("constant", "linear", "cosine")
    assert fields["learning_rate"].optional
    assert {"rank", "alpha"} <= {field.key for field in settings.method_fields()["lora"]}


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("steps", "0", "At least 1"),
        ("steps", "many", "whole number"),
        ("learning_rate", "-1", "Above 0"),
        ("learning_rate", "nan", "cannot be nan"),
        ("data.caption_dropout", "1.5", "From 0 to 1"),
        ("steps", "", "empty"),
    ],
)
def test_a_value_out_of_its_limits_is_one_sentence_that_says_them(key, text, words):
    field = next(field for field in settings.preset_fields() if field.key == key)
    with pytest.raises(PresetError) as error:
        form.value_of(field, text)
    assert words in f"{error.value.message} {error.value.hint}"


def test_an_unknown_key_of_a_yaml_names_the_nearest():
    with pytest.raises(PresetError) as error:
        settings.from_yaml("method: {kind: lora, rnak: 3}")
    assert (error.value.message, error.value.hint) == ("unknown key 'rnak'", "did you mean 'rank'?")
    with pytest.raises(PresetError, match="learning_rat"):
        settings.from_yaml("{method: {kind: lora}, learning_rat: 3}")


def test_schemas_are_gathered_by_another_process_and_kept(home, gathered, monkeypatch):
    monkeypatch.setattr("studio.schemas._gather_apart", lambda: gathered)
    first = schemas()
    monkeypatch.setattr("studio.schemas._gather_apart", lambda: pytest.fail("gathered again"))
    monkeypatch.setattr("studio.schemas._kept", {})  # as in another process
    assert schemas() == first == json.loads(json.dumps(gathered))


# -- drafts ------------------------------------------------------------------------------------------------------


def test_a_draft_keeps_pictures_captions_and_form_for_another_tab(pictures, tmp_path):
    draft = draft_of("")
    (tmp_path / "page.html").write_text("x")
    left_out = draft.add([*pictures.iterdir(), tmp_path / "page.html"])
    assert left_out == ["'page.html' is no picture: .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .gif are"]
    draft.set_caption("2.png", "a green one")
    other = draft_of(draft.name)
    assert [other.caption(p) for p in other.pictures()] == [
        "a {trigger} in red", "a {trigger} in blue", "a green one", "",
    ]  # fmt: skip
    assert other.replace_in_captions("{trigger}", "{trigger} thing") == 2
    train.choose_preset(draft.name, Clicked(name="style"))
    train.edit(draft.name, Clicked(name="steps", values={"title": "Tom", "steps": "7"}))
    name, _, _, _, cards, files, shown, *_ = train.restore(draft.name)
    assert name == draft.name
    assert cards.index("aria-pressed='true'") > cards.index("data-click='style'")
    assert "data-edit='caption:2.png'" in files
    assert "value='Tom'" in shown
    assert "value='7'" in shown
    other.remove("0.png")
    assert [path.name for path in draft.pictures()] == ["1.png", "2.png", "3.png"]


@pytest.mark.parametrize("name", ["../../x", "/etc", "a" * 12 + "/..", None, "ABCDEF012345"])
def test_a_draft_of_any_other_name_is_a_new_one(name):
    assert draft_of(name).name != name
    with pytest.raises(RequestError):
        Draft("../x").folder  # noqa: B018
    with pytest.raises(RequestError):
        draft_of("").remove("../../secret.png")


def test_a_start_queues_a_training_on_a_copy_of_the_pictures(pictures, monkeypatch):
    monkeypatch.setattr(jobs, "advance", list)
    draft = draft_of("")
    draft.add(list(pictures.iterdir()))
    press = Clicked(name="start", values={"title": "My cat!", "steps": "7"})
    for _ in range(2):
        list(train.act(draft.name, press))
    one, two = jobs.jobs()
    assert one.run != two.run
    assert one.arguments[one.arguments.index("--name") + 1] == "my-cat"
    order = Path(one.arguments[one.arguments.index("--preset") + 1])
    from studio.preset import make_preset, read_preset

    preset = make_preset(read_preset(str(order)))
    assert preset.steps == 7
    draft.clear()
    assert len(list(Path(preset.data.path).glob("*.png"))) == 4
    assert [state for _, state in live.queue_table()[1]] == ["queued", "queued"]
    live.queue_action(Clicked(name=f"up:{two.id}"))
    assert jobs.jobs()[0].id == two.id
    live.queue_action(Clicked(name=f"cancel:{two.id}"))
    assert [state for _, state in live.queue_table()[1]] == ["queued"]


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_run_shows_its_state_curve_and_samples_and_what_is_unchanged_is_not_sent_again(finished_run):
    name = str(finished_run.folder.resolve())
    head, curve, grid, stop, resume, sample, report, seen = live.show(name, None)
    assert "finished" in head
    assert "20 / 20" in head
    assert "held-out loss" in curve
    assert grid.index("the base") < grid.index("step 20")
    assert "a &lt;b&gt;cat&lt;/b&gt;" in grid
    assert "<b>cat" not in grid
    assert (stop["visible"], resume["visible"], sample["visible"], report["visible"]) == (False, False, False, True)
    assert Path(report["value"]).read_text() == "<p>report</p>"
    again = live.show(name, seen)
    assert again[-1] == seen
    assert all("__type__" in str(part) for part in again[:-1])
    finished_run.append(Event("warning", 20, {"text": "late"}))
    assert "late" in live.show(name, seen)[0]
    assert live.show(name, seen)[2]["__type__"] == "update"  # the grid is the same, and is not sent


def test_nothing_but_a_known_run_can_be_asked_for(finished_run, tmp_path):
    for name in ("/etc", str(tmp_path), "..", None):
        assert "Nothing is training" in live.show(name, None)[0]
        live.stop(name)
    assert not (tmp_path / "control").exists()


def test_curves_of_several_runs_lie_over_each_other(finished_run):
    name = str(finished_run.folder.resolve())
    drawn = runs.compare([name, name, "/etc"], 0.5, True)
    assert drawn.count("<polyline") == 2
    assert "from 1 to" in drawn
    assert "finished" in runs.runs_table(name)


# -- library -----------------------------------------------------------------------------------------------------


def test_the_library_imports_finds_renames_removes_and_brings_back(adapter_file, monkeypatch):
    monkeypatch.setattr(library_page, "ask", lambda *_: [])
    library_page.take_in(str(adapter_file), "", 1)
    assert "say <b>blip</b>" in library_page.cards("BLIP lora", 0, "")
    assert "Nothing found" in library_page.cards("dog", 0, "")
    assert "Nothing found" in library_page.cards("", 0, "", "sara", "")
    assert "blip" in library_page.cards("", 0, "", "lora", "")
    library_page.keep_words("my-cat", "tom", "good at 0.8", "", 1)
    assert [e.name for e in library_page.found("0.8")] == ["tom"]
    library_page.remove("tom", "", 1)
    assert library.entries() == []
    library_page.undo("", 1)
    (entry,) = library.entries()
    assert (entry.name, entry.facts["note"]) == ("tom", "good at 0.8")
    assert entry.path.read_bytes() == adapter_file.read_bytes()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(60), b"\x10" + bytes(7) + b"{" * 16])
def test_a_broken_file_is_not_taken_in(tmp_path, content):
    from studio.cards import read_card

    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="broken"):
        read_card(path)
    with pytest.raises(Exception, match="roken"):
        library_page.take_in(str(path), "", 1)
    assert library.entries() == []


def test_a_truncated_adapter_is_refused_by_its_header_alone(adapter_file):
    from studio.cards import read_card

    assert read_card(adapter_file)["trigger"] == "blip"
    adapter_file.write_bytes(adapter_file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="truncated"):
        read_card(adapter_file)


# -- pictures and drawing ----------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_decoded_harms_only_itself(pictures, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")
    found = make_thumbnails([pictures / "0.png", tmp_path / "no.png", tmp_path / "bomb.png"], tmp_path / "t")
    assert (found[str(pictures / "0.png")]["width"], found[str(tmp_path / "no.png")]) == (
        64, {"error": "is no picture that can be read"},
    )  # fmt: skip
    assert "pixels" in found[str(tmp_path / "bomb.png")]["error"]


def test_a_picture_restores_the_settings_it_was_drawn_with(tmp_path, adapter_file):
    from studio.samples import save_png

    library.add("my-cat", adapter_file, {})
    facts = {
        "prompt": "a blip", "negative": "", "seed": 5, "steps": 9, "guidance": 3.5, "width": 64, "height": 64,
        "base": "sticker", "adapters": [{"name": "my-cat", "weight": 0.7}, {"name": "gone", "weight": 1}],
        "regions": [{"box": [0, 0, 0.5, 1], "adapter": "my-cat", "weight": 0.4, "prompt": "a blip, left"}],
    }  # fmt: skip
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", facts)
    told = order_of(draft_of(""), "image")
    shown = generate.restore_from(told, tmp_path / "a.png")
    assert "a blip</textarea>" in shown
    request = request_of(order_of(told.draft, "image"))
    assert {k: request[k] for k in ("prompt", "seed", "count", "steps", "guidance", "width", "adapters")} == {
        "prompt": "a blip", "seed": 5, "count": 1, "steps": 9, "guidance": 3.5, "width": 64, "adapters": ["my-cat:0.7"],
    }  # fmt: skip
    assert request["regions"] == [{"box": [0, 0, 0.5, 1], "prompt": "a blip, left", "adapter": "my-cat:0.4"}]
    with pytest.raises(RequestError, match="nobody"):
        request_of(dataclasses.replace(told, values={"prompt": "x"}, adapters=("nobody",)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"seed": "-1"}, "Seed"),
        ({"count": "17"}, "From 1 to 16"),
        ({"steps": "ten"}, "whole number"),
        ({"weight:my-cat": "99"}, "Strength"),
        ({"region:0:prompt": ""}, "region 1 has no prompt"),
    ],
)
def test_an_order_that_cannot_be_is_refused_before_anything_is_drawn(adapter_file, values, words):
    library.add("my-cat", adapter_file, {})
    good = {"prompt": "a blip", "region:0:prompt": "a blip"}
    told = Order(draft_of(""), "image", {**good, **values}, ("my-cat",), ((0.0, 0.0, 0.5, 1.0),))
    with pytest.raises(StudioError) as refused:
        request_of(told)
    assert words in f"{refused.value.message} {refused.value.hint}"


def test_boxes_from_a_browser_are_inside_the_picture_or_refused():
    told = order_of(draft_of(""), "image")
    assert changed(told, {"boxes": "[[0, 0.25, 0.5, 1]]"}).boxes == ((0.0, 0.25, 0.5, 1.0),)
    for boxes in ("[[0, 0, 2, 1]]", "[[0.5, 0, 0.2, 1]]", "[[0, 0, 1]]", "{", "[[0, 0, 1, 1]]" * 2, "[1]"):
        with pytest.raises(RequestError):
            changed(told, {"boxes": boxes})


def test_beats_and_chords_can_be_told_where_the_base_that_will_play_hears_them(tmp_path):
    library.add("yaman", adapter_of("melody-diffusion", tmp_path / "a.safetensors"), {})
    library.add("bass", adapter_of("melody", tmp_path / "b.safetensors"), {})

    def told(base, *adapters):
        order = Order(draft_of(""), "audio", {"base": base, "prompt": "a tune", "beats": "96 bpm 4/4"}, adapters)
        return "| beats: 96 bpm 4/4" in request_of(order)["prompt"]

    assert told("melody-diffusion", "bass")
    assert told("", "yaman")
    assert not any((told("melody", "yaman"), told("", "bass"), told("")))


def test_taking_a_region_out_moves_the_prompts_of_the_others_along():
    values = {"region:0:prompt": "a", "region:1:prompt": "b", "prompt": "x"}
    told = Order(draft_of(""), "image", values, (), ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)))
    left = without(told, "region", "0")
    assert (left.values, left.boxes) == ({"prompt": "x", "region:0:prompt": "b"}, ((0.5, 0.0, 1.0, 1.0),))


def test_the_worker_draws_as_the_command_line_does_and_ends_with_its_listener(tiny_base_folder, home, monkeypatch):
    from studio.base import Request
    from studio.bases.registry import load_base
    from studio.drawing import Engine

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    engine = Engine()
    request = {"prompt": "a dog", "base": str(tiny_base_folder), "seed": 3, "count": 2, "steps": 4}
    answers = list(engine.draw(request))
    assert [a["seed"] for a in answers if "picture" in a] == [3, 4]
    assert [a["step"] for a in answers if "step" in a] == [1, 2, 3, 4] * 2
    assert any("preview" in a for a in answers)
    drawn = Image.open(next(a["picture"] for a in answers if "picture" in a))
    expected = load_base(tiny_base_folder).generate(Request(["a dog"], [3], steps=4))[0]
    assert list(drawn.getdata()) == list(expected.getdata())
    assert json.loads(drawn.text["studio"])["seed"] == 3
    process = engine.process
    again = list(engine.draw({**request, "count": 1, "width": 63}))
    assert "multiples" in again[-1]["error"]
    assert not any("Loading" in a.get("note", "") for a in again)  # the base is still there
    assert engine.process is process
    for answer in engine.draw({**request, "steps": 500}):
        if answer.get("step") == 2:
            break  # as a browser does that is closed
    assert sum("picture" in answer for answer in engine.draw({**request, "count": 1})) == 1
    engine.close()
    assert process.wait(30) == 0


@pytest.fixture
def other_media(gathered, monkeypatch, tmp_path):
    """A base of clips and one of music: the page shows what bases say they make."""
    from studio.bases.musicgen import MusicGen
    from studio.bases.sticker_video.family import StickerVideo

    folders = {"video": tmp_path / "clips", "audio": tmp_path / "music"}
    StickerVideo.tiny().pipe.save_pretrained(folders["video"])
    MusicGen.tiny().pipe.save_pretrained(folders["audio"])
    rows = [
        {"name": str(folder), "kind": "bundled", "medium": medium, "offline": True, "licence": "", "repo": ""}
        for medium, folder in folders.items()
    ]
    known = {**gathered, "bases": [*rows, *gathered["bases"]]}
    for module in (settings, order, adapters):
        monkeypatch.setattr(module, "schemas", lambda: known)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    engine = Engine()
    monkeypatch.setattr(generate, "ENGINE", engine)
    yield folders
    engine.close()


def test_clips_and_music_are_made_shown_and_restored_on_the_same_page(other_media, pictures):
    assert order.media() == ["image", "video", "audio"]
    draft = draft_of("")
    told = order_of(draft, "video")
    assert order.give_frames(told, [pictures / "0.png", ROOT / "pyproject.toml"]) == [
        "'pyproject.toml' is no picture that can be read"
    ]
    values = {"prompt": "a dog", "frames": "3", "fps": "8", "steps": "2", "loop": False, "width": "32", "height": "32"}
    said = list(generate.act("video", draft.name, Clicked(name="generate", values=values)))
    assert "1 made" in said[-2][1]
    results = [part[2] for part in said if isinstance(part[2], str)][-1]
    assert "sticker:whatsapp:" in results
    (clip,) = works.history("video")
    with Image.open(clip) as picture:
        assert (picture.n_frames, picture.size) == (3, (32, 32))
    assert "a dog</textarea>" in generate.restore_from(order_of(draft_of(""), "video"), clip)
    sticker = generate.sticker(clip, "gif")
    assert "fits what GIF takes" in sticker

    values = {"prompt": "a drum", "seconds": "0.5", "seed": "4"}
    said = list(generate.act("audio", draft.name, Clicked(name="generate", values=values)))
    results = [part[2] for part in said if isinstance(part[2], str)][-1]
    assert [word in results for word in ("<audio controls", "waveform", "spectrogram")] == [True] * 3
    (sound,) = works.history("audio")
    assert "value='4'" in generate.restore_from(order_of(draft_of(""), "audio"), sound)
    assert works.history("image") == []
    with pytest.raises(RequestError):
        works.work_of("../../etc/passwd")


def test_beats_and_chords_are_asked_for_where_the_base_hears_them(tmp_path):
    from studio.bases.mustango import Mustango

    Mustango.tiny().pipe.save_pretrained(tmp_path / "mustango")
    values = {"prompt": "a tune", "beats": "90 bpm 3/4", "chords": " Dm A7 "}
    deaf = order.changed(order_of(draft_of(""), "audio"), values)
    assert "data-edit='beats'" not in order.html(deaf)
    assert order.request_of(deaf)["prompt"] == "a tune"
    hearing = order.changed(deaf, {"base": str(tmp_path / "mustango")})
    assert "data-edit='beats'" in order.html(hearing)
    assert order.request_of(hearing)["prompt"] == "a tune | beats: 90 bpm 3/4 | chords: Dm A7"
    without = order.changed(hearing, {"beats": "", "chords": ""})
    assert order.request_of(without)["prompt"] == "a tune"
    made = {"prompt": "a tune", "negative": "noise", "steps": 2, "seconds": 0.5, "base": str(tmp_path / "mustango")}
    again = order.request_of(order.restored(deaf, made)[0])
    assert {name: again[name] for name in made} == made


def test_a_spectrogram_shows_a_tone_at_its_height_and_a_waveform_its_loudness(tmp_path):
    import numpy as np
    import soundfile

    from studio import waves

    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)
    tone[16_000:] = 0
    soundfile.write(tmp_path / "tone.wav", tone, 16_000, subtype="FLOAT")
    wave, rate, seconds = waves.read_wave(tmp_path / "tone.wav")
    assert (rate, seconds) == (16_000, 2.0)
    drawn = np.asarray(waves.waveform(wave, 200, 101))[..., 3] > 0
    assert drawn[:, 20].sum() == pytest.approx(51, abs=3)
    assert drawn[:, 180].sum() == 1
    heard = np.asarray(waves.spectrogram(wave, rate, 200, 120)).sum(-1)
    row = 119 - int(np.argmax(np.geomspace(waves.LOWEST_HZ, 8000, 120) >= 1000))
    assert abs(int(heard[:, 50].argmax()) - row) <= 2
    assert heard[:, 180].max() < heard[:, 50].max() / 4


def test_a_merge_foretells_how_much_of_another_concept_a_sum_brings():
    shown = merge.expected(["cat", "dog"], {"crosstalk": [[1.0, 0.7], [1.386, 1.0]]})
    assert "cat: 70 %, dog: 139 %" in shown
    assert merge.expected(["cat", "dog"], {"crosstalk": None}) == ""


def test_those_without_concepts_are_offered_two_examples(monkeypatch):
    monkeypatch.setattr(jobs, "advance", list)
    assert "both examples" in merge.lacking()
    merge.teach_examples()
    assert [Path(job.run).name.split("-", 2)[2] for job in jobs.jobs()] == ["mascot", "riso"]


def test_the_page_of_a_starting_server_gives_its_port_back():
    import socket
    import urllib.error
    import urllib.request

    from ui.waiting import Waiting

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting = Waiting("127.0.0.1", port)
    with pytest.raises(urllib.error.HTTPError) as early:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/")
    assert early.value.code == 503
    with pytest.raises(RequestError, match="cannot serve"):
        Waiting("127.0.0.1", port)
    waiting.close()
    Waiting("127.0.0.1", port).close()


def test_a_preset_of_recordings_takes_recordings_and_shows_players(tmp_path):
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "tune.wav", np.sin(np.arange(8000) / 9), 8000)
    (tmp_path / "broken.wav").write_text("no sound")
    draft = draft_of("")
    train.choose_preset(draft.name, Clicked(name="music-fast"))
    files = [str(tmp_path / name) for name in ("tune.wav", "broken.wav")]
    shown, _, left_out = train.add_files(draft.name, [*files, __file__])
    assert shown.count("<audio controls") == 1
    assert "is no sound that can be read" in shown
    assert "is no recording" in left_out
    assert "2 recordings" in shown
    assert draft_of(draft.name).pictures() == []  # pictures lie apart
    form = train.restore(draft.name)[6]
    assert "cut into pieces" in form
    assert "emoji" not in form


# -- merging -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_concepts(tiny_base_folder, tmp_path):
    """Two real adapters of the tiny base in the library, with changes that are not zero."""
    import torch

    from studio.adapter import Card, new_adapter
    from studio.bases.registry import load_base

    base = load_base(tiny_base_folder)
    sites = {name: site.shape for name, site in list(base.select(("attention",)).items())[:3]}
    for number, name in enumerate(("cat", "dog")):
        card = Card(
            method={"kind": "lora", "rank": 2}, base=base.identity(), sites=sites, trigger=f"{name}-word", seed=number
        )
        adapter = new_adapter(card)
        torch.manual_seed(number)
        for patches in adapter.patches.values():
            for patch in patches.values():
                for parameter in patch.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        adapter.save(tmp_path / f"{name}.safetensors")
        library.add(name, tmp_path / f"{name}.safetensors", {"base": str(tiny_base_folder)})
    return "cat", "dog"


def no_options():
    """The settings of all strategies at their defaults, as the page's widgets hold them."""
    fields = [merge.RANK, merge.TOLERANCE, merge.SEED, *(f for own in merge.strategy_fields().values() for f in own)]
    return [form.shown(field, field.default) for field in fields]


def test_a_merge_says_all_that_its_form_does_and_refuses_what_cannot_be(two_concepts):
    values = no_options()
    values[0], values[1], values[2] = "8", "0.1", "3"
    blend = merge.blend_of(["cat", "dog"], [0.8, -0.5, 1.0], "ties", values)
    words = " ".join(blend.arguments(Path("m.safetensors")))
    assert words.startswith("merge cat:0.8 dog:-0.5 --out m.safetensors --force --strategy ties --seed 3")
    assert "--option density=0.3" in words
    assert words.endswith("--rank 8 --tolerance 0.1")
    assert merge.prompts_for(["cat", "dog"]).splitlines() == ["a cat-word", "a dog-word", "a dog"]
    wrong = {"two concepts": (["cat"], "sum", []), "no adapter": (["cat", "../x"], "sum", []),
             "no strategy": (["cat", "dog"], "magic", []), "Rank": (["cat", "dog"], "sum", ["-3"])}  # fmt: skip
    for text, (names, strategy, first) in wrong.items():
        with pytest.raises(StudioError, match=text):
            merge.blend_of(names, [1.0, 1.0], strategy, [*first, *no_options()[len(first) :]])


def test_a_merge_is_tried_compared_kept_and_found_again(two_concepts, home, monkeypatch):
    from studio.adapter import load_adapter
    from studio.deltas.patches import change_of
    from studio.drawing import Engine

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    engine = Engine()
    monkeypatch.setattr(generate, "ENGINE", engine)
    weights = [0.5, 1.0, *[1.0] * (merge.MOST_CONCEPTS - 2)]
    said = list(merge.run(["cat", "dog"], "a cat-word\na dog", 1, 2, "sum", *weights, *no_options()))
    engine.close()
    trial = trial_of(said[1][3])
    assert "exact sum" in said[1][0]
    assert trial.sheet()["columns"] == ["base alone", "cat alone", "dog alone", "merged"]
    pictures = [[Path(path).read_bytes() for path in row] for _, row in trial.sheet()["rows"]]
    assert all(len(set(row)) == 4 for row in pictures)  # the base, each concept and the merge draw otherwise
    assert said[-1][1].count("data-cell") == 8
    assert said[-1][1] == merge.restore(trial.folder.name)[2]
    assert "both" in merge.save("both", trial.folder.name)
    assert (library.library_dir() / "both.png").exists()
    parents = [load_adapter(library.find(name)) for name in ("cat", "dog")]
    for site, terms in load_adapter(library.find("both")).patches.items():
        made = sum(change_of(patch).dense() for patch in terms.values())
        wanted = sum(w * change_of(p).dense() for w, a in zip((0.5, 1.0), parents) for p in a.patches[site].values())
        assert (made - wanted).abs().max() < 1e-6
    monkeypatch.setattr(merge, "ask", lambda *_: pytest.fail("merged again"))
    assert merge.merged(merge.blend_of(["cat", "dog"], weights, "sum", no_options())) == trial
    with pytest.raises(Exception, match="othing is merged"):
        merge.save("x", "../../etc")


def test_the_interference_of_concepts_is_shown_in_words_and_as_numbers(tmp_path):
    matrix = [[1.0, 0.8], [0.8, 1.0]]
    facts = {
        "verdict": ["<b>'cat' and 'dog' will disturb each other."], "findings": [],
        "adapters": [{"name": "cat"}, {"name": "dog"}], "total": {"input_overlap": matrix, "crosstalk": None},
        "groups": [{"where": "unet.mid_block", "layers": 3, "input_overlap": matrix}],
    }  # fmt: skip
    shown = merge.interference_of(facts, tmp_path / "page.html")
    assert "&lt;b&gt;" in shown
    assert shown.count(">0.80</td>") == 3
    assert "crosstalk" not in shown.split("By part")[0]


# -- sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_grid_of_requests_with_a_column_that_wears_nothing():
    request = {"prompt": "a cat", "adapters": ["cat:0.8", "dog:1"], "seed": 4, "steps": 9}
    sweep = sweep_of("strength", "0.5, 1", "seed", "", True, request["adapters"])
    assert (sweep.columns, sweep.rows[1]) == (["no adapter", "strength 0.5", "strength 1"], "seed 1")
    cells = [{**request, **cell} for cell in sweep.cells(request)]
    assert [cell["adapters"] for cell in cells[:3]] == [[], ["cat:0.4", "dog:0.5"], ["cat:0.8", "dog:1"]]
    assert [cell["seed"] for cell in cells] == [s for s in (0, 1, 2, 3) for _ in range(3)]
    assert all(cell["steps"] == 9 for cell in cells)
    path = Path("x")
    assert sweep.grid([path, *[None] * 11])[0] == ("seed 0", [path, None, None])
    assert sweep_of("", "", "", "", True, []) is None


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("seed", "1", "seed", "2"), "same setting"),
        (("strength", "1", "", ""), "needs an adapter"),
        (("steps", "ten", "", ""), "no numbers"),
        (("steps", "0", "", ""), "from 1"),
        (("seed", "1.5", "", ""), "whole"),
        (("guidance", "nan", "", ""), "guidance must be"),
        (("magic", "1", "", ""), "no setting"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(axes, words):
    with pytest.raises(RequestError, match=words):
        sweep_of(*axes, True, [])


def test_a_sweep_has_an_end():
    sweep = sweep_of("seed", ",".join(map(str, range(65))), "", "", True, [])
    with pytest.raises(RequestError, match="65 pictures"):
        sweep.cells({"adapters": []})


# -- evaluations and estimates -----------------------------------------------------------------------------------


def make_card(name, **changes):
    card = {
        "adapter": name, "method": {"kind": "lora"}, "base": "sticker", "protocol": "p", "seed": 0, "pictures": 9,
        "num_inference_steps": 25, "references": 8, "training": {"file_size": 2_000_000, "train_time": 80.0},
        "figures": {"similarity": 0.61, "similarity_base": 0.24, "similarity_references": 0.92, "drift": 0.3},
    }  # fmt: skip
    folder = studio_home() / "evaluations" / name
    write_atomically(folder / "card.json", json.dumps({**card, **changes}))
    Image.new("RGB", (16, 16)).save(folder / "sheet.png")
    (folder / "card.html").write_text("<p>card</p>")


def test_cards_lie_side_by_side_and_those_of_other_measurements_are_marked(adapter_file):
    for name in ("one", "two", "three"):
        library.add(name, adapter_file, {})
    make_card("one")
    make_card("two", figures={"similarity": 0.7, "<script>": 1.0})
    shown = compare.side_by_side(["one", "two", "three"])
    assert [word in shown for word in ("0.610", "0.240", "0.920", "0.700", "2.0 MB", "80 s")] == [True] * 6
    assert "three" not in shown
    assert "<script" not in shown
    assert "with care" not in shown
    make_card("two", seed=5)
    assert "with care" in compare.side_by_side(["one", "two"])
    assert "No card chosen" in compare.side_by_side(["../one"])


def test_an_evaluation_is_a_job_that_waits_its_turn_and_is_no_run(adapter_file, monkeypatch):
    monkeypatch.setattr(jobs, "advance", list)
    library.add("one", adapter_file, {})
    seen = compare.begin("one", 5)[1]
    (job,) = jobs.jobs()
    assert job.arguments[:4] == ("evaluate", "one", "--steps", "5")
    assert (job.title, job.state(), job.is_training) == ("evaluate one", "queued", False)
    assert live.known_runs() == {}
    assert "evaluate one" in live.queue_table()[0]
    with pytest.raises(Exception, match="already"):
        compare.begin("one", 5)
    with pytest.raises(Exception, match="no adapter"):
        compare.begin("nobody", 5)
    make_card("one")  # as the job does
    jobs._store(dataclasses.replace(job, phase="over", added=job.added - 1))
    assert jobs.jobs()[0].state() == "finished"
    table, _, chosen, shown = compare.follow(seen, [])
    assert chosen["value"] == ["one"]
    assert "0.610" in shown
    assert "finished" in table


def test_time_and_memory_are_foretold_by_what_was_trained_before(finished_run, monkeypatch):
    content = settings.presets()["subject"]
    assert "not known yet" in estimate(content)
    remember_check(content, {"seconds per step": 0.5, "peak memory GiB": 2.0})
    assert estimate({**content, "steps": 240}).startswith("About 2 min of steps and 2.0 GiB, by the last check")
    larger = {**content, "batch_size": 2 * content["batch_size"], "steps": 240}
    assert estimate(larger).startswith("Very roughly 4 min of steps, by")
    finished_run.save_preset(settings.to_yaml({**content, "steps": 20}))
    assert "by the run '20261121-000000-cat'" in estimate(content)
    assert "not known yet" in estimate({**content, "base": "sdxl"})
    draft = draft_of("")
    assert "by the run" in train.foreseen(draft)
    draft.save_form({"preset": "subject", "values": {"steps": "many"}})
    assert "must be a whole number" in train.foreseen(draft)


# -- the server --------------------------------------------------------------------------------------------------


def test_the_server_loads_no_torch_and_serves_only_its_own_folders(home, gathered, tmp_path):
    cache = home / "cache"
    cache.mkdir(parents=True)
    program = """
import json, sys, urllib.error, urllib.request
from pathlib import Path
import studio.schemas as schemas
import ui.settings
known = json.loads(Path(sys.argv[1]).read_text())
schemas.schemas = ui.settings.schemas = lambda: known
import ui.pages.system
ui.pages.system.schemas = lambda: known
from ui.app import serve
url, close = serve(port=0 or 17860 + int(sys.argv[2]) % 1000, wait=False)
def status(path):
    try:
        return urllib.request.urlopen(url + path, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
home = Path(sys.argv[3])
(home / "pictures" / "a").mkdir(parents=True)
(home / "pictures" / "a" / "x.png").write_bytes(b"x")
(home / "secret.txt").write_text("x")
print(json.dumps({
    "pages": [status(p) for p in ("", "runs", "library", "generate", "system")],
    "own": status(f"gradio_api/file={home}/pictures/a/x.png"),
    "refused": [status(f"gradio_api/file={p}") for p in (home / "secret.txt", "pyproject.toml", "/etc/passwd",
        f"{home}/pictures/../secret.txt")],
    "heavy": [m for m in ("torch", "diffusers", "transformers", "trainers") if m in sys.modules],
}))
close()
"""
    (tmp_path / "known.json").write_text(json.dumps(gathered))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "known.json"), str(os.getpid()), str(home)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["pages"] == [200] * 5
    assert found["own"] == 200
    assert all(code in (403, 404) for code in found["refused"]), found
    assert found["heavy"] == []


def test_another_host_needs_a_password_that_nobody_else_can_read(tmp_path):
    from ui.access import is_loopback, read_users
    from ui.app import serve

    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(RequestError, match="no password"):
        serve("0.0.0.0")
    path = tmp_path / "users"
    path.write_text("me:long enough\n")
    path.chmod(0o644)
    with pytest.raises(RequestError, match="others"):
        read_users(path)
    path.chmod(0o600)
    assert read_users(path) == [("me", "long enough")]
    path.write_text("me:short\n")
    with pytest.raises(RequestError, match="usable"):
        read_users(path)


def test_text_from_outside_is_never_markup(finished_run):
    assert "<img" not in pieces.text("<img src=x onerror=alert(1)>")
    told = {
        "left out": ["'<script>.png' is none"], "minutes in all, about": 1, "peak memory GiB": 1, "trained numbers": 3,
        "warning": [], "export": [],
    }  # fmt: skip
    for noun in (PictureSet.noun, AnimationSet.noun, SoundSet.noun):
        said = brought.report_of({noun: 17, **told})
        assert "<script" not in said
        assert f"<dt>{noun}</dt><dd>17</dd>" in said


def test_what_a_page_does_when_opened_happens_once_and_never_over_what_was_typed(home):
    from ui.app import build

    opened = [fn.targets for fn in build().fns.values() if "load" in {event for _, event in fn.targets}]
    assert opened
    assert all(len(targets) == 1 for targets in opened)


def test_five_hundred_adapters_and_two_hundred_runs_are_listed_in_a_second(adapter_file, home):
    from studio.cards import read_card

    for number in range(500):
        library.library_dir().mkdir(parents=True, exist_ok=True)
        os.link(adapter_file, library.library_dir() / f"a{number}.safetensors")
    for number in range(200):
        run = Run(library.runs_dir() / f"20261121-000000-r{number}")
        run.prepare()
        run.append(Event("started", 0, {"steps": 2}))
        run.append(Event("stopped", 0, {}))
    read_card(adapter_file)
    library_page.cards("blip", 0, "")
    runs.runs_table(None)
    began = time.process_time()
    library_page.cards("blip", 0, "")
    runs.runs_table(None)
    assert time.process_time() - began < 1.0
