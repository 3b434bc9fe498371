"""Layer-wise words: vectors of their own for each cross-attention layer, through encoders, guidance and training."""

import pytest
import torch
from test_training import collect, figures, recipe, train  # noqa: F401  a fixture

from studio.adapter import load_adapter
from studio.base import Request
from studio.bases.sd3 import StableDiffusion3
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import AdapterError, ExportRefused, PresetError
from studio.exporting import export_adapter
from studio.generation import Use, wearing
from studio.training import Order, plan, plan_resume
from studio.words import RANDOM_START, WordAttachment, cross_attention, fresh_words, layerwise_words

PROMPTS = ["a photo of blip", "a red dog"]


@pytest.fixture
def base():
    return StableDiffusion.tiny()


@pytest.fixture
def vectors(base):
    """(L, 2, D), other ones for each layer."""
    layers, width = len(cross_attention(base)), base.pipe.text_encoder.config.hidden_size
    return 0.5 * torch.randn(layers, 2, width, generator=torch.Generator().manual_seed(0))


def words(vectors):
    return {"text_encoder": {"blip": vectors}}


def predict(base, condition):
    noisy = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return base.predict(noisy, torch.tensor([100, 500]), condition)


def predicted(base, vectors, prompts=PROMPTS):
    attachment = WordAttachment(base, words(vectors))
    try:
        with torch.no_grad():
            return predict(base, base.encode_prompts(prompts, (16, 16)))
    finally:
        attachment.detach()


def test_cross_attention_layers_come_down_middle_up(base):
    names = {module: name for name, module in base.denoiser.named_modules()}
    found = [names[layer].split(".")[0] for layer in cross_attention(base)]
    assert found == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    everything = [module for name, module in base.denoiser.named_modules() if name.endswith("attn2")]
    assert len(found) == len(everything)


def test_a_pair_starts_as_a_random_vector_and_the_class_word(base):
    start = layerwise_words(base, "blip", "cat", 2, seed=3)["text_encoder"]["blip"]
    assert start.shape == (4, 2, 32)
    assert torch.equal(start, start[:1].expand_as(start))
    ids = base.pipe.tokenizer("cat", add_special_tokens=False).input_ids
    assert torch.equal(start[0, 1], base.pipe.text_encoder.get_input_embeddings().weight[ids].mean(0))
    assert 0.5 * RANDOM_START < start[0, 0].std() < 2 * RANDOM_START
    assert torch.equal(start, layerwise_words(base, "blip", "cat", 2, seed=3)["text_encoder"]["blip"])
    assert not torch.equal(start, layerwise_words(base, "blip", "cat", 2, seed=4)["text_encoder"]["blip"])


def test_equal_vectors_in_all_layers_are_a_plain_word(base, vectors):
    plain = vectors[0]
    torch.testing.assert_close(predicted(base, plain.expand(4, -1, -1)), predicted(base, plain), rtol=1e-5, atol=1e-6)
    assert (predicted(base, vectors) - predicted(base, plain))[0].abs().max() > 1e-3


def test_a_prompt_without_the_word_is_read_as_ever(base, vectors):
    with torch.no_grad():
        before = predict(base, base.encode_prompts(PROMPTS, (16, 16)))
    torch.testing.assert_close(predicted(base, vectors)[1], before[1], rtol=1e-5, atol=1e-6)
    alone = ["a photo", "a red dog"]
    with torch.no_grad():
        before = predict(base, base.encode_prompts(alone, (16, 16)))
    assert torch.equal(predicted(base, vectors, alone), before)


def test_each_layer_looks_at_its_own_vectors(base, vectors):
    """What reaches layer l is the reading of the prompt with vectors[l], as a plain word."""
    seen = {}
    attachment = WordAttachment(base, words(vectors))
    hooks = [
        layer.to_k.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(cross_attention(base))
    ]
    with torch.no_grad():
        condition = base.encode_prompts(PROMPTS, (16, 16))
        assert condition["text"].shape == (2, 16, 4 * 32)
        predict(base, condition)
    attachment.detach()
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    for i, states in seen.items():
        plain = WordAttachment(base, words(vectors[i]))
        with torch.no_grad():
            torch.testing.assert_close(states, base.encode_prompts(PROMPTS, (16, 16))["text"], rtol=1e-5, atol=1e-6)
        plain.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_vectors_of_each_layer(base, vectors, checkpointing):
    learned = torch.nn.Parameter(vectors)
    if checkpointing:
        base.denoiser.enable_gradient_checkpointing()
        base.denoiser.train()
    attachment = WordAttachment(base, words(learned))
    predict(base, base.encode_prompts(PROMPTS, (16, 16))).square().mean().backward()
    attachment.detach()
    assert (learned.grad.abs().sum(-1) > 0).all()
    first, last = learned.grad[0], learned.grad[-1]
    assert not torch.allclose(first, last)


def test_a_picture_with_guidance_and_a_negative_prompt_is_drawn(base, vectors):
    request = Request(["a photo of blip"], [0], negative="a dog", steps=2)
    before = base.generate(request)[0]
    pictures = []
    for values in (vectors, vectors[0].expand(4, -1, -1), vectors[0]):
        attachment = WordAttachment(base, words(values))
        pictures.append(base.generate(request)[0])
        attachment.detach()
    layered, equal, plain = (torch.tensor(list(picture.tobytes()), dtype=torch.int) for picture in pictures)
    assert (equal - plain).abs().max() <= 1
    assert (layered - plain).abs().max() > 1
    assert base.generate(request)[0].tobytes() == before.tobytes()


def test_detach_restores_everything(base, vectors):
    network, tokenizer = base.pipe.text_encoder, base.pipe.tokenizer
    modules = [network, network.get_input_embeddings(), *cross_attention(base)]
    before = [set(vars(module)) for module in modules]
    attachment = WordAttachment(base, words(vectors))
    assert [set(vars(module)) for module in modules] != before
    attachment.detach()
    attachment.detach()
    assert [set(vars(module)) for module in modules] == before
    assert base.pipe.tokenizer is tokenizer
    assert not any(layer._forward_pre_hooks for layer in cross_attention(base))


def test_plain_and_layerwise_words_are_worn_together(base, vectors):
    both = {"text_encoder": {"plain": vectors[0, :1], "blip": vectors}}
    prompts = ["blip and plain", "a plain dog"]
    attachment = WordAttachment(base, both)
    with torch.no_grad():
        together = base.encode_prompts(prompts, (16, 16))["text"].unflatten(-1, (4, 32))
    attachment.detach()
    for i in range(4):
        plain = WordAttachment(base, {"text_encoder": {"plain": vectors[0, :1], "blip": vectors[i]}})
        with torch.no_grad():
            torch.testing.assert_close(together[:, :, i], base.encode_prompts(prompts, (16, 16))["text"])
        plain.detach()


def test_words_for_another_number_of_layers_are_refused_and_nothing_is_attached(base, vectors):
    tokenizer = base.pipe.tokenizer
    with pytest.raises(AdapterError, match="3 cross-attention layers, and 'tiny-sd' has 4"):
        WordAttachment(base, words(vectors[:3]))
    with pytest.raises(AdapterError, match="'blip_1' is already known"):
        WordAttachment(base, {"text_encoder": {"blip": vectors, "blip_1": vectors[:, :1]}})
    assert base.pipe.tokenizer is tokenizer
    assert "forward" not in vars(base.pipe.text_encoder.get_input_embeddings())


@pytest.mark.parametrize("family", [StableDiffusionXL, StableDiffusion3])
def test_other_families_refuse_layerwise_words(family):
    base = family.tiny()
    with pytest.raises(PresetError, match=rf"'{base.name}' \({base.family}\) has no cross-attention layers"):
        layerwise_words(base, "blip", "cat", 2, 0)


def test_plain_words_still_start_near_the_class_word(base):
    start = fresh_words(base, "blip", "cat", 3, 0)["text_encoder"]["blip"]
    ids = base.pipe.tokenizer("cat", add_special_tokens=False).input_ids
    matrix = base.pipe.text_encoder.get_input_embeddings().weight
    assert start.shape == (3, 32)
    assert (start - matrix[ids].mean(0)).std() < 0.2 * matrix.std()


LAYERWISE = ("learned_words_layerwise=true", "learned_words_lr=0.01", "data.class_word=cat", "data.caption=a {trigger}")


def test_layerwise_words_are_learned_apart_travel_in_the_file_and_resume_to_the_bit(recipe, tmp_path):  # noqa: F811
    settings = (*LAYERWISE, "batch_size=2", "data.caption_dropout=0.3", "checkpoint_every=4", "learning_rate=1e-2")
    whole = train(recipe, tmp_path / "whole", *settings, name="blip", method="orthogonal")
    first = train(recipe, tmp_path / "halves", *settings, stop_after=4, name="blip", method="orthogonal")
    second = collect(plan_resume(tmp_path / "halves"))
    assert figures(whole, "step") == figures(first, "step") | figures(second, "step")
    one, two = (load_adapter(tmp_path / name / "adapter.safetensors") for name in ("whole", "halves"))
    learned = one.words["text_encoder"]["blip"]
    assert torch.equal(learned, two.words["text_encoder"]["blip"])
    assert learned.shape == (4, 2, 32)
    apart = (learned[:, None] - learned[None]).abs().amax((2, 3))
    assert (apart[~torch.eye(4, dtype=bool)] > 1e-4).all()
    one.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "whole/adapter.safetensors").read_bytes()


def test_samples_of_a_training_are_drawn_with_its_layerwise_words(recipe, tmp_path):  # noqa: F811
    events = train(
        recipe, tmp_path / "run", *LAYERWISE, "steps=2", "sample_every=1", "sample_steps=2", "mixed_precision=bf16",
        "gradient_checkpointing=true", name="blip",
    )  # fmt: skip
    assert events[-1].kind == "finished"
    assert len([event for event in events if event.kind == "sample"]) == 3


def test_generation_wears_them_and_export_refuses_them(recipe, tmp_path):  # noqa: F811
    train(recipe, tmp_path / "run", *LAYERWISE, "steps=2", name="blip")
    use = Use("blip", load_adapter(tmp_path / "run" / "adapter.safetensors"))
    base = plan(Order(recipe, run=tmp_path / "other")).base
    request = Request(["a blip"], [0], steps=2)
    before = base.generate(request)[0].tobytes()
    with wearing(base, [use]):
        assert base.generate(request)[0].tobytes() != before
    assert base.generate(request)[0].tobytes() == before
    for target in ("diffusers", "kohya", "checkpoint"):
        with pytest.raises(ExportRefused, match="'blip' has other vectors in each layer"):
            export_adapter(use.adapter, base, target, tmp_path / target)
        assert not (tmp_path / target).exists()
