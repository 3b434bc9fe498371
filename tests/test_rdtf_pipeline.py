"""Sampling clips: six tasks by one call, given frames exact, seeded, saved and loaded in a fresh process."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from studio.base import Request
from studio.bases.registry import families, load_base
from studio.bases.sticker_video import alpha
from studio.bases.sticker_video.conditioning import clip_noise
from studio.bases.sticker_video.detail import restored
from studio.bases.sticker_video.family import StickerVideo
from studio.errors import BaseError, RequestError

#: The given frames of each task on a clip of 5.
GIVEN = {
    "text": (),
    "image": (0,),
    "image in the middle": (2,),
    "interpolation": (0, 4),
    "prediction": (0, 1, 2),
    "backcast": (3, 4),
}


@pytest.fixture(scope="module")
def base():
    base = StickerVideo.tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.pipe.unet.parameters():
            if parameter.abs().sum() == 0:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base


def drawing(number=0, size=(16, 16)):
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse([2 + number, 3, 10, 12], fill=(200, 40 * number, 90, 255))
    return picture


def seeded(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("task", GIVEN)
def test_given_frames_come_back_exactly_in_latents_and_in_pixels(base, task):
    given = {index: drawing(index) for index in GIVEN[task]}
    options = {"num_frames": 5, "num_inference_steps": 2}
    latents = base.pipe("a cat", given, generator=seeded(), output_type="latent", **options).frames
    clip = base.pipe("a cat", given, generator=seeded(), **options).frames[0]
    assert latents.shape == (1, 8, 5, 8, 8)
    assert len(clip) == 5
    if given:
        encoded = base.pipe.encode_rgba(alpha.to_tensor(list(given.values())))
        assert torch.equal(latents[0, :, list(given)], encoded.transpose(0, 1))
    for index, picture in given.items():
        assert clip[index].tobytes() == picture.tobytes()


def test_given_frames_change_the_others_and_so_do_text_rate_and_loop(base):
    plain = {"num_frames": 3, "num_inference_steps": 2}

    def latents(prompt="a cat", frames=None, **options):
        return base.pipe(prompt, frames, generator=seeded(), output_type="latent", **{**plain, **options}).frames

    first = latents()
    assert torch.equal(first, latents())
    for other in (
        latents("a dog"),
        latents(frames={0: drawing()}),
        latents(fps=20.0),
        latents(loop=True),
        latents(guidance_scale=9.0),
    ):
        assert not torch.allclose(first[:, :, 2], other[:, :, 2], atol=1e-5)
    one, two = (latents(frames={0: drawing()}, image_guidance_scale=s) for s in (1.0, 4.0))
    assert not torch.allclose(one[:, :, 2], two[:, :, 2], atol=1e-5)


def test_guidance_of_one_is_the_conditional_prediction_alone(base):
    calls = []
    hook = base.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for text, image, given in ((1, 1, {0: drawing()}), (4, 1, {0: drawing()}), (4, 2, {0: drawing()}), (4, 2, {})):
        calls.clear()
        base.pipe("a cat", given, 2, guidance_scale=text, image_guidance_scale=image, num_inference_steps=1)
        counts.append(len(calls))
    hook.remove()
    assert counts == [1, 2, 3, 2]


def test_two_guidances_are_the_published_formula(base):
    pipe = base.pipe
    x = torch.randn(1, 8, 3, 8, 8, generator=seeded())
    text, empty = pipe.encode_text(["a cat"]), pipe.encode_text([""])
    condition = pipe._condition({0: drawing()}, 3, 8.0, False, (16, 16), 1, torch.device("cpu"))
    from studio.bases.sticker_video.conditioning import predicted

    with torch.no_grad():
        guided = pipe._guided(x, torch.tensor(500), text, empty, condition, 5.0, 2.0)
        time = torch.tensor([500])
        both, image, nothing = (
            predicted(pipe.unet, x, time, t, c, "blend")
            for t, c in ((text, condition), (empty, condition), (empty, condition.without_pictures()))
        )
    expected = nothing + 2.0 * (image - nothing) + 5.0 * (both - image)
    assert torch.allclose(guided, expected, atol=1e-5)


def test_sampling_is_seeded_and_a_clip_does_not_depend_on_its_neighbours(base):
    request = Request(["a cat"] * 3, [1, 2, 1], steps=2, frames=3)
    drawn = base.generate(request)
    pixels = [[f.tobytes() for f in clip.frames] for clip in drawn]
    assert pixels[0] == pixels[2] != pixels[1]


def test_a_longer_clip_begins_with_the_noise_of_a_shorter_one(base):
    short, long = (base.pipe._noise(1, n, (16, 16), seeded(), torch.device("cpu"), None) for n in (3, 8))
    assert torch.equal(long[:, :, :3], short)


def test_a_clip_has_the_rate_length_and_size_asked_for(base):
    seen = []
    clip = base.generate(
        Request(
            ["a cat"],
            [0],
            steps=2,
            frames=4,
            fps=5.0,
            loop=True,
            width=24,
            height=16,
            on_step=lambda *s: seen.append(s),
        )
    )[0]
    assert clip.durations == (200,) * 4
    assert clip.loop
    assert clip.size == (24, 16)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_frames": 0}, "0 frames"),
        ({"num_frames": 17}, "17 frames"),
        ({"frames": {5: drawing()}, "num_frames": 5}, "frame 5"),
        ({"frames": {-1: drawing()}}, "frame -1"),
        ({"frames": {0: drawing()}, "num_frames": 1}, "nothing is left"),
        ({"fps": -1}, "frames a second"),
        ({"height": 17}, "multiples"),
    ],
)
def test_impossible_requests_are_refused(base, options, word):
    with pytest.raises(RequestError, match=word):
        base.pipe("a cat", **options)


def test_saved_and_loaded_base_is_the_same_in_a_fresh_process(base, tmp_path):
    folder = tmp_path / "saved"
    base.pipe.save_pretrained(folder)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    loaded = load_base(folder)
    assert type(loaded) is StickerVideo
    assert loaded.check(base.identity(), needs_values=True) == ""
    weights = loaded.pipe.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in base.pipe.unet.state_dict().items())
    # Both sides read from the file; still the last bit of MKL's products depends on where in memory a weight lies.
    drawn = loaded.generate(Request(["a cat"], [3], steps=2, frames=3))[0]
    (tmp_path / "expected").write_bytes(b"".join(f.tobytes() for f in drawn.frames))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from studio.bases.sticker_video.pipeline import StickerVideoPipeline\n"
        f"pipe = StickerVideoPipeline.from_pretrained({str(folder)!r}, local_files_only=True)\n"
        "g = torch.Generator('cpu').manual_seed(3)\n"
        "frames = pipe('a cat', num_frames=3, num_inference_steps=2, generator=g).frames[0]\n"
        f"open({str(tmp_path / 'drawn')!r}, 'wb').write(b''.join(f.tobytes() for f in frames))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    expected, found = (np.fromfile(tmp_path / name, np.uint8).astype(int) for name in ("expected", "drawn"))
    assert expected.shape == found.shape
    assert abs(expected - found).max() <= 1


def test_a_folder_that_brings_code_is_still_refused(base, tmp_path):
    base.pipe.save_pretrained(tmp_path / "b")
    index = tmp_path / "b" / "model_index.json"
    index.write_text(index.read_text().replace("studio.bases.sticker_video.network", "somewhere.else"))
    with pytest.raises(BaseError, match="code of its own"):
        load_base(tmp_path / "b")


def test_the_family_is_known_by_its_medium():
    assert families()["sticker_video"].medium == "video"


# -- transparency ----------------------------------------------------------------------------------------------------


def test_joining_undoes_splitting_wherever_something_is_seen():
    rgba = torch.rand(3, 4, 8, 8, generator=seeded())
    rgba[:, 3] = rgba[:, 3].clamp(min=0.2)
    for ground in (0.0, 0.5, 1.0):
        again = alpha.join(*alpha.split(rgba, ground), ground)
        assert torch.allclose(again, rgba, atol=1e-5)


def test_pictures_are_fitted_whole_and_their_own_size_is_untouched():
    picture = drawing()
    assert alpha.fitted(picture, (16, 16)).tobytes() == picture.tobytes()
    wide = alpha.fitted(Image.new("RGBA", (40, 20), (255, 0, 0, 255)), (16, 16))
    opaque = np.asarray(wide)[..., 3] == 255
    assert opaque.any(1).sum() == 8
    assert opaque.any(0).sum() == 16


def test_pictures_survive_the_way_to_tensors_and_back():
    pictures = [drawing(i) for i in range(3)]
    again = alpha.to_pictures(alpha.to_tensor(pictures))
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures]


# -- what decoding loses of given frames ---------------------------------------------------------------------------


def lossy(seed=0, frames=5):
    """Frames as decoded, what they should be, and frames 0 and 3 known."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(frames, 4, 6, 6, generator=generator) * 2 - 1
    drawn = truth + 0.1 * torch.randn(frames, 4, 6, 6, generator=generator)
    known = torch.zeros(frames, dtype=torch.bool)
    known[[0, 3]] = True
    return drawn, truth, known


def test_what_was_lost_of_given_frames_comes_back_where_a_frame_looks_the_same():
    drawn, truth, known = lossy()
    drawn[1] = drawn[0]
    drawn[4] = drawn[3]
    found = restored(drawn, truth, known)
    torch.testing.assert_close(found[known], truth[known])
    torch.testing.assert_close(found[4], truth[3])  # beyond the last given frame, and the same: all of it
    # Between two given frames both count by their nearness: frame 1 is two thirds of frame 0's.
    far = (drawn[1] - drawn[3]).square().mean(0)
    other = torch.exp(-far / (2 * 0.2**2)) * (truth[3] - drawn[3])
    torch.testing.assert_close(found[1], drawn[1] + (2 * (truth[0] - drawn[0]) + other) / 3)


def test_what_was_lost_stays_lost_where_a_frame_looks_otherwise_or_nothing_is_given():
    drawn, truth, known = lossy()
    drawn[2] = drawn[0] + 2
    drawn[2, :, :3] = drawn[0, :, :3] - 2
    found = restored(drawn, truth, known)
    torch.testing.assert_close(found[2], drawn[2])
    assert restored(drawn, truth, torch.zeros_like(known)) is drawn


def test_frames_around_a_given_one_are_nearer_to_it_than_their_latents_are(base):
    picture = drawing(1)
    latents = base.pipe.encode_rgba(alpha.to_tensor([picture])).expand(3, -1, -1, -1)
    plain = base.pipe.decode_rgba(latents)
    better = base.pipe.decode_rgba(latents, {1: picture})
    split = [torch.cat(alpha.split(x, 1.0), 1) for x in (alpha.to_tensor([picture] * 3), plain, better)]
    assert (split[2] - split[0]).square().mean() < 1e-4 < (split[1] - split[0]).square().mean()


# -- noise that frames share -----------------------------------------------------------------------------------------


def test_shared_noise_has_unit_variance_the_told_correlation_and_begins_as_a_shorter_clips():
    noise = clip_noise(4, (64, 64), 0.3, seeded())
    across = torch.corrcoef(noise.flatten(1))
    torch.testing.assert_close(noise.std((1, 2)), torch.ones(4), atol=0.03, rtol=0)
    torch.testing.assert_close(across[~torch.eye(4, dtype=torch.bool)], torch.full((12,), 0.3), atol=0.04, rtol=0)
    assert torch.equal(clip_noise(2, (64, 64), 0.3, seeded()), noise[:2])
    assert torch.equal(clip_noise(4, (64, 64), 0.0, seeded()), torch.randn(4, 64, 64, generator=seeded()))


def test_a_network_that_draws_frame_by_frame_draws_nearly_one_picture_from_nearly_one_noise(tmp_path):
    still = StickerVideo.tiny()  # its layers over time add nothing yet
    spread = {}
    for share in (0.0, 0.99):
        still.pipe.register_to_config(noise_share=share)
        latents = still.pipe(
            "a cat", num_frames=4, num_inference_steps=2, generator=seeded(), output_type="latent"
        ).frames
        spread[share] = float(latents.std(2).mean())
    assert spread[0.99] < 0.3 * spread[0.0]
    still.pipe.save_pretrained(tmp_path)
    assert type(still.pipe).from_pretrained(tmp_path).config.noise_share == 0.99
