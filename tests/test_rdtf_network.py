"""The clip network: padding changes nothing, stills train no time, it starts as its image network, any length."""

import itertools

import pytest
import torch

from studio.adapter import Card, new_adapter
from studio.attachment import attach
from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.sticker_video.building import paper_unet, video_around, with_words
from studio.bases.sticker_video.conditioning import Anchor, ClipCondition, blended, network_input, predicted
from studio.bases.sticker_video.family import StickerVideo
from studio.bases.sticker_video.layers import Frames, TextSummary, attend_plainly, with_neighbours
from studio.method import method_from
from studio.objective import Diffusion


def awake(base, seed=0):
    """The network with temporal layers that do something, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    unet = base.pipe.unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.abs().sum() == 0 or name.endswith(".weights"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet.double()


def condition_for(lengths, frames, channels=8, side=8, loop=False, given=(), seed=3):
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    valid = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    told = torch.zeros(batch, frames, dtype=torch.bool)
    told[:, list(given)] = True
    latents = torch.randn(batch, channels, frames, side, side, generator=generator, dtype=torch.float64)
    return ClipCondition(latents, told, valid, torch.full((batch,), 8.0), torch.full((batch,), loop))


def inputs(batch, frames, channels=8, side=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, channels, frames, side, side, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, 16, 32, generator=generator, dtype=torch.float64)
    return noisy, torch.tensor([500] * batch), text


@pytest.fixture(scope="module")
def base():
    return StickerVideo.tiny()


@pytest.fixture(scope="module")
def moving():
    base = StickerVideo.tiny()
    awake(base)
    return base


def test_clip_network_starts_as_its_image_network_frame_by_frame():
    image = StableDiffusion.tiny()
    video = video_around(StableDiffusion.tiny(), "v", interaction_head_dim=4)
    generator = torch.Generator().manual_seed(0)
    colour = torch.randn(2, 4, 5, 8, 8, generator=generator)
    everything = torch.cat([colour, torch.randn(2, 4, 5, 8, 8, generator=generator)], 1)
    text = torch.randn(2, 16, 32, generator=generator)
    condition = ClipCondition(
        torch.randn(2, 8, 5, 8, 8, generator=generator),
        torch.zeros(2, 5, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.bool),
        torch.tensor([8.0, 0.0]),
        torch.tensor([True, False]),
    )
    time = torch.tensor([10, 700])
    with torch.no_grad():
        drawn = predicted(video.pipe.unet, everything, time, text, condition, "blend")
        for frame in range(5):
            alone = image.pipe.unet(colour[:, :, frame], time, encoder_hidden_states=text).sample
            assert torch.allclose(drawn[:, :4, frame], alone, atol=1e-6)
    assert torch.equal(drawn[:, 4:], torch.zeros_like(drawn[:, 4:]))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("fill", ["blend", "zero"])
def test_padding_may_hold_nan_and_changes_no_output_and_no_gradient(moving, loop, fill):
    unet = moving.pipe.unet.requires_grad_(True)
    noisy, time, text = inputs(2, 5)
    condition = condition_for([3, 5], 5, loop=loop, given=(0,))

    def outcome(garbage):
        x, given = noisy.clone(), condition.given.clone()
        x[0, :, 3:], given[0, :, 3:] = garbage, garbage
        told = ClipCondition(**{**condition.tensors(), "given": given})
        unet.zero_grad()
        out = predicted(unet, x, time, text, told, fill)
        valid = condition.valid[:, None, :, None, None].expand_as(out)
        out[valid].square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
        return out[valid].detach(), gradients

    plain, plain_gradients = outcome(0.0)
    for garbage in (float("nan"), 1e6):
        values, gradients = outcome(garbage)
        assert torch.equal(values, plain)
        assert gradients.keys() == plain_gradients.keys()
        assert all(torch.equal(gradients[n], plain_gradients[n]) for n in gradients)
    assert torch.isfinite(plain).all()


@pytest.mark.parametrize(("n", "loop"), [(1, False), (2, False), (3, True), (7, False), (7, True)])
def test_a_padded_clip_equals_the_clip_at_its_own_length(moving, n, loop):
    noisy, time, text = inputs(2, 8)
    whole = condition_for([n, 8], 8, loop=loop, given=(0,))
    with torch.no_grad():
        padded = predicted(moving.pipe.unet, noisy, time, text, whole, "blend")[:1, :, :n]
        own = ClipCondition(
            whole.given[:1, :, :n], whole.is_given[:1, :n], whole.valid[:1, :n], whole.fps[:1], whole.loop[:1]
        )
        cropped = predicted(moving.pipe.unet, noisy[:1, :, :n], time[:1], text[:1], own, "blend")
    assert (padded - cropped).abs().max() < 1e-10


def test_every_length_from_1_to_16_comes_from_one_checkpoint(moving):
    with torch.no_grad():
        for n in range(1, 17):
            noisy, time, text = inputs(1, n)
            out = predicted(moving.pipe.unet, noisy, time, text, condition_for([n], n), "blend")
            assert out.shape == noisy.shape
            assert torch.isfinite(out).all()


def test_frames_see_each_other_and_only_their_own_clip(moving):
    noisy, time, text = inputs(2, 4)
    condition = condition_for([4, 4], 4)
    changed = noisy.clone()
    changed[0, :, 3] += 1
    with torch.no_grad():
        before, after = (predicted(moving.pipe.unet, x, time, text, condition, "blend") for x in (noisy, changed))
    assert (before[0, :, 0] - after[0, :, 0]).abs().max() > 1e-6
    assert torch.allclose(before[1], after[1], atol=1e-12)


def test_stills_train_spatial_weights_only(moving):
    unet = moving.pipe.unet.requires_grad_(True)
    temporal = {n for n in unet.temporal_names() if "_time" in n or "time_in" in n}
    for count, lengths in ((1, [1, 1]), (4, [1, 1])):
        unet.zero_grad()
        noisy, time, text = inputs(2, count)
        condition = condition_for(lengths, count)
        predicted(unet, noisy, time, text, condition, "blend")[:, :, :1].square().sum().backward()
        for name, parameter in unet.named_parameters():
            if name in temporal:
                assert parameter.grad is None or not parameter.grad.any(), name
        assert unet.image.conv_in.weight.grad.abs().sum() > 0


def test_every_temporal_layer_learns_from_a_clip_by_its_second_step(base):
    unet = StickerVideo.tiny().pipe.unet.requires_grad_(True)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
    noisy, time, text = (x.float() if x.is_floating_point() else x for x in inputs(1, 4))
    seen = set()
    for _ in range(4):
        optimizer.zero_grad()
        out = predicted(unet, noisy, time, text, condition_for([4], 4, loop=True), "blend")
        (out - noisy).square().mean().backward()
        seen |= {n for n, p in unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    assert unet.temporal_names() - seen == set()


def test_a_looping_clip_has_no_first_frame():
    """The convolution over time sees a circle: turning the clip turns the result."""
    hidden = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    frames = Frames.of(None, 5, torch.tensor([True]))
    conv = torch.nn.Conv3d(2, 2, (3, 1, 1))
    turned = conv(with_neighbours(hidden.roll(2, 0), frames))
    assert torch.allclose(turned, conv(with_neighbours(hidden, frames)).roll(2, 2), atol=1e-6)


def test_blend_is_linear_between_given_frames_and_constant_outside():
    given = torch.zeros(1, 1, 6, 1, 1)
    given[0, 0, 1], given[0, 0, 4] = 1.0, 7.0
    known = torch.tensor([[False, True, False, False, True, False]])
    valid = torch.tensor([[True, True, True, True, True, False]])
    assert blended(given, known, valid).flatten().tolist() == pytest.approx([1, 1, 3, 5, 7, 0], abs=1e-5)
    assert blended(given, torch.zeros_like(known), valid).abs().sum() == 0


def test_network_is_told_given_frames_and_not_their_noise():
    noisy, _, _ = inputs(1, 4)
    condition = condition_for([4], 4, given=(2,))
    x = network_input(noisy, condition, "zero")
    assert x.shape == (1, 17, 4, 8, 8)
    assert torch.equal(x[:, :8, 2], torch.zeros_like(x[:, :8, 2]))
    assert torch.equal(x[:, 8:16, 2], condition.given[:, :, 2])
    assert x[:, 16].unique().tolist() == [0, 1]
    assert x[:, 8:16, [0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_anchored_prediction_of_nothing_is_the_best_linear_guess_from_the_blend(kind):
    """Least squares over many draws of x_0 = g + d n and x_t = a x_0 + s e finds the anchor's own coefficients."""
    generator = torch.Generator().manual_seed(0)
    d, squared = 0.7, torch.tensor([0.95, 0.6, 0.05])
    anchor, objective = Anchor(squared, kind, d), Diffusion(squared, kind)
    shape = (1, 1, 1, 400, 500)
    for time in (torch.tensor([0]), torch.tensor([1]), torch.tensor([2])):
        blend, rest, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        clean = blend + d * rest
        noisy, target = objective.noised(clean, noise, time), objective.target(clean, noise, time)
        zero, told = torch.zeros_like(noisy), torch.tensor([True])
        guess = anchor.joined(zero, noisy, time, blend, told)
        known = torch.stack([noisy.flatten(), blend.flatten()], 1)
        best = known @ torch.linalg.lstsq(known, target.flatten()[:, None]).solution
        assert torch.allclose(guess.flatten(), best[:, 0], atol=0.03)
        scale = anchor.joined(torch.ones_like(noisy), noisy, time, blend, told) - guess
        assert (target - guess).std() == pytest.approx(float(scale[0, 0, 0, 0, 0]), rel=0.02)
        assert torch.equal(anchor.joined(noise, noisy, time, blend, torch.tensor([False])), noise)


def test_a_network_with_given_frames_starts_at_the_best_linear_guess():
    base = video_around(StableDiffusion.tiny(), "clips", interaction_head_dim=4, residual_head=True)
    noisy, time, text = (value.float() if value.is_floating_point() else value for value in inputs(2, 4))
    condition = condition_for([4, 4], 4, given=(0,))
    condition = ClipCondition(condition.given.float(), *list(condition.tensors().values())[1:])
    condition.is_given[1] = False
    anchor = Anchor(base.pipe.scheduler.alphas_cumprod, "v_prediction", 0.7)
    with torch.no_grad():
        found = predicted(base.pipe.unet, noisy, time, text, condition, "blend", anchor)
        plain = predicted(base.pipe.unet, noisy, time, text, condition, "blend")
    blend = blended(
        condition.given.masked_fill(~condition.is_given[:, None, :, None, None], 0), condition.is_given, condition.valid
    )
    guess = anchor.joined(torch.zeros_like(noisy), noisy, time, blend, torch.tensor([True, False]))
    assert torch.equal(found[0], guess[0])
    assert torch.equal(found[1], plain[1])
    assert found[1].abs().sum() > 0


def test_changes_of_low_rank_are_nothing_at_first_and_leave_the_image_network_alone():
    plain = video_around(StableDiffusion.tiny(), "v", interaction_head_dim=4)
    changed = video_around(StableDiffusion.tiny(), "v", interaction_head_dim=4, spatial_rank=2)
    noisy, time, text = (value.float() if value.is_floating_point() else value for value in inputs(1, 3))
    x = torch.cat([noisy, torch.zeros(1, 9, 3, 8, 8)], 1)
    with torch.no_grad():
        before = plain.pipe.unet(x, time, text).sample
        assert torch.equal(before, changed.pipe.unet(x, time, text).sample)
        for name, parameter in changed.pipe.unet.named_parameters():
            if name.endswith(".up"):
                parameter.fill_(0.1)
        assert not torch.allclose(before, changed.pipe.unet(x, time, text).sample)
    new = changed.pipe.unet.temporal_names() - plain.pipe.unet.temporal_names()
    assert new
    assert all(name.startswith("spatial_change.") for name in new)


def test_layers_over_time_are_told_of_rate_loop_and_text_and_padding_still_changes_nothing():
    told = video_around(StableDiffusion.tiny(), "v", interaction_head_dim=4, temporal_told=True)
    noisy, time, text = inputs(2, 4)
    condition = condition_for((4, 2), 4)
    unet = told.pipe.unet.double()
    with torch.no_grad():
        start = predicted(unet, noisy, time, text, condition, "zero")
        plain = video_around(StableDiffusion.tiny(), "v", interaction_head_dim=4).pipe.unet.double()
        assert torch.equal(start, predicted(plain, noisy, time, text, condition, "zero"))
        awake(told)
        whole = predicted(unet, noisy, time, text, condition, "zero")
        garbage = noisy.clone()
        garbage[1, :, 2:] = torch.nan
        assert torch.equal(predicted(unet, garbage, time, text, condition, "zero")[1, :, :2], whole[1, :, :2])
        unet.text_summary.mark.weight.zero_()
        unet.text_summary.proj.weight.zero_()
        unmoved = predicted(unet, noisy, time, text, condition, "zero")
        assert not torch.allclose(unmoved[:, :, :2], whole[:, :, :2])
        still = condition_for((1, 1), 1)
        one = predicted(unet, noisy[:, :, :1], time, text, still, "zero")
        unet.text_summary.proj.bias.add_(1)
        assert torch.equal(one, predicted(unet, noisy[:, :, :1], time, text, still, "zero"))


def test_a_word_is_found_whole_among_any_number_of_others():
    summary = TextSummary(8, 4)
    torch.nn.init.normal_(summary.proj.weight)
    words = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    longer = torch.cat([words, words[:, 2:].expand(1, 20, 8)], 1)
    assert torch.allclose(summary(words), summary(longer), atol=1e-6)
    assert not torch.allclose(summary(words), summary(words[:, 1:]), atol=1e-3)


def test_plain_attention_gives_the_same_with_and_without_padding(moving):
    other = StickerVideo.tiny()
    awake(other)
    attend_plainly(other.pipe.unet)
    noisy, time, text = inputs(2, 4)
    for lengths in ((4, 4), (4, 2)):
        condition = condition_for(lengths, 4)
        with torch.no_grad():
            one, two = (predicted(b.pipe.unet, noisy, time, text, condition, "zero") for b in (moving, other))
        assert torch.allclose(one[0], two[0], atol=1e-10)
        assert torch.allclose(one[1, :, : lengths[1]], two[1, :, : lengths[1]], atol=1e-10)


def test_the_papers_network_has_the_papers_size():
    """RDTF's table 8 says 0.96 B; its published class has 22 interactions of 19.4 M and 17 transformers of 213.5 M."""
    with torch.device("meta"):
        unet = paper_unet()
    parts = {}
    for module in unet.modules():
        count = sum(p.numel() for p in module.parameters())
        parts.setdefault(type(module).__name__, []).append(count)
    assert len(parts["SpatialTemporalInteraction"]) == 22
    assert sum(parts["SpatialTemporalInteraction"]) / 1e6 == pytest.approx(19.4, rel=0.02)
    assert len(parts["MaskedTemporalAttention"]) == 17
    assert sum(parts["MaskedTemporalAttention"]) / 1e6 == pytest.approx(213.5, rel=0.001)
    assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(0.960, rel=0.003)


def test_gradient_checkpointing_gives_the_same_gradients(moving):
    unet = moving.pipe.unet.requires_grad_(True)
    noisy, time, text = inputs(1, 3)
    condition = condition_for([3], 3)

    def gradients():
        unet.zero_grad()
        predicted(unet, noisy, time, text, condition, "blend").square().sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    plain = gradients()
    unet.enable_gradient_checkpointing()
    again = gradients()
    unet.disable_gradient_checkpointing()
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(plain, again, strict=True))


def test_stock_backbone_is_a_plain_diffusers_class_and_takes_no_padding():
    from diffusers import UNet3DConditionModel

    base = video_around(StableDiffusion.tiny(), "stock", backbone="stock_unet3d")
    assert type(base.pipe.unet) is UNet3DConditionModel
    noisy, time, text = (x.float() if x.is_floating_point() else x for x in inputs(2, 3))
    with torch.no_grad():
        out = predicted(base.pipe.unet, noisy, time, text, condition_for([3, 3], 3, given=(0,)), "blend")
        assert out.shape == noisy.shape
        with pytest.raises(ValueError, match="no padded clips"):
            predicted(base.pipe.unet, noisy, time, text, condition_for([2, 3], 3), "blend")


def test_new_words_are_whole_and_old_ones_keep_their_vectors():
    image = StableDiffusion.tiny()
    old_words, old_text = image.pipe.tokenizer, image.pipe.text_encoder
    words, text = with_words(old_words, old_text, ["bouncing", "slowly"])
    assert len(words("a cat bouncing slowly").input_ids) == 6
    assert with_words(words, text, ["bouncing"]) == (words, text)
    with torch.no_grad():
        one, two = (
            encoder(tokenizer(["a photo of a cat"], return_tensors="pt").input_ids)[0]
            for tokenizer, encoder in ((old_words, old_text), (words, text))
        )
    assert torch.allclose(one, two, atol=1e-6)


# -- the family ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_prediction(base, count=3):
    side = base.resolution // base.latent_factor
    noisy = torch.randn(1, 8, count, side, side, generator=torch.Generator().manual_seed(0))
    condition = base.encode_prompts(["a photo of a cat"], (16, 16)) | {"fps": torch.tensor([8.0])}
    return base.predict(noisy, torch.tensor([500]), condition)


def test_every_site_fires_on_a_clip(base):
    fired = set()
    hooks = [s.module.register_forward_hook(lambda *_, name=n: fired.add(name)) for n, s in base.sites().items()]
    clip_prediction(base)
    for hook in hooks:
        hook.remove()
    assert fired == set(base.sites())


def test_groups_share_out_space_and_time(base):
    for group in base.groups:
        assert base.select([group])
    space, time = base.select(["spatial"]), base.select(["temporal"])
    assert not set(space) & set(time)
    rest = set(base.select(["all"])) - set(space) - set(time)
    assert all("fps_embedding" in name or "loop_embedding" in name for name in rest)


def test_adapters_attach_to_a_clip_network_and_leave_it_bit_for_bit(moving):
    moving = StickerVideo.tiny()
    awake(moving).float()
    method = method_from({"kind": "lora", "rank": 2, "target_modules": ["attention"]})
    sites = moving.select(method.target_modules)
    card = Card(
        method=method.model_dump(mode="json"), base=moving.identity(), sites={n: s.shape for n, s in sites.items()}
    )
    adapter = new_adapter(card)
    for terms in adapter.patches.values():
        torch.nn.init.normal_(terms["main"].up, std=0.1)
    before = clip_prediction(moving)
    with attach(sites, adapter.by_site()) as attachment:
        assert not torch.allclose(clip_prediction(moving), before)
        assert attachment.silent_sites({}) == []
    assert torch.equal(clip_prediction(moving), before)


def test_attention_group_holds_time_and_space(base):
    names = base.select(["attention"])
    kinds = [any(".image." in n for n in names), any("_time" in n for n in names)]
    assert all(kinds)
    assert len(list(itertools.chain(names))) == len(set(names))
