"""Inserted bottlenecks keep the contract of methods as far as it has a meaning without a weight-space form."""

import gc
import math

import pytest
import torch
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from studio.adapter import Card, load_adapter, new_adapter
from studio.attachment import attach
from studio.base import Request
from studio.bases.musicgen import MusicGen
from studio.errors import AdapterError, PresetError
from studio.method import Origin, method_from, methods
from studio.music.inserted import MusicMethod
from studio.patch import LayerShape

KINDS = [kind for kind, cls in methods().items() if issubclass(cls, MusicMethod)]
PLACES = ["after_layer", "after_self_attn", "after_cross_attn", "after_ffn", "after_final_norm", "text_states"]
IN_TIME = [place for place in PLACES if place != "text_states"]
SIZES = {"small": (24, 1024), "medium": (48, 1536), "large": (48, 2048)}


@pytest.fixture(scope="module")
def base():
    return MusicGen.tiny()


def adapter_on(base, kind, seed=3, **settings):
    method = method_from({"kind": kind, "bottleneck": 6, **settings})
    sites = method.sites(base)
    card = Card(
        method=method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: site.shape for name, site in sites.items()},
        seed=seed,
    )
    return sites, new_adapter(card, {name: site.module for name, site in sites.items()})


def shaken(adapter, std=0.4):
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    for terms in adapter.patches.values():
        torch.nn.init.normal_(terms["main"].up, std=std, generator=generator)
        torch.nn.init.normal_(terms["main"].up_bias, std=std, generator=generator)
    return adapter


def some_codes(count=2, frames=12, seed=0):
    return torch.randint(0, 32, (count, 4, frames), generator=torch.Generator().manual_seed(seed))


def condition(base, prompts=("a cat", "a photo of a dog")):
    with torch.no_grad():
        return base.encode_prompts(list(prompts))


@torch.no_grad()
def losses(base, told=None, codes=None):
    return base.losses(some_codes() if codes is None else codes, told or condition(base))


@torch.no_grad()
def logits(base, tokens, told, cache=None):
    """(B, K, S, V) of tokens (B, K, S), which follow on what the cache has."""
    out = base.denoiser(
        encoder_outputs=BaseModelOutput(last_hidden_state=told["text"]),
        attention_mask=told["mask"],
        decoder_input_ids=tokens.flatten(0, 1),
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
    return out.view(*tokens.shape, -1)


def fresh_cache():
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


# -- the contract ----------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_to_the_bit(base, kind, place):
    bare = losses(base)
    sites, adapter = adapter_on(base, kind, placement=place)
    with attach(sites, adapter.by_site()) as attachment:
        assert torch.equal(losses(base), bare)
        assert attachment.silent_sites({}) == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_with_its_strength_and_detach_restores_everything(base, kind, place):
    bare, keys = losses(base), list(base.denoiser.state_dict())
    weights = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in base.denoiser.modules())
    sites, adapter = adapter_on(base, kind, placement=place)
    attachment = attach(sites, shaken(adapter).by_site())
    acting = losses(base)
    assert not torch.equal(acting, bare)
    attachment.weight = 0.0
    assert torch.equal(losses(base), bare)
    attachment.weight = 0.5
    assert not torch.equal(losses(base), acting)
    assert list(base.denoiser.state_dict()) == keys
    attachment.detach()
    assert torch.equal(losses(base), bare)
    assert all(torch.equal(value, weights[name]) for name, value in base.denoiser.state_dict().items())
    assert not any("forward" in vars(site.module) for site in sites.values())
    assert sum(len(module._forward_pre_hooks) for module in base.denoiser.modules()) == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_add_up_and_leave_in_any_order(base, kind):
    bare = losses(base)
    sites, first = adapter_on(base, kind, placement="after_final_norm")
    _, second = adapter_on(base, kind, seed=4, placement="after_final_norm")
    name = next(iter(sites))
    seen = {}
    hook = base.denoiser.decoder.lm_heads[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))

    def heard(*attached):
        attachments = [attach(sites, adapter.by_site(), weight) for adapter, weight in attached]
        losses(base)
        for attachment in attachments:
            attachment.detach()
        return seen["x"]

    shaken(first), shaken(second, 0.2)
    alone = heard()
    both = heard((first, 0.5), (second, 2.0))
    sum_of_both = alone + (heard((first, 0.5)) - alone) + (heard((second, 2.0)) - alone)
    hook.remove()
    torch.testing.assert_close(both, sum_of_both, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, alone, atol=1e-2)
    assert torch.equal(losses(base), bare)
    assert name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter_by_step_two(base, kind, place):
    sites, adapter = adapter_on(base, kind, placement=place)
    told, optimizer = condition(base), torch.optim.SGD(adapter.parameters(), 1.0)
    with attach(sites, adapter.by_site(), train=True):
        for _ in range(2):
            optimizer.zero_grad()
            base.losses(some_codes(), told).mean().backward()
            optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in base.denoiser.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_origin_gives_the_same_bits_and_files(base, kind, tmp_path):
    adapters = [shaken(adapter_on(base, kind, target_parameters=2500)[1]) for _ in range(2)]
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        adapter.save(tmp_path / name)
    loaded = load_adapter(tmp_path / "one")
    loaded.save(tmp_path / "three")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()
    assert adapter_on(base, kind, seed=9)[1].tensors().keys() == adapter_on(base, kind)[1].tensors().keys()
    told = losses(base)
    heard = []
    for adapter in (adapters[0], loaded):
        with attach(adapter.method.sites(base), adapter.by_site()):
            heard.append(losses(base))
    assert torch.equal(*heard)
    assert not torch.equal(heard[0], told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_another_width_is_refused(base, kind):
    _, adapter = adapter_on(base, kind)
    sites = {n: type(s)(n, s.module, LayerShape("block", (48,)), s.carrier) for n, s in base.sites().items()}
    with pytest.raises(AdapterError, match="was made for"):
        attach(sites, adapter.by_site())


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_bf16_and_on_a_bf16_base(kind):
    base = MusicGen.tiny()
    bare = losses(base)
    base.denoiser.to(torch.bfloat16)
    sites, adapter = adapter_on(base, kind)
    with attach(sites, adapter.by_site(), train=True):
        loss = base.losses(some_codes(), condition(base)).mean()
        loss.backward()
    assert torch.isfinite(loss)
    assert abs(float(loss.detach()) - float(bare.mean())) < 0.1
    assert adapter.parameters()[0].dtype == torch.float32


# -- music is written from left to right ----------------------------------------------------------------------


@pytest.mark.parametrize("place", IN_TIME)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_heard_of_the_future(base, kind, place):
    sites, adapter = adapter_on(base, kind, placement=place)
    tokens, told = some_codes(), condition(base)
    changed = tokens.clone()
    changed[:, :, 7] = (changed[:, :, 7] + 1) % 32
    with attach(sites, shaken(adapter).by_site()):
        one, other = logits(base, tokens, told), logits(base, changed, told)
    assert torch.equal(one[:, :, :7], other[:, :, :7])
    assert not torch.allclose(one[:, :, 7:], other[:, :, 7:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_with_a_cache_equals_all_at_once(base, kind, place):
    sites, adapter = adapter_on(base, kind, placement=place)
    tokens, told = some_codes(frames=20), condition(base)
    bare = logits(base, tokens, told)
    with attach(sites, shaken(adapter).by_site()):
        whole = logits(base, tokens, told)
        cache = fresh_cache()
        parts = [logits(base, tokens[..., a:b], told, cache) for a, b in [(0, 5), *((i, i + 1) for i in range(5, 20))]]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)
    assert (whole - bare).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tokens_equal_uncached_ones_under_guidance(kind):
    base = MusicGen.tiny()
    sites, adapter = adapter_on(base, kind)
    request = Request(["a cat"], [7], seconds=0.6)
    bare = base.generate(request)[0].wave
    with attach(sites, shaken(adapter).by_site()):
        waves = []
        for cached in (True, False, True):
            base.denoiser.generation_config.use_cache = cached
            waves.append(base.generate(request)[0].wave)
    assert torch.equal(waves[0], waves[1])
    assert torch.equal(waves[0], waves[2])  # nothing is left of an earlier generation
    assert not torch.equal(waves[0], bare)


@pytest.mark.parametrize("kind", ["music-convolution", "music-transformer"])
def test_state_lives_and_dies_with_the_cache(base, kind):
    sites, adapter = adapter_on(base, kind)
    tokens, told = some_codes(), condition(base)
    patch = next(iter(adapter.patches.values()))["main"]
    with attach(sites, adapter.by_site()):
        logits(base, tokens, told)
        assert len(patch.memory._states) == 0
        caches = [fresh_cache(), fresh_cache()]
        for cache in caches:
            logits(base, tokens, told, cache)
        assert len(patch.memory._states) == 2
    del caches, cache
    gc.collect()
    assert len(patch.memory._states) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_text_is_not_heard(base, kind):
    sites, adapter = adapter_on(base, kind, placement="text_states")
    with attach(sites, shaken(adapter, 2.0).by_site()):
        together = losses(base, condition(base, ("a cat", "a photo of a dog")))
        alone = losses(base, condition(base, ("a cat",)), some_codes()[:1])
        null = losses(base, condition(base, ("",)), some_codes()[:1])
    assert torch.allclose(together[:1], alone, rtol=1e-5)
    assert torch.allclose(null, losses(base, condition(base, ("",)), some_codes()[:1]), rtol=1e-6)


# -- where and how large ----------------------------------------------------------------------


def test_layers_are_chosen_by_thirds_or_by_number(base):
    def chosen(**settings):
        sites = method_from({"kind": "music-linear", **settings}).sites(base)
        return [int(name.rsplit(".", 1)[1]) for name in sites]

    assert chosen() == [0, 1, 2]
    assert chosen(layers="early") == [0]
    assert chosen(layers="late") == [2]
    assert chosen(layers=[2, 0]) == [0, 2]
    with pytest.raises(PresetError, match="there is no layer 3"):
        chosen(layers=[3])


@pytest.mark.parametrize("kind", KINDS)
def test_size_counts_what_a_patch_has(kind):
    for bottleneck in (1, 3, 8, 29):
        for settings in ({}, {"heads": 3}, {"blocks": 2, "kernel": 5, "squeeze_ratio": 2}):
            known = {k: v for k, v in settings.items() if k in methods()[kind].model_fields}
            method = method_from({"kind": kind, "bottleneck": bottleneck, **known})
            patch = method.patch("a", LayerShape("block", (20,)), Origin("c"))
            assert sum(p.numel() for p in patch.parameters()) == method.size(20, bottleneck)


def real_shapes(name):
    """The layers of a published MusicGen, built without memory."""
    layers, width = SIZES[name]
    config = MusicgenDecoderConfig(num_hidden_layers=layers, hidden_size=width, ffn_dim=4 * width)
    with torch.device("meta"):
        decoder = MusicgenForCausalLM(config).model.decoder
    assert len(decoder.layers) == layers
    return {str(i): LayerShape("block", (layer.embed_dim,)) for i, layer in enumerate(decoder.layers)}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_met_on_the_published_models_shapes(kind, name):
    shapes = real_shapes(name)
    for target in (2_000_000, 8_000_000, 20_000_000, 40_000_000, 70_000_000):
        method = method_from({"kind": kind, "target_parameters": target})
        widths = method.bottlenecks(shapes)
        total = sum(method.size(shapes[site].weight[0], width) for site, width in widths.items())
        assert abs(total - target) <= 0.02 * target
        assert max(widths.values()) - min(widths.values()) <= 1


def test_a_target_that_cannot_be_met_is_refused():
    method = method_from({"kind": "music-linear", "target_parameters": 100})
    with pytest.raises(PresetError, match="cannot be met"):
        method.bottlenecks({"a": LayerShape("block", (64,))})
    with pytest.raises(PresetError, match="target_modules"):
        method_from({"kind": "music-linear", "target_modules": ["attention"]})


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_what_the_base_does_not_know(base, kind):
    sites, adapter = adapter_on(base, kind, bottleneck=16)
    codes = torch.arange(20).remainder(5).expand(4, 4, 20) + torch.arange(4)[:, None]  # four steady patterns
    told = condition(base, ("a cat", "dog", "a dog", "photo"))
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    heard = []
    with attach(sites, adapter.by_site(), train=True):
        for _ in range(25):
            loss = base.losses(codes, told).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            heard.append(loss.item())
    assert heard[-1] < 0.7 * heard[0]
    assert math.isfinite(heard[-1])
