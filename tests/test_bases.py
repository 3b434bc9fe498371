"""Every family keeps the contract of a base, and agrees with the pipeline that it stands for."""

import os
import subprocess
import sys
import time

import pytest
import torch
from diffusers.models.attention_processor import Attention

from studio.adapter import Card, new_adapter
from studio.attachment import attach
from studio.base import Request, same_values
from studio.bases.halves import save_with_halves
from studio.bases.registry import families, load_base
from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.tiny import word_tokenizer
from studio.errors import AdapterError, BaseError, PresetError, RequestError
from studio.method import method_from
from studio.objective import Diffusion, FlowMatching
from studio.preset import Preset

FAMILIES = {name: cls for name, cls in families().items() if cls.medium == "image"}
PROMPT = "a photo of a cat"


@pytest.fixture(params=FAMILIES)
def base(request):
    return FAMILIES[request.param].tiny()


def noisy_latents(base, count, seed=0):
    side = base.resolution // base.latent_factor
    shape = (count, base.denoiser.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_time(base, fraction=0.5):
    """A network time of this family, for one sample."""
    return torch.tensor([fraction * 1000 if isinstance(base.objective, FlowMatching) else int(fraction * 1000)])


@torch.no_grad()
def predicted(base, prompts=(PROMPT,)):
    condition = base.encode_prompts(list(prompts), (base.resolution, base.resolution))
    return base.predict(noisy_latents(base, len(prompts)), a_time(base).repeat(len(prompts)), condition)


def lora_on(base, targets=("all", "text-encoder"), seed=0):
    """A LoRA that does something: its up-projections are not zero."""
    method = method_from({"kind": "lora", "rank": 2, "target_modules": targets})
    sites = base.select(method.target_modules)
    card = Card(
        method=method.model_dump(mode="json"),
        base=base.identity(),
        sites={name: site.shape for name, site in sites.items()},
        seed=seed,
    )
    adapter = new_adapter(card)
    generator = torch.Generator().manual_seed(seed)
    for terms in adapter.patches.values():
        torch.nn.init.normal_(terms["main"].up, std=0.1, generator=generator)
    return sites, adapter


def all_weights(base):
    return {f"{m}.{k}": v.clone() for m, module in base.modules.items() for k, v in module.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- agreement with the pipeline -------------------------------------------------------------------------------------


def test_predict_is_what_the_pipeline_asks_of_its_denoiser(base):
    calls = []
    hook = base.denoiser.register_forward_hook(lambda _, a, k, out: calls.append((a, k, out)), with_kwargs=True)
    width, height = base.resolution, base.resolution + 2 * base.size_multiple
    base.pipe(PROMPT, width=width, height=height, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    hook.remove()
    args, kwargs, out = calls[0]
    noisy = args[0] if args else kwargs["hidden_states"]
    moment = (args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)

    with torch.no_grad():
        condition = base.encode_prompts([PROMPT], (width, height))
        ours = base.predict(noisy, moment, condition)

    added = kwargs.get("added_cond_kwargs") or {}
    told = {
        "text": kwargs["encoder_hidden_states"],
        "pooled": added.get("text_embeds", kwargs.get("pooled_projections")),
        "time_ids": added.get("time_ids"),
    }
    assert {name for name, value in told.items() if value is not None} == set(condition)
    assert all(torch.equal(condition[name], told[name]) for name in condition)
    assert noisy.shape[0] == 1
    assert torch.equal(ours, out[0])


def test_latents_are_scaled_as_the_pipeline_scales_them(base):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": base.resolution, "height": base.resolution}
    draw = {
        kind: base.pipe(PROMPT, generator=torch.Generator().manual_seed(1), output_type=kind, **options).images
        for kind in ("latent", "pt")
    }
    with torch.no_grad():
        pixels = base.decode_latents(draw["latent"])
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1), draw["pt"], atol=1e-5)


def test_encoding_undoes_the_scale_of_decoding(base):
    pixels = torch.rand(2, 3, base.resolution, base.resolution) * 2 - 1
    with torch.no_grad():
        latents = base.encode_pictures(pixels)
        vae = base.pipe.vae
        direct = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        assert torch.allclose(base.decode_latents(latents), direct, atol=1e-5)
        assert torch.equal(base.encode_pictures(pixels), latents)
    side = base.resolution // base.latent_factor
    assert latents.shape == (2, base.denoiser.config.in_channels, side, side)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_scheduler_turns_back_into_the_picture(prediction):
    from diffusers import DDIMScheduler

    base = StableDiffusion.tiny()
    base.pipe.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config, prediction_type=prediction)
    base.pipe.scheduler.set_timesteps(10)
    moment = base.pipe.scheduler.timesteps[3]
    clean, noise = noisy_latents(base, 1, 1), noisy_latents(base, 1, 2)
    noisy, target = (f(clean, noise, moment.reshape(1)) for f in (base.objective.noised, base.objective.target))
    step = base.pipe.scheduler.step(target, moment, noisy)
    assert torch.allclose(step.pred_original_sample, clean, atol=1e-4)
    assert base.generate(Request([PROMPT], [0], steps=2))[0].size == (base.resolution, base.resolution)


def test_flow_target_is_what_the_scheduler_turns_back_into_the_picture():
    base = FAMILIES["sd3"].tiny()
    scheduler, objective = base.pipe.scheduler, base.objective
    scheduler.set_timesteps(1)  # one step goes all the way to the picture
    sigma, moment = scheduler.sigmas[0].reshape(1), scheduler.timesteps[0]
    clean, noise = noisy_latents(base, 1, 1), noisy_latents(base, 1, 2)
    assert torch.allclose(objective.network_time(sigma), moment)
    step = scheduler.step(objective.target(clean, noise, sigma), moment, objective.noised(clean, noise, sigma))
    assert torch.allclose(step.prev_sample, clean, atol=1e-5)
    assert objective.shift == scheduler.config.shift == 3.0


def test_a_process_that_cannot_be_trained_is_refused(tmp_path):
    from diffusers import EDMEulerScheduler

    base = FAMILIES["sdxl"].tiny()
    base.pipe.scheduler = EDMEulerScheduler()
    base.pipe.save_pretrained(tmp_path / "edm")
    with pytest.raises(BaseError, match="cannot train"):
        load_base(tmp_path / "edm")


# -- the contract ----------------------------------------------------------------------------------------------------


def test_every_site_exists_and_fires(base):
    fired = set()
    hooks = [
        site.module.register_forward_hook(lambda *_, name=name: fired.add(name)) for name, site in base.sites().items()
    ]
    predicted(base)
    for hook in hooks:
        hook.remove()
    assert fired == set(base.sites())


def test_attention_group_is_every_projection_of_every_attention_block(base):
    expected = {
        f"{base.denoiser_name}.{path}.{child}"
        for path, block in base.denoiser.named_modules()
        if isinstance(block, Attention)
        for child, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert set(base.select(["attention"])) == expected
    endings = {name.split(".attn")[-1].split(".", 1)[1] for name in expected}
    text_side = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} if base.family == "sd3" else set()
    assert endings == {"to_q", "to_k", "to_v", "to_out.0"} | text_side


def test_linear_and_conv_groups_share_out_the_denoiser(base):
    linear, conv, everything = (base.select([group]) for group in ("linear", "conv", "all"))
    assert set(linear) | set(conv) == set(everything)
    assert {site.shape.kind for site in linear.values()} == {"linear"}
    assert {site.shape.kind for site in conv.values()} == {"conv2d"}
    assert {site.component for site in everything.values()} == {base.denoiser_name}


def test_text_encoder_group_is_the_self_attention_of_every_text_encoder(base):
    sites = base.select(["text-encoder"])
    layers = sum(base.modules[name].config.num_hidden_layers for name in base.text_encoder_names)
    assert len(sites) == 4 * layers
    assert {site.component for site in sites.values()} == set(base.text_encoder_names)


def test_every_group_matches_something_and_a_foreign_one_names_the_nearest(base):
    for group in base.groups:
        assert base.select([group])
    with pytest.raises(PresetError) as refusal:
        base.select(["attentoin"])
    assert refusal.value.hint == "did you mean 'attention'?"


def test_loss_has_one_value_per_sample_and_samples_do_not_meet(base):
    prompts = [PROMPT, "dog", ""]
    objective, clean, noise = base.objective, noisy_latents(base, 3, 1), noisy_latents(base, 3, 2)
    times = torch.stack([objective.draw_time(torch.Generator().manual_seed(i)) for i in range(3)])
    condition = base.encode_prompts(prompts, (base.resolution, base.resolution))
    assert all(len(value) == 3 for value in condition.values())

    def losses(rows):
        picked = {name: value[rows] for name, value in condition.items()}
        x = objective.noised(clean[rows], noise[rows], times[rows])
        error = base.predict(x, objective.network_time(times[rows]), picked)
        error = error - objective.target(clean[rows], noise[rows], times[rows])
        return error.square().mean((1, 2, 3))

    with torch.no_grad():
        together, alone = losses([0, 1, 2]), torch.cat([losses([i]) for i in range(3)])
    assert together.shape == (3,)
    assert torch.isfinite(together).all()
    assert torch.allclose(together, alone, rtol=1e-4)
    assert len(set(together.tolist())) == 3


def test_sampling_is_seeded_and_a_picture_does_not_depend_on_its_neighbours(base):
    drawn = base.generate(Request([PROMPT] * 3, [1, 2, 1], steps=2))
    again = base.generate(Request([PROMPT], [1], steps=2))[0]
    assert drawn[0].tobytes() == drawn[2].tobytes() == again.tobytes()
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_sampling_reports_each_step(base):
    seen = []
    base.generate(Request([PROMPT], [1], steps=3, on_step=lambda done, total: seen.append((done, total))))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_pictures_have_the_size_asked_for_and_impossible_sizes_are_refused(base):
    width, height = base.resolution, base.resolution + base.size_multiple
    assert base.generate(Request([PROMPT], [1], steps=1, width=width, height=height))[0].size == (width, height)
    for side in (base.size_multiple + 1, base.largest_side + base.size_multiple):
        with pytest.raises(RequestError, match="multiples of"):
            base.generate(Request([PROMPT], [1], width=side, height=base.resolution))


def test_tiny_is_built_in_a_second_from_its_seed_alone(base):
    cls = type(base)
    state = torch.get_rng_state()
    started = time.process_time()
    again, other = cls.tiny(seed=0), cls.tiny(seed=1)
    assert time.process_time() - started < 2
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(all_weights(again), all_weights(base))
    assert not same_values(other.identity().values, base.identity().values)
    assert other.identity().architecture == base.identity().architecture


def test_a_base_is_at_rest(base):
    for module in base.modules.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert base.pipe.components.get("safety_checker") is None


def test_saved_and_loaded_base_is_the_same(base, tmp_path):
    base.pipe.save_pretrained(tmp_path / "saved")
    loaded = load_base(tmp_path / "saved")
    assert type(loaded) is type(base)
    assert loaded.name == str(tmp_path / "saved")
    assert loaded.identity().architecture == base.identity().architecture
    assert loaded.identity().values == base.identity().values
    assert loaded.check(base.identity()) == ""
    request = Request([PROMPT], [3], steps=2)
    assert loaded.generate(request)[0].tobytes() == base.generate(request)[0].tobytes()
    test_a_base_is_at_rest(loaded)


def test_an_adapter_of_another_family_is_refused(base):
    for name, cls in FAMILIES.items():
        if name != base.family:
            with pytest.raises(AdapterError) as refusal:
                base.check(cls.tiny().identity())
            assert base.name in refusal.value.message
            assert cls.tiny().name in refusal.value.message


def test_other_weights_give_a_warning_or_a_refusal(base):
    other = type(base).tiny(seed=1).identity()
    assert "other weights" in base.check(other)
    with pytest.raises(AdapterError, match="depends on the weights"):
        base.check(other, needs_values=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_sketch_survives_rounding(base, dtype):
    before = base.identity()
    for module in base.modules.values():
        module.to(dtype)
    rounded = base.identity()
    assert rounded.values != before.values
    assert same_values(rounded.values, before.values)
    assert base.check(before, needs_values=True) == ""


def test_value_sketch_notices_a_fine_tune(base):
    before = base.identity()
    with torch.no_grad():
        for parameter in base.denoiser.parameters():
            parameter.mul_(1.02)
    assert not same_values(base.identity().values, before.values)


def test_half_precision_base_takes_full_precision_latents(base):
    expected = predicted(base)
    base.pipe.to(torch.bfloat16)
    given = predicted(base)
    assert given.dtype == torch.bfloat16
    assert torch.allclose(given.float(), expected, atol=0.1 * expected.abs().max().item())


def test_xl_autoencoder_is_not_run_in_fp16():
    base = FAMILIES["sdxl"].tiny()
    pixels = torch.rand(1, 3, 16, 16)
    expected = base.encode_pictures(pixels)
    base.pipe.vae.half()
    rounded = base.encode_pictures(pixels)
    assert rounded.dtype == torch.float32
    assert base.pipe.vae.dtype == torch.float16
    assert torch.allclose(rounded, expected, atol=1e-3)


def test_sd3_works_without_t5_and_stays_the_same_base(tmp_path):
    base = FAMILIES["sd3"].tiny()
    identity, width = base.identity(), base.encode_prompts([PROMPT], (16, 16))["text"].shape
    base.pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    base.pipe.save_pretrained(tmp_path / "no-t5")
    loaded = load_base(tmp_path / "no-t5")
    assert loaded.check(identity, needs_values=True) == ""
    assert loaded.encode_prompts([PROMPT], (16, 16))["text"].shape == width
    test_predict_is_what_the_pipeline_asks_of_its_denoiser(loaded)


# -- patches ---------------------------------------------------------------------------------------------------------


def test_detach_restores_weights_and_outputs_bit_for_bit(base):
    weights, output = all_weights(base), predicted(base)
    sites, adapter = lora_on(base)
    with attach(sites, adapter.by_site()) as attachment:
        patched = predicted(base)
        assert_same_weights(all_weights(base), weights)
        assert attachment.silent_sites({}) == []
    assert not torch.allclose(patched, output, atol=1e-3)
    assert torch.equal(predicted(base), output)
    assert_same_weights(all_weights(base), weights)


def test_gradient_checkpointing_gives_the_same_gradients(base):
    sites, adapter = lora_on(base, targets=("all",))
    condition = base.encode_prompts([PROMPT, "dog"], (base.resolution, base.resolution))
    calls = []
    watched = next(site.module for name, site in sites.items() if name.endswith("to_q"))
    watched.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        for parameter in adapter.parameters():
            parameter.grad = None
        base.predict(noisy_latents(base, 2), a_time(base).repeat(2), condition).square().mean().backward()
        return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None], len(calls)

    with attach(sites, adapter.by_site()):
        plain, plain_calls = gradients()
        base.denoiser.enable_gradient_checkpointing()
        again, checkpointed_calls = gradients()
    assert checkpointed_calls == 2 * plain_calls  # the block really was computed again
    assert len(plain) == len(again) > 0
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-8) for one, two in zip(plain, again, strict=True))


def test_objectives_are_those_of_the_families():
    kinds = {name: type(cls.tiny().objective) for name, cls in FAMILIES.items()}
    assert kinds == {"sd3": FlowMatching, "sdxl": Diffusion, "stable_diffusion": Diffusion}


def test_another_process_builds_the_same_tokenizer():
    """A text encoder is learned for the ids; and the processes of one training must agree on them."""
    program = (
        "from studio.bases.tiny import byte_pairs; from studio.data.stickers import vocabulary; "
        "print(byte_pairs(vocabulary()[:120]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    tokenizer = word_tokenizer(["cat", "car", "cap", "scat", "aaaa"], 16)
    for word in ("cat", "car", "cap", "scat", "aaaa"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_networks_taken_for_a_new_training_bring_their_tokenizer(tmp_path):
    base = StableDiffusion.tiny()
    base.pipe.save_pretrained(tmp_path / "base")
    method = method_from({"kind": "scratch", "init_from": str(tmp_path / "base"), "fresh": ["unet"]})
    begun = method.base(Preset(method=method, base="sticker"))
    assert begun.pipe.tokenizer.get_vocab() == base.pipe.tokenizer.get_vocab()
    state, own = begun.pipe.text_encoder.state_dict(), base.pipe.text_encoder.state_dict()
    assert all(torch.equal(state[name], own[name]) for name in own)
    save_with_halves(begun.pipe, tmp_path / "saved")
    assert not [file for file in (tmp_path / "saved").rglob("*.json") if str(tmp_path) in file.read_text()]
