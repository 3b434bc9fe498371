"""MusicGen agrees with transformers' own: labels, masks, generation, files. On a pico network of the real class."""

import time

import pytest
import torch
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from studio.base import Request, same_values
from studio.bases.musicgen import MusicGen
from studio.bases.registry import load_base
from studio.errors import AdapterError, BaseError, PresetError, RequestError
from studio.music.delay import IGNORED, delayed, token_losses

PAD = 32


@pytest.fixture(scope="module")
def base():
    return MusicGen.tiny()


def some_codes(count=2, frames=12, seed=0):
    return torch.randint(0, 32, (count, 4, frames), generator=torch.Generator().manual_seed(seed))


# -- the delay pattern ----------------------------------------------------------------------


def test_labels_hold_every_frame_of_every_codebook():
    codes = some_codes()
    inputs, labels = delayed(codes, PAD)
    assert torch.equal(torch.stack([labels[:, k, k : k + codes.shape[2]] for k in range(4)], 1), codes)
    assert int((labels != IGNORED).sum()) == codes.numel()
    assert torch.equal(inputs[..., 1:], labels[..., :-1].masked_fill(labels[..., :-1] == IGNORED, PAD))
    assert (inputs[..., 0] == PAD).all()


def test_the_layout_is_that_of_generation(base):
    codes = some_codes()
    inputs, labels = delayed(codes, PAD)
    steps = labels.shape[-1]
    whole = torch.cat([inputs, labels[..., -1:].masked_fill(labels[..., -1:] == IGNORED, PAD)], -1)
    start = torch.full((8, 1), PAD)
    _, mask = base.denoiser.decoder.build_delay_pattern_mask(start, PAD, max_length=steps + 1)
    masked = base.denoiser.decoder.apply_delay_pattern_mask(whole.flatten(0, 1), mask)
    assert torch.equal(masked, whole.flatten(0, 1))  # pads exactly where generation puts them
    assert int((mask == -1).sum()) == codes.numel()  # and a free place for every frame


@torch.no_grad()
def test_loss_is_transformers_own_on_delayed_labels(base):
    codes, condition = some_codes(), base.encode_prompts(["a cat", "a photo of a dog"])
    _, labels = delayed(codes, PAD)
    theirs = base.denoiser(
        encoder_outputs=(condition["text"],), attention_mask=condition["mask"], labels=labels.transpose(1, 2).clone()
    ).loss
    assert torch.allclose(base.losses(codes, condition).mean(), theirs, rtol=1e-6)


@torch.no_grad()
def test_loss_has_one_value_per_sample_and_samples_do_not_meet(base):
    prompts = ["a cat", "", "a photo of a dog"]
    codes, condition = some_codes(3), base.encode_prompts(prompts)
    together = base.losses(codes, condition)
    alone = torch.cat([base.losses(codes[i : i + 1], base.encode_prompts([p])) for i, p in enumerate(prompts)])
    assert together.shape == (3,)
    assert torch.allclose(together, alone, rtol=1e-5)


def test_cross_entropy_of_a_sure_and_right_network_is_zero():
    _, labels = delayed(some_codes(), PAD)
    right = torch.nn.functional.one_hot(labels.clamp(min=0), 32) * 100.0
    assert torch.allclose(token_losses(right, labels), torch.zeros(2), atol=1e-6)


def test_some_codes_may_count_more():
    _, labels = delayed(torch.tensor([[[0, 1, 2], [1, 2, 0]]]), 3)
    logits = torch.zeros(1, 2, 4, 3)
    logits[:, 0] = torch.tensor([0.0, 1.0, 2.0])
    logits[:, 1, 2] = torch.tensor([0.0, 0.0, 5.0])  # the step in which the second codebook has its second frame
    weights = torch.tensor([[[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]]])
    first, second = (token_losses(logits[:, k : k + 1], labels[:, k : k + 1]) for k in (0, 1))
    torch.testing.assert_close(token_losses(logits, labels), (first + second) / 2)
    torch.testing.assert_close(token_losses(logits, labels, weights), (3 * first + second) / 4)
    weights = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    torch.testing.assert_close(
        token_losses(logits, labels, weights), torch.logsumexp(torch.tensor([[0.0, 0.0, 5.0]]), 1) - 5.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_null_condition_is_that_of_guidance_and_finite(dtype):
    base = MusicGen.tiny()
    base.denoiser.to(dtype)
    condition = base.encode_prompts(["", "a cat"])
    assert condition["mask"][0].sum() == 0
    null = base.denoiser.get_unconditional_inputs(1)
    losses = base.losses(some_codes(2), condition)
    theirs = base.losses(some_codes(2)[:1], {"text": null.encoder_outputs[0], "mask": null.attention_mask})
    assert torch.isfinite(losses).all()
    assert torch.allclose(losses[:1], theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2)


# -- sounds ----------------------------------------------------------------------


def test_codes_are_those_of_the_codec_and_decode_to_its_sound(base):
    wave = torch.randn(2, 1, 1600, generator=torch.Generator().manual_seed(0))
    codes = base.encode_sounds(wave)
    assert codes.shape == (2, 4, 50)
    assert len(codes[:, 0].unique()) > 4
    with torch.no_grad():
        own = base.denoiser.audio_encoder.encode(wave).audio_codes
        assert torch.equal(codes, own[0])
        assert torch.equal(base.decode_sounds(codes), base.denoiser.audio_encoder.decode(own, [None]).audio_values)


def test_stereo_codes_are_left_and_right_in_turn():
    base = MusicGen.tiny()
    left, right = (torch.randn(1, 1, 320, generator=torch.Generator().manual_seed(i)) for i in range(2))
    sides = [base.encode_sounds(side) for side in (left, right)]
    base.denoiser.config.decoder.audio_channels = 2
    codes = base.encode_sounds(torch.cat([left, right], 1))
    assert torch.equal(codes[:, ::2], sides[0])
    assert torch.equal(codes[:, 1::2], sides[1])
    assert base.decode_sounds(codes).shape == (1, 2, 320)


def test_playing_is_seeded_and_a_sound_does_not_depend_on_its_neighbours(base):
    state = torch.get_rng_state()
    played = base.generate(Request(["a cat"] * 3, [1, 2, 1], seconds=0.2))
    again = base.generate(Request(["a cat"], [1], seconds=0.2))[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(played[0].wave, again.wave)
    assert torch.equal(played[2].wave, again.wave)
    assert not torch.equal(played[1].wave, again.wave)
    assert played[0].wave.shape == (1, 320)
    assert played[0].sample_rate_hz == 1600


def test_playing_is_what_transformers_plays(base):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        told = base.pipe.processor(text=["a cat"], return_tensors="pt")
        theirs = base.denoiser.generate(**told, do_sample=True, guidance_scale=3.0, top_k=250, max_new_tokens=13)
    assert torch.equal(base.generate(Request(["a cat"], [5], seconds=0.2))[0].wave, theirs[0])


def test_playing_counts_its_steps(base):
    seen = []
    base.generate(Request([""], [1], seconds=0.1, on_step=lambda done, total: seen.append((done, total))))
    assert seen == [(i, 8) for i in range(1, 9)]  # 5 frames, and 3 more steps for the last codebook


@pytest.mark.parametrize("asked", [{"negative": "noise"}, {"steps": 3}, {"width": 64}, {"seconds": 99.0}])
def test_what_musicgen_has_not_is_refused(base, asked):
    with pytest.raises(RequestError, match="tiny-musicgen"):
        base.generate(Request(["a cat"], [1], **asked))


# -- the contract of a base ----------------------------------------------------------------------


def test_every_site_exists_and_fires_and_the_codec_has_none(base):
    fired = set()
    sites = base.sites()
    hooks = [s.module.register_forward_hook(lambda *_, name=name: fired.add(name)) for name, s in sites.items()]
    with torch.no_grad():
        base.losses(some_codes(), base.encode_prompts(["a cat", "dog"]))
    for hook in hooks:
        hook.remove()
    assert fired == set(sites)
    assert not any("audio_encoder" in name for name in sites)
    for name, site in sites.items():
        assert base.denoiser.get_submodule(name.removeprefix("musicgen.")) is site.module


def test_every_group_matches_what_it_says(base):
    kinds = ("linear", "embedding", "block", "norm")
    counts = {group: len(base.select([group], kinds)) for group in base.groups}
    parts = dict.fromkeys(("text_states", "after_final_norm"), 1)
    parts |= dict.fromkeys(("after_self_attn", "after_cross_attn", "after_ffn", "after_layer"), 3)
    assert counts == parts | {"attention": 24, "cross-attention": 12, "linear": 35, "text-encoder": 12, "all": 39}
    with pytest.raises(PresetError, match="attentoin"):
        base.select(["attentoin"])


def test_tiny_is_built_from_its_seed_alone():
    state = torch.get_rng_state()
    started = time.process_time()
    one, again, other = MusicGen.tiny(0), MusicGen.tiny(0), MusicGen.tiny(1)
    assert time.process_time() - started < 4
    assert torch.equal(torch.get_rng_state(), state)
    assert one.identity() == again.identity()
    assert not same_values(one.identity().values, other.identity().values)
    assert one.identity().architecture == other.identity().architecture
    assert "other weights" in other.check(one.identity())
    with pytest.raises(AdapterError, match="depends on the weights"):
        other.check(one.identity(), needs_values=True)


def test_a_base_is_at_rest(base):
    assert not base.denoiser.training
    assert not any(p.requires_grad for p in base.denoiser.parameters())


def test_saved_and_loaded_base_is_the_same_here_and_in_transformers(base, tmp_path):
    base.pipe.save_pretrained(tmp_path / "saved")
    loaded = load_base(tmp_path / "saved")
    assert type(loaded) is MusicGen
    assert loaded.check(base.identity(), needs_values=True) == ""
    request = Request(["a cat"], [3], seconds=0.2)
    assert torch.equal(loaded.generate(request)[0].wave, base.generate(request)[0].wave)
    test_a_base_is_at_rest(loaded)
    stock = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    told = AutoProcessor.from_pretrained(tmp_path / "saved")(text=["a cat"], return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = stock.generate(**told, do_sample=True, guidance_scale=3.0, max_new_tokens=13)
    assert torch.allclose(theirs[0], base.generate(request)[0].wave, atol=1e-5)


def test_half_precision_keeps_the_codec_exact(base, tmp_path):
    base.pipe.save_pretrained(tmp_path / "saved")
    half = load_base(tmp_path / "saved", dtype="bf16")
    assert half.denoiser.decoder.dtype == torch.bfloat16
    assert half.denoiser.audio_encoder.dtype == torch.float32
    assert same_values(half.identity().values, base.identity().values)
    wave = torch.randn(1, 1, 320, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half.encode_sounds(wave), base.encode_sounds(wave))
    with torch.no_grad():
        losses = [b.losses(some_codes(1), b.encode_prompts(["a cat"])) for b in (half, base)]
    assert torch.allclose(*losses, rtol=0.05)
    assert half.generate(Request(["a cat"], [3], seconds=0.1))[0].wave.dtype == torch.float32


def test_a_folder_with_tensors_missing_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    base.pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.lm_heads.2.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseError, match="lm_heads"):
        load_base(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="no weights"):
        load_base(tmp_path / "saved")
