"""The card of an adapter: what its figures mean, that metrics can be exchanged, and what stands in the files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from studio.cli import run
from studio.errors import DataError, MissingPart, PresetError, RequestError
from studio.evaluate.card import Question, choose_metrics, evaluate, measure, read_references
from studio.evaluate.encoders import ClipMetric, dino_metric
from studio.evaluate.exhibit import Drawing, Drawn, Exhibit
from studio.evaluate.metrics import FeatureMetric, JudgeMetric, PixelMetric, palette
from studio.evaluate.protocol import Protocol, protocol_files, read_protocol
from studio.evaluate.similarity import diversity, drift, paired_similarity, similarity, similarity_among
from studio.evaluate.training_cost import training_cost

SMALL = """
settings: [{prompt: "a {trigger}, on a red background", shows: {ground: red}}, {prompt: "a {trigger} on the left"}]
unrelated: [a dog, a cat]
repeated: "a {trigger}"
repeats: 2
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def disc(colour, ground="white", side=64):
    picture = Image.new("RGB", (side, side), ground)
    ImageDraw.Draw(picture).ellipse([16, 16, 48, 48], fill=colour)
    return picture


def exhibit(protocol=None, worn="red", alone="blue", references=("red", "red")):
    """Pictures of discs: with the adapter in one colour, without it in another."""
    protocol = protocol or Protocol(settings=[{"prompt": "a x"}] * 2, unrelated=["a dog"] * 2, repeats=2)
    sets = [Drawn(*[[disc(colour) for _ in range(2)] for _ in range(3)]) for colour in (worn, alone)]
    return Exhibit(protocol, ["a"] * len(protocol.settings), *sets, [disc(colour) for colour in references])


# -- what the figures mean -------------------------------------------------------------------------------------


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)


def test_similarity_drift_and_diversity_are_what_their_formulas_say():
    east, north = unit([1, 0]), unit([0, 1])
    both = torch.cat([east, north])
    assert similarity(east, both) == pytest.approx(0.5**0.5)  # with the mean direction
    assert similarity(east, both, all_pairs=True) == pytest.approx(0.5)  # (1 + 0) / 2
    assert paired_similarity(both, both) == pytest.approx(1)
    assert similarity_among(both) == pytest.approx(0)  # each with the other one, never with itself
    assert similarity_among(east) == 1
    assert drift(east, east) == 0
    assert drift(east, north) == pytest.approx(0.5)
    assert drift(east, -east) == pytest.approx(1)
    assert diversity(both) == pytest.approx(0.5)
    assert diversity(torch.cat([east, east])) == pytest.approx(0)
    with pytest.raises(DataError, match="1 and 2"):
        drift(east, both)


def test_the_palette_tells_colours_and_not_shapes():
    square = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(square).rectangle([18, 18, 45, 45], fill="red")
    red, blue, other = palette([disc("red"), disc("blue"), square])
    assert float(red @ other) > 0.95
    assert float(red @ blue) < 0.85
    assert torch.allclose(red.norm(), torch.tensor(1.0))


def test_a_metric_says_what_is_near_the_references_and_what_has_moved():
    figures = FeatureMetric("palette", palette).measure(exhibit())
    assert figures["palette_similarity"] == pytest.approx(1, abs=1e-5)
    assert figures["palette_similarity_base"] < 0.9
    assert figures["palette_similarity_references"] == pytest.approx(1, abs=1e-5)
    assert figures["palette_drift"] > 0.05
    assert figures["palette_diversity"] == pytest.approx(0, abs=1e-5)
    still = FeatureMetric("palette", palette).measure(exhibit(worn="blue"))
    assert still["palette_drift"] == pytest.approx(0, abs=1e-6)


def test_pixel_diversity_is_the_root_mean_square_between_pictures():
    black, white = Image.new("RGB", (32, 32), "black"), Image.new("RGB", (32, 32), "white")
    own = exhibit()
    figures = PixelMetric().measure(
        Exhibit(own.protocol, own.texts, Drawn([], [], [black, white]), Drawn([], [], [black, black]))
    )
    assert figures == {"diversity": pytest.approx(1), "diversity_base": 0}


def test_a_style_is_compared_with_references_of_its_own_or_not_at_all_by_features_of_things():
    settings = [{"prompt": "a x", "reference": f"{i}.png"} for i in range(2)]
    blind = FeatureMetric("thing", palette, sees_style=False)
    style = Protocol(teaches="style", settings=[{"prompt": "a x"}] * 2, unrelated=["a"] * 2, repeats=2)
    assert "thing_similarity" not in blind.measure(exhibit(style))
    assert "palette_similarity" in FeatureMetric("palette", palette).measure(exhibit(style))
    paired = Protocol(teaches="style", settings=settings, unrelated=["a"] * 2, repeats=2)
    figures = blind.measure(exhibit(paired, worn="red", references=("red", "blue")))
    assert figures["thing_similarity"] == pytest.approx(
        (1 + float(palette([disc("red")]) @ palette([disc("blue")]).T)) / 2
    )


def test_drift_goes_by_dino_where_it_is_there_as_in_pefts_tables():
    far = FeatureMetric("dino", lambda pictures: unit(*[[1, i] for i in range(len(pictures))]))
    metrics = [FeatureMetric("palette", palette), far]
    figures = measure(exhibit(), metrics)
    assert figures["drift"] == figures["dino_drift"] != figures["palette_drift"]
    assert measure(exhibit(), metrics[:1])["drift"] == figures["palette_drift"]


# -- through transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A pico CLIP of the real classes, with its tokenizer and picture processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from studio.bases.tiny import tiny_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("clip"), tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    BitImageProcessor(**size).save_pretrained(folder)
    return folder


def test_clip_gives_the_cosines_that_transformers_own_forward_gives(clip_folder):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model, shown = CLIPModel.from_pretrained(clip_folder), [disc("red"), disc("blue", "yellow")]
    tokens = AutoTokenizer.from_pretrained(clip_folder)(["a cat", "a dog"], padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(images=shown, return_tensors="pt")
    with torch.no_grad():
        told = model.eval()(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels["pixel_values"]
        )
    metric = ClipMetric(clip_folder)
    own = metric.look(shown) @ metric.read(["a cat", "a dog"]).T
    torch.testing.assert_close(own, told.logits_per_image / model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    figures = metric.measure(exhibit())
    assert {"clip_similarity", "clip_text", "clip_text_base", "clip_drift"} <= figures.keys()
    assert figures["clip_similarity"] == pytest.approx(1, abs=1e-4)


def test_dinos_feature_is_the_class_token_of_the_last_layer(dino_folder):
    from transformers import AutoImageProcessor, Dinov2Model

    pixels = AutoImageProcessor.from_pretrained(dino_folder)(images=[disc("red")], return_tensors="pt")
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(dino_folder).eval()(**pixels).last_hidden_state[:, 0]
    own = dino_metric(dino_folder).look([disc("red")])
    torch.testing.assert_close(own, token / token.norm(), rtol=1e-4, atol=1e-5)
    assert dino_metric(dino_folder).measure(exhibit())["dino_similarity"] == pytest.approx(1, abs=1e-4)


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    with pytest.raises(MissingPart, match="nowhere"):
        dino_metric(tmp_path / "nowhere")
    with pytest.raises(MissingPart, match="cannot be loaded"):
        ClipMetric(tmp_path)


# -- protocols and references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", protocol_files())
def test_every_bundled_protocol_asks_for_what_the_judge_can_answer(name):
    from studio.evaluate.judge import HEADS, bundled_judge

    protocol = read_protocol(name).filled("zovuki", "dog")
    assert protocol.description
    assert not any("{" in setting.prompt for setting in protocol.settings)
    known = HEADS | {"glyph": bundled_judge().glyphs}
    assert all(answer in known[head] for s in protocol.settings for head, answer in s.shows.items())
    assert not any("zovuki" in prompt for prompt in protocol.unrelated)


def test_a_wrong_protocol_names_the_nearest_key(tmp_path):
    (tmp_path / "p.yaml").write_text(SMALL.replace("repeats", "repeat"))
    with pytest.raises(PresetError) as caught:
        read_protocol(str(tmp_path / "p.yaml"))
    assert "repeat" in caught.value.message
    assert "repeats" in caught.value.hint or "repeated" in caught.value.hint
    with pytest.raises(PresetError, match="no protocol"):
        read_protocol("sticker-subjekt")


def test_references_that_are_not_there_are_named(tmp_path, small):
    protocol = read_protocol(str(small))
    with pytest.raises(DataError, match="nothing to compare"):
        read_references(None, protocol)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        read_references(tmp_path / "empty", protocol)
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be used"):
        read_references(tmp_path / "empty", protocol)


def test_a_base_that_the_judge_does_not_know_needs_a_metric(small):
    protocol, question = read_protocol(str(small)), Question("x")
    with pytest.raises(RequestError, match="sticker world") as caught:
        choose_metrics(question, protocol, sticker_world=False)
    assert "--dino" in caught.value.hint
    with pytest.raises(RequestError, match="juge") as caught:
        choose_metrics(Question("x", metrics=["juge"]), protocol, sticker_world=True)
    assert "judge" in caught.value.hint
    with pytest.raises(RequestError, match="weights"):
        choose_metrics(Question("x", metrics=["clip"]), protocol, sticker_world=True)


# -- a trained adapter -----------------------------------------------------------------------------------------


@pytest.fixture
def trained(pictures, tiny_base_folder, tmp_path):
    arguments = ["train", "--preset", "subject-lora", "--base", tiny_base_folder, "--data", pictures, "--name", "blip"]
    arguments += ["--run", tmp_path / "run", "--steps", 3, "--set", "sample_every=0", "--set", "export=[]"]
    assert run([*map(str, arguments), "--set", "batch_size=2"]) == 0
    return tmp_path / "run"


def test_the_card_says_what_the_files_and_the_events_say(trained, small, tmp_path, capsys, dino_folder, clip_folder):
    before = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    extra = ["--metrics", "palette", "--metrics", "dino", "--metrics", "clip", "--dino", dino_folder, "--clip"]
    command = ["evaluate", trained, "--protocol", small, "--steps", 1, *extra, clip_folder, "--json"]
    capsys.readouterr()
    assert run([str(part) for part in command]) == 0
    card = json.loads(capsys.readouterr().out)
    training = card["training"]
    assert training["file_size"] == (trained / "adapter.safetensors").stat().st_size
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    assert training["num_trainable_params"] == next(e["trained_parameters"] for e in events if e["kind"] == "started")
    assert training["train_time"] == events[-1]["seconds"]
    assert training["steps"] == 3
    assert training["accelerator_memory_max"] > 1e8
    assert {"dino_similarity", "clip_text", "palette_similarity", "diversity"} <= card["figures"].keys()
    assert card["figures"]["drift"] == card["figures"]["dino_drift"]
    assert card["references"] == 4  # the pictures of the training
    files = {name: Path(path) for name, path in card["files"].items()}
    assert files["card.json"].parent == trained / "evaluation"
    stored = json.loads(files["card.json"].read_text())
    assert stored["figures"] == card["figures"]
    page = files["card.html"].read_text()
    assert page.count("data:image/webp") == 2 * 6 + 4
    assert "http" not in page
    assert Image.open(files["sheet.png"]).width > 2 * 128
    assert before == {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}


def test_strength_zero_is_the_base_and_other_adapters_can_be_worn_beside(trained, small, tiny_base_folder):
    from studio.bases.registry import load_base

    base, how = load_base(str(tiny_base_folder)), {"protocol": str(small), "metrics": ["palette"]}
    drawing = Drawing(steps=1)
    off = evaluate(Question(f"{trained}:0", drawing=drawing, **how), base)
    assert off.card["figures"]["drift"] == pytest.approx(0, abs=1e-6)
    assert [p.tobytes() for p in off.exhibit.worn.settings] == [p.tobytes() for p in off.exhibit.alone.settings]
    own = evaluate(Question(f"{trained}:200", drawing=drawing, **how), base)
    cancelled = evaluate(Question(f"{trained}:200", beside=[f"{trained}:-200"], drawing=drawing, **how), base)
    moved = [a.tobytes() != b.tobytes() for a, b in zip(own.exhibit.worn.settings, off.exhibit.worn.settings)]
    assert all(moved)
    assert cancelled.card["figures"]["drift"] < own.card["figures"]["drift"]
    assert cancelled.card["beside"] == [{"adapter": str(trained), "weight": -200}]


def test_a_file_without_its_run_has_a_card_without_the_costs_of_training(trained, tmp_path):
    from studio.adapter import load_adapter

    lonely = tmp_path / "alone" / "a.safetensors"
    lonely.parent.mkdir()
    lonely.write_bytes((trained / "adapter.safetensors").read_bytes())
    cost = training_cost(load_adapter(lonely), lonely)
    assert cost.keys() == {"num_trainable_params", "file_size", "steps"}
    assert (
        cost["num_trainable_params"]
        == training_cost(load_adapter(lonely), trained / "adapter.safetensors")["num_trainable_params"]
    )


def test_the_time_of_a_training_has_all_its_parts(trained):
    from studio.adapter import load_adapter

    def seconds() -> float:
        path = trained / "adapter.safetensors"
        return training_cost(load_adapter(path), path)["train_time"]

    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    began = next(number for number, event in enumerate(events) if event["kind"] == "started")
    start, whole = events[began]["time"], seconds()
    lost = {"time": start + 40.0, "step": 2, "kind": "step", "loss": 1.0, "peak_memory_gib": 1.0}  # made again later
    earlier = [events[began], {**lost, "time": start + 30.0, "step": 1}, lost]
    again = {"time": start + 500.0, "step": 1, "kind": "resumed", "from_step": 1}
    lines = [json.dumps(event) for event in (*earlier, again, *events[began + 1 :])]
    (trained / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert seconds() == pytest.approx(whole + 30.0)


def test_several_adapters_have_mean_and_spread(trained, small, capsys, tmp_path):
    command = ["evaluate", trained, f"{trained}:2", "--protocol", small, "--steps", 1, "--metrics", "palette"]
    capsys.readouterr()
    assert run([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "mean" in out
    assert "sd" in out


def test_evaluating_what_is_not_there_is_one_line_and_exit_2(capsys, trained, tmp_path):
    for arguments in (["evaluate", "no-such-adapter"], ["evaluate", trained, "--references", tmp_path / "nowhere"]):
        capsys.readouterr()
        assert run([str(part) for part in [*arguments, "--metrics", "palette"]]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1
        assert "Traceback" not in told


def test_the_bundled_judge_reads_pictures_of_the_bundled_base(tmp_path):
    """The base asked for a ground it knows: the judge sees it, with the adapter off and on."""
    from studio.bases.registry import load_base
    from studio.data.cache import Cache
    from studio.evaluate.exhibit import draw_exhibit, of_sticker_world
    from studio.evaluate.judge import bundled_judge

    base = load_base("sticker")
    assert of_sticker_world(base)
    settings = [{"prompt": "a dog, on a blue background", "shows": {"ground": "blue"}}]
    protocol = Protocol(settings=settings, unrelated=["a cat"], repeated="a dog", repeats=2)
    cache = Cache(tmp_path / "cache")
    drawn, warnings = draw_exhibit(base, [], protocol, ("", ""), [], Drawing(steps=3), cache)
    figures = JudgeMetric(bundled_judge()).measure(drawn)
    assert not warnings
    assert figures["ground_right"] == figures["ground_right_base"] == 1
    assert figures["judge_drift"] == pytest.approx(0, abs=1e-6)
    assert figures["glyphs_kept"] == 1
    again, _ = draw_exhibit(base, [], protocol, ("", ""), [], Drawing(steps=3), Cache(tmp_path / "cache"))
    assert [p.tobytes() for p in again.alone.repeated] == [p.tobytes() for p in drawn.alone.repeated]
