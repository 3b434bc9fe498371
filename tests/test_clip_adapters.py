"""Adapters on a base of clips: taught from clips by any method, and those of the image base inside."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from studio import library
from studio.adapter import Card, load_adapter, new_adapter
from studio.base import Request
from studio.bases.registry import load_base
from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.sticker_video.building import video_around
from studio.bases.sticker_video.family import StickerVideo
from studio.data.animations import scan_animations
from studio.data.clip_files import save_clip
from studio.data.clips import Clip
from studio.errors import AdapterError, DataError, PresetError
from studio.generation import Use, wearing
from studio.method import method_from
from studio.preset import Data
from studio.training import Order, plan, plan_resume


def drawn(place, size=(16, 16)):
    picture = Image.new("RGBA", size)
    ImageDraw.Draw(picture).rectangle((place, 4, place + 4, 10), fill=(200, 40, 40, 255))
    return picture


@pytest.fixture
def clips(tmp_path):
    """Three moving clips of 3, 3 and 4 frames, one of them larger, and one that stands still."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, count, size in (("a", 3, (16, 16)), ("b", 3, (40, 24)), ("c", 4, (16, 16))):
        save_clip(Clip.at_rate([drawn(2 * i, size) for i in range(count)], 8.0), folder / f"{name}.webp", {})
    (folder / "a.txt").write_text("a {trigger} apple")
    drawn(3).save(folder / "still.png")
    return folder


@pytest.fixture(scope="module")
def clip_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "clips"
    StickerVideo.tiny().pipe.save_pretrained(folder)
    return folder


def preset(folder, base, clips, **changes):
    content = {
        "description": "pico",
        "base": str(base),
        "method": {"kind": "lora", "rank": 2, "target_modules": ["attention"]},
        "data": {"path": str(clips), "caption": "a {trigger}", "frames": 4},
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "sample_every": 4,
        "sample_steps": 2,
        "sample_prompts": ["a {trigger}"],
        **changes,
    }
    path = folder / "pico.yaml"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("kind", ["lora", "orthogonal"])
def test_a_clip_base_learns_from_clips_and_wears_what_it_learned(kind, clips, clip_base, tmp_path):
    method = {"kind": kind, "rank": 2, "target_modules": ["attention"]}
    path = preset(tmp_path, clip_base, clips, method=method)
    events = list(plan(Order(path, name="swing", run=tmp_path / "run")).events())
    assert events[-1].kind == "finished"
    assert any("still.png" in e.data.get("text", "") for e in events if e.kind == "warning")
    sheet = Image.open(tmp_path / "run" / "samples" / "000004-0.png")
    assert sheet.width == 4 * sheet.height
    assert Image.open(tmp_path / "run" / "samples" / "000004-0.webp").n_frames == 4
    base, use = load_base(str(clip_base)), Use("swing", load_adapter(library.find("swing")))
    request = Request(["a swing"], [0], steps=2, frames=3)
    alone = base.generate(request)[0]
    with wearing(base, [use]) as warnings:
        worn = base.generate(request)[0]
    assert warnings == []
    assert [f.tobytes() for f in worn.frames] != [f.tobytes() for f in alone.frames]
    again = base.generate(request)[0]
    assert [f.tobytes() for f in again.frames] == [f.tobytes() for f in alone.frames]


def test_a_resumed_lesson_equals_an_uninterrupted_one_bit_for_bit(clips, clip_base, tmp_path):
    path = preset(tmp_path, clip_base, clips, learned_words=2, validate_every=2)
    whole = list(plan(Order(path, run=tmp_path / "whole", settings=("data.validation=1",))).events())
    steps = 0

    def stop():
        return steps >= 3

    for event in plan(Order(path, run=tmp_path / "cut", settings=("data.validation=1",))).events(stop):
        steps = event.step
    list(plan_resume(tmp_path / "cut").events())
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert load_adapter(tmp_path / "whole" / "adapter.safetensors").words
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(e.data["loss"] > 0 for e in whole if e.kind == "validation")


def image_adapter(base, targets, kind="lora"):
    method = method_from({"kind": kind, "rank": 2, "target_modules": targets})
    sites = method.sites(base)
    shapes = {name: site.shape for name, site in sites.items()}
    card = Card(method=method.model_dump(mode="json"), base=base.identity(), sites=shapes)
    adapter = new_adapter(card, {name: site.module for name, site in sites.items()})
    generator = torch.Generator().manual_seed(5)
    for terms in adapter.patches.values():
        for parameter in terms["main"].parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapter


def test_a_clip_network_wears_an_adapter_of_its_image_network_frame_by_frame():
    image = StableDiffusion.tiny()
    adapter = image_adapter(image, ["attention", "conv"])
    base = video_around(StableDiffusion.tiny(), "clips", interaction_head_dim=4)
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 8, 3, 8, 8, generator=generator)
    noisy[:, 4:] = 0
    time = torch.tensor([300])
    condition = base.encode_prompts(["a cat"], (16, 16))
    with torch.no_grad():
        alone = base.predict(noisy, time, condition)
        with wearing(base, [Use("one", adapter)]) as warnings:
            clip = base.predict(noisy, time, condition)
        # The ends stay as they are in the clip network, so the image network wears all but those.
        inner = {
            name: terms for name, terms in adapter.patches.items() if name.split(".")[1] not in ("conv_in", "conv_out")
        }
        adapter.patches = inner
        with wearing(image, [Use("one", adapter)]):
            told = image.encode_prompts(["a cat"], (16, 16))
            frames = [image.predict(noisy[:, :4, i], time, told) for i in range(3)]
    assert "unet.conv_in" in warnings[0]
    assert not torch.allclose(clip[:, :4], alone[:, :4])
    assert torch.allclose(clip[:, :4], torch.stack(frames, 2), atol=1e-5)


def test_adapters_that_do_not_fit_a_clip_base_are_refused():
    base = StickerVideo.tiny()
    other = StableDiffusion.tiny()
    adapter = image_adapter(other, ["attention"])
    name, shape = next(iter(adapter.card.sites.items()))
    adapter.card.sites[name] = replace(shape, weight=(shape.weight[0], shape.weight[1] + 1))
    with pytest.raises(AdapterError, match="another network"), wearing(base, [Use("one", adapter)]):
        pass
    with (
        pytest.raises(AdapterError, match="very weights"),
        wearing(base, [Use("two", image_adapter(other, ["attention"], "dora"))]),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dco_beta": 100.0}, "dco_beta"),
        ({"data.flip": True}, "flip"),
        ({"data.frames": 64}, "draws 16 at most"),
        ({"data.resolution": 33}, "multiple"),
        ({"data.validation": 3}, "3 clips that move"),
        ({"data.path": "nowhere"}, "no folder"),
    ],
)
def test_lessons_that_make_no_sense_are_refused_and_nothing_is_written(changes, word, clips, clip_base, tmp_path):
    path = preset(tmp_path, clip_base, clips)
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())
    with pytest.raises((PresetError, DataError), match=word):
        plan(Order(path, run=tmp_path / "run", settings=settings))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_clips_tells_what_became_of_it(clips):
    (clips / "cut.gif").write_bytes((clips / "a.webp").read_bytes()[:40])
    (clips / "nothing.png").write_bytes(b"")
    (clips / "odd.webp").write_bytes((clips / "c.webp").read_bytes())
    (clips / "odd.txt").write_bytes(b"\xff\xfe\xfa")
    found = scan_animations(
        clips, Data(path=str(clips), caption="a {trigger}", frames=3), {"trigger": "zo", "class": ""}
    )
    assert [one.caption for one in found.clips] == ["a zo apple", "a zo", "a zo"]
    assert {name for name, _ in found.report.dropped} == {"cut.gif", "nothing.png", "odd.webp", "still.png"}
    assert any("key frames" in text for text in found.report.warnings)
    assert found.with_captions(str.upper).fingerprint != found.fingerprint
