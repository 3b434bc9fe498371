"""LoRA files of other programs, written by those programs where they are here, else by their formulas."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_layout import unet_tensors
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from test_merging import trained

from studio.adapter import load_adapter
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.deltas import Hadamard, Kronecker, Tucker
from studio.errors import AdapterError, RequestError
from studio.exporting.job import Job
from studio.exporting.kohya import kohya_tensors
from studio.importing.opening import open_sources
from studio.interference.command import interference
from studio.merging import Merger, make_plan, make_recipe

ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # (32, 32) on the tiny base
CONVOLUTION = "unet.mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny()


def opened(path, base):
    (source,) = open_sources([str(path)], lambda _: base)
    return source


def weights_of(base):
    return lambda site: base.components[site.split(".")[0]].get_parameter(site.split(".", 1)[1] + ".weight").detach()


def changes(path, base):
    """Dense changes by site."""
    source = opened(path, base)
    return {site: source.read(site, weights_of(base))[0].dense() for site in source.shapes}


def flat(site):
    return "lora_unet_" + site.removeprefix("unet.").replace(".", "_")


def written(tmp_path, tensors, header=None):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "foreign.safetensors", header)
    return tmp_path / "foreign.safetensors"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def randomised(model):
    g = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            scale = 1.0 if "magnitude" not in name else 0.1
            base = parameter.data if "magnitude" in name else 0
            parameter.data = base + scale * torch.randn(parameter.shape, generator=g)
    return model


def deltas_of_peft(model, component="unet"):
    return {
        f"{component}.{name.removeprefix('base_model.model.')}": layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for site in wanted:
        assert found[site].shape == wanted[site].shape, site
        assert (found[site] - wanted[site]).norm() <= tolerance * wanted[site].norm(), site


LORA = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["to_q", "to_v", "conv1", "ff.net.2"],
    "rank_pattern": {"to_q": 2, ".*mid_block.*conv1": 3},
    "alpha_pattern": {"to_v": 1},
}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_rslora=True),
        LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1"]),
        LoHaConfig(r=3, alpha=5, target_modules=["conv1"], use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=5, target_modules=["to_q", "conv1"], decompose_both=True),
        LoKrConfig(r=64, alpha=5, target_modules=["to_q", "ff.net.2"]),
        LoKrConfig(r=2, alpha=5, target_modules=["conv1"], use_effective_conv2d=True),
    ],
    ids=["lora", "rslora", "loha", "loha tucker", "lokr", "lokr full", "lokr tucker"],
)
def test_a_folder_of_peft_is_read_as_peft_means_it(config, base, tmp_path):
    model = randomised(get_peft_model(StableDiffusion.tiny().pipe.unet, config))
    model.save_pretrained(tmp_path / "lora")
    assert_same(changes(tmp_path / "lora", base), deltas_of_peft(model))


def test_dora_of_peft_becomes_the_difference_of_merged_weights(base, tmp_path):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["to_q", "conv1"], use_dora=True)
    model = randomised(get_peft_model(StableDiffusion.tiny().pipe.unet, config))
    model.save_pretrained(tmp_path / "dora")
    found = changes(tmp_path / "dora", base)
    after = model.merge_and_unload().state_dict()
    weight = weights_of(base)
    assert_same(found, {site: after[f"{site.removeprefix('unet.')}.weight"] - weight(site) for site in found}, 1e-4)
    assert opened(tmp_path / "dora", base).needs_weights
    with pytest.raises(AdapterError, match="depends on the base's weights"):
        opened(tmp_path / "dora", base).read(next(iter(found)), None)


def test_a_file_that_diffusers_wrote_is_read_with_its_metadata(base, tmp_path):
    pipe = StableDiffusion.tiny().pipe
    pipe.unet.add_adapter(LoraConfig(**LORA))
    pipe.text_encoder.add_adapter(LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "out_proj"]))
    randomised(pipe.unet)
    randomised(pipe.text_encoder)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    wanted = deltas_of_peft(pipe.unet) | deltas_of_peft(pipe.text_encoder, "text_encoder")
    assert_same(changes(tmp_path / "pytorch_lora_weights.safetensors", base), wanted)


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_our_own_kohya_files_come_back_as_they_were(family, tmp_path):
    base = family.tiny()
    settings = {"alpha": 6, "rank_pattern": {"to_q": 2, "conv1": 1}, "targets": ("all", "text-encoder")}
    adapter = load_adapter(trained(tmp_path / "a.safetensors", 1, base=base, **settings))
    job = Job(adapter, base, "a")
    source = opened(written(tmp_path, kohya_tensors(job, job.factors(), 3.0)), base)
    assert set(source.shapes) == set(adapter.patches)
    for site, terms in adapter.patches.items():
        found = source.read(site, None)[0].dense()
        torch.testing.assert_close(found, terms["main"].delta(torch.zeros(())), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_original_names_of_unets_find_the_same_layers(family, tmp_path):
    base = family.tiny()
    sites = {name: site for name, site in base.sites().items() if name.startswith("unet.")}
    marks = {f"{name.removeprefix('unet.')}.weight": float(n + 1) for n, name in enumerate(sites)}

    class Unet:
        config = base.pipe.unet.config

        def state_dict(self):
            return {name: torch.tensor(marks.get(name, 0.0)) for name in base.pipe.unet.state_dict()}

    original = {
        int(v): k.removesuffix(".weight") for k, v in unet_tensors(Unet()).items() if k.endswith(".weight") and v
    }
    tensors = {}
    for number, site in enumerate(sites.values(), 1):
        shape = site.shape.weight
        if len(shape) > 1:
            key = "lora_unet_" + original[number].replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.full((1, *shape[1:]), float(number))
            tensors[f"{key}.lora_up.weight"] = torch.ones(shape[0], 1, *[1] * (len(shape) - 2))
    found = changes(written(tmp_path, tensors), base)
    assert len(found) == sum(len(site.shape.weight) > 1 for site in sites.values())
    for number, name in enumerate(sites, 1):
        assert name not in found or (found[name] == number).all(), name


def test_alpha_scales_by_the_rank_and_without_it_alpha_is_the_rank(base, tmp_path):
    weight = weights_of(base)(ATTENTION)
    down, up = numbers(3, weight.shape[1]), numbers(weight.shape[0], 3)
    own = {f"{flat(ATTENTION)}.lora_down.weight": down, f"{flat(ATTENTION)}.lora_up.weight": up}
    torch.testing.assert_close(changes(written(tmp_path, own), base)[ATTENTION], up @ down)
    own[f"{flat(ATTENTION)}.alpha"] = torch.tensor(1.5)
    torch.testing.assert_close(changes(written(tmp_path, own), base)[ATTENTION], 0.5 * up @ down)
    half = {key: value.half() for key, value in own.items()}
    torch.testing.assert_close(
        changes(written(tmp_path, half), base)[ATTENTION], 0.5 * up.half().float() @ down.half().float()
    )


def test_lora_mid_is_a_tucker_convolution(base, tmp_path):
    o, i, *kernel = weights_of(base)(CONVOLUTION).shape
    down, mid, up = numbers(4, i, 1, 1), numbers(4, 4, *kernel), numbers(o, 4, 1, 1)
    key = flat(CONVOLUTION)
    path = written(
        tmp_path,
        {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_mid.weight": mid,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(2.0),
        },
    )
    delta = opened(path, base).read(CONVOLUTION, None)[0]
    assert isinstance(delta, Tucker)
    assert delta.low_rank().rank == 4
    wanted = 0.5 * torch.einsum("mnkl,om,ni->oikl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    torch.testing.assert_close(delta.dense(), wanted, rtol=1e-4, atol=1e-4)


def test_lycoris_files_keep_their_forms(base, tmp_path):
    o, i, *kernel = weights_of(base)(CONVOLUTION).shape
    key, other = flat(CONVOLUTION), flat(ATTENTION)
    a1, b1, a2, b2 = numbers(o, 2), numbers(2, i * 9), numbers(o, 2, seed=1), numbers(2, i * 9, seed=1)
    side, inner = weights_of(base)(ATTENTION).shape
    w1, w2a, w2b = numbers(4, 4), numbers(side // 4, 2), numbers(2, inner // 4)
    tensors = {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2}
    tensors |= {f"{key}.alpha": torch.tensor(1.0), f"{other}.alpha": torch.tensor(1.0)}
    tensors |= {f"{other}.lokr_w1": w1, f"{other}.lokr_w2_a": w2a, f"{other}.lokr_w2_b": w2b}
    source = opened(written(tmp_path, tensors), base)
    loha, lokr = source.read(CONVOLUTION, None)[0], source.read(ATTENTION, None)[0]
    assert isinstance(loha, Hadamard)
    assert isinstance(lokr, Kronecker)
    torch.testing.assert_close(loha.dense(), (0.5 * (a1 @ b1) * (a2 @ b2)).reshape(o, i, *kernel), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lokr.dense(), 0.5 * torch.kron(w1, w2a @ w2b), rtol=1e-4, atol=1e-5)


def test_dense_differences_norms_and_biases_are_read(base, tmp_path):
    weight = weights_of(base)(CONVOLUTION)
    norm = "unet.mid_block.resnets.0.norm1"
    tensors = {
        f"{flat(CONVOLUTION)}.diff": numbers(*weight.shape),
        f"{flat(CONVOLUTION)}.diff_b": numbers(weight.shape[0]),
    }
    tensors |= {
        f"{flat(norm)}.w_norm": numbers(weight.shape[1]),
        f"{flat(norm)}.b_norm": numbers(weight.shape[1], seed=2),
    }
    path = written(tmp_path, tensors)
    source = opened(path, base)
    change, bias = source.read(CONVOLUTION, None)
    assert torch.equal(change.dense(), tensors[f"{flat(CONVOLUTION)}.diff"])
    assert torch.equal(bias, tensors[f"{flat(CONVOLUTION)}.diff_b"])
    assert torch.equal(source.read(norm, None)[0].dense(), tensors[f"{flat(norm)}.w_norm"])


def test_a_merged_file_of_norms_biases_and_dense_changes_acts_as_the_changed_weights(base, tmp_path):
    from studio.attachment import attach

    tensors = {}
    for n, (name, site) in enumerate(base.sites().items()):
        if name.startswith("unet.") and n % 3 == 0:
            small = 0.05 * numbers(*site.shape.weight, seed=n)
            tensors[f"{flat(name)}.{'w_norm' if site.shape.kind == 'norm' else 'diff'}"] = small
            if site.shape.bias:
                ending = "b_norm" if site.shape.kind == "norm" else "diff_b"
                tensors[f"{flat(name)}.{ending}"] = 0.05 * numbers(site.shape.weight[0], seed=n + 1)
    kinds = {key.rsplit(".", 1)[1] for key in tensors}
    assert kinds == {"diff", "diff_b", "w_norm", "b_norm"}
    path = written(tmp_path, tensors)
    recipe = make_recipe({"adapters": {str(path): 0.5}, "strategy": "sum", "base": "tiny"})
    Merger(make_plan(recipe, lambda _: base)).save(tmp_path / "m.safetensors")
    adapter = load_adapter(tmp_path / "m.safetensors")
    changed = StableDiffusion.tiny()
    for key, value in tensors.items():
        layer, ending = key.rsplit(".", 1)
        site = next(name for name in base.sites() if flat(name) == layer)
        parameter = changed.pipe.unet.get_parameter(
            f"{site.removeprefix('unet.')}.{'bias' if ending in ('diff_b', 'b_norm') else 'weight'}"
        )
        parameter.data += 0.5 * value
    x, times = numbers(1, 4, 8, 8), torch.tensor([300])
    condition = base.encode_prompts(["a cat"], (16, 16))
    with torch.no_grad():
        wanted = changed.predict(x, times, condition)
        with attach(base.sites(), adapter.by_site()):
            torch.testing.assert_close(base.predict(x, times, condition), wanted, rtol=1e-3, atol=1e-4)


def test_oft_is_a_rotation_of_the_outputs(base, tmp_path):
    weight = weights_of(base)(CONVOLUTION)
    o = weight.shape[0]
    blocks, rescale = 0.1 * numbers(o // 4, 4, 4), 1 + 0.1 * numbers(o, 1, 1, 1)
    path = written(
        tmp_path,
        {
            f"{flat(CONVOLUTION)}.oft_blocks": blocks,
            f"{flat(CONVOLUTION)}.rescale": rescale,
            f"{flat(CONVOLUTION)}.alpha": torch.tensor(0.0),
        },
    )
    found = changes(path, base)[CONVOLUTION] + weight
    turned = found / rescale
    for n in range(o // 4):
        q = blocks[n] - blocks[n].T
        r = torch.linalg.solve((torch.eye(4) - q).T, (torch.eye(4) + q).T).T
        torch.testing.assert_close(r @ r.T, torch.eye(4), rtol=1e-5, atol=1e-5)
        own = slice(4 * n, 4 * n + 4)
        torch.testing.assert_close(turned[own].flatten(1), r.T @ weight[own].flatten(1), rtol=1e-4, atol=1e-5)


def test_dora_of_kohya_normalises_the_axis_that_its_shape_tells(base, tmp_path):
    weight = weights_of(base)(CONVOLUTION)
    o, i, *_ = weight.shape
    down, up = numbers(2, i, 3, 3), 0.1 * numbers(o, 2, 1, 1)
    whole = weight + torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    key = flat(CONVOLUTION)
    for scale, dims in ((torch.rand(o, 1, 1, 1) + 0.5, (1, 2, 3)), (torch.rand(1, i, 1, 1) + 0.5, (0, 2, 3))):
        path = written(
            tmp_path, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": scale}
        )
        wanted = scale * whole / whole.square().sum(dims, keepdim=True).sqrt() - weight
        torch.testing.assert_close(changes(path, base)[CONVOLUTION], wanted, rtol=1e-4, atol=1e-5)


def as_kohya(path, tmp_path):
    tensors = {}
    for site, terms in load_adapter(path).patches.items():
        down, up = terms["main"].low_rank()
        tensors |= {f"{flat(site)}.lora_down.weight": down, f"{flat(site)}.lora_up.weight": up}
    return written(tmp_path, tensors)


def test_a_foreign_and_an_own_file_merge_into_one(base, tmp_path):
    own = trained(tmp_path / "own.safetensors", 1, targets=("attention",))
    exported = as_kohya(own, tmp_path)
    recipe = make_recipe({"adapters": {str(own): 1.0, str(exported): -1.0}, "strategy": "sum", "tolerance": 0})
    result = Merger(make_plan(recipe, lambda _: base)).adapter()
    for site, terms in result.patches.items():
        zero = torch.zeros(result.card.sites[site].weight)
        whole = sum(patch.delta(zero) for patch in terms.values())
        assert whole.norm() <= 1e-5 * load_adapter(own).patches[site]["main"].delta(zero).norm()


def test_files_of_other_programs_merge_on_an_outline_and_the_base_is_never_loaded(
    base, tmp_path, tiny_base_folder, monkeypatch
):
    exported = as_kohya(trained(tmp_path / "own.safetensors", 1, targets=("attention",)), tmp_path)
    recipe = make_recipe({"adapters": [str(exported)], "strategy": "sum", "base": str(tiny_base_folder)})
    whole = Merger(make_plan(recipe, lambda _: base)).adapter()
    monkeypatch.setattr("studio.bases.registry.load_base", lambda *_: pytest.fail("the base was loaded"))
    plan = make_plan(recipe)
    made = Merger(plan).adapter()
    assert plan.base is None
    assert made.card.base.architecture == base.identity().architecture
    assert all(made.tensors()[name].equal(value) for name, value in whole.tensors().items())


def test_files_of_other_programs_are_compared_on_an_outline(tmp_path, tiny_base_folder, monkeypatch):
    own = [trained(tmp_path / f"{n}.safetensors", n, targets=("attention",)) for n in (1, 2)]
    foreign = []
    for path in own:
        (tmp_path / path.stem).mkdir()
        foreign.append(str(as_kohya(path, tmp_path / path.stem).rename(tmp_path / f"kohya{path.stem}.safetensors")))
    monkeypatch.setattr("studio.bases.registry.load_base", lambda *_: pytest.fail("the base was loaded"))
    theirs, ours = interference(foreign, str(tiny_base_folder)), interference([str(path) for path in own])
    torch.testing.assert_close(theirs.total.input_overlap, ours.total.input_overlap)
    with pytest.raises(RequestError, match="which base"):
        interference(foreign)


def test_a_file_of_another_program_needs_a_base(base, tmp_path):
    exported = as_kohya(trained(tmp_path / "own.safetensors", 1, targets=("attention",)), tmp_path)
    with pytest.raises(RequestError) as caught:
        make_plan(make_recipe({"adapters": [str(exported)], "strategy": "sum"}))
    assert "--base" in caught.value.hint


REFUSED = {
    "unknown key": ({"lora_unet_x.strange": (3,)}, "what is 'lora_unet_x.strange'"),
    "nothing matches": ({f"lora_unet_no_{n}.lora_up.weight": (2, 1) for n in range(10000)}, "10000 of 10000 layers"),
    "missing half": ({"{q}.lora_up.weight": (32, 2)}, "has no 'down'"),
    "only alpha": ({"{q}.alpha": ()}, "holds only alpha"),
    "ranks disagree": ({"{q}.lora_up.weight": (32, 2), "{q}.lora_down.weight": (3, 32)}, "different ranks, 3 and 2"),
    "another shape": ({"{q}.lora_up.weight": (20, 2), "{q}.lora_down.weight": (2, 32)}, "of shape"),
    "half a lokr": ({"{q}.lokr_w1": (4, 4)}, "holds only lokr_w1"),
    "glora": ({"{q}.a1.weight": (4, 4)}, "what is"),
    "boft": ({"{q}.oft_blocks": (2, 8, 4, 4)}, "BOFT"),
}


@pytest.mark.parametrize(("shapes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(shapes, message, base, tmp_path):
    tensors = {key.format(q=flat(ATTENTION)): torch.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(AdapterError) as caught:
        changes(written(tmp_path, tensors), base)
    assert message in caught.value.message


def test_settings_of_peft_that_would_be_read_wrongly_are_refused(base, tmp_path):
    model = randomised(get_peft_model(StableDiffusion.tiny().pipe.unet, LoraConfig(r=2, target_modules=["to_q"])))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"peft_type": "VERA"}, {"lora_bias": True}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterError):
            opened(tmp_path, base)
