"""Several concepts in one picture: masks that add up to 1, one pass that equals the plain adapter where it must,
nothing of one region in another, and the command as a user meets it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refused, studio  # noqa: F401  a fixture
from test_methods import tiny_adapter, train_a_little

from studio import generate, library
from studio.bases.registry import load_base
from studio.bases.sd3 import StableDiffusion3
from studio.bases.sdxl import StableDiffusionXL
from studio.bases.stable_diffusion import StableDiffusion
from studio.errors import RequestError
from studio.generation import Use, wearing
from studio.patch import LayerShape
from studio.regions.attention import RegionAttention
from studio.regions.canvas import Blend, Canvas, apart
from studio.regions.drawing import drawing
from studio.regions.layers import RegionPatch
from studio.regions.layout import Layout, Region, parse_region
from studio.regions.masks import Box, Painted, partition
from studio.words import cross_attention

WHOLE, LEFT, RIGHT = Box(0, 0, 1, 1), Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
FREE = Blend(feather=0.3, apart=0)
KINDS = ["lora", "orthogonal", "dora", "flora", "tlora", "sara"]
TARGETS = {"lora": ("unet.*", "text-encoder"), "sara": ("all",)}


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny()


def concept(base, kind="lora", targets=None, seed=3, name="a", weight=1.0, **settings):
    _, _, adapter = tiny_adapter(kind, targets or TARGETS.get(kind, ("attention", "conv")), seed, base, **settings)
    for terms in adapter.patches.values():
        for patch in terms.values():
            train_a_little(patch)
    return Use(name, adapter, weight)


def latents(base, prompt="a cat", **options):
    """What the pipeline draws in three steps with guidance and a negative prompt."""
    generator = torch.Generator("cpu").manual_seed(5)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "a dog", **options}
    with torch.no_grad():
        return base.pipe(prompt, generator=generator, output_type="latent", **options).images


def drawn(base, *regions, blend=FREE, uses=(), size=(None, None), **options):
    with drawing(base, Layout(regions, blend), uses, size):
        return latents(base, **options)


def assert_same(one, other, error=1e-6):
    assert (one - other).norm() <= error * other.norm()


# -- masks ---------------------------------------------------------------------------------------------------------


def test_masks_and_background_add_up_to_one_at_every_size():
    shapes = [Box(0.1, 0.2, 0.63, 0.9), Box(0.4, 0, 0.91, 0.55), Box(0.33, 0.33, 0.34, 0.9)]
    masks = partition(shapes, 96, 160, feather=0.2)
    canvas = Canvas(masks, [1, 2, 3], Blend())
    for size in ((96, 160), (12, 20), (6, 10), (3, 5), (5, 7)):
        total = canvas.of_maps(torch.zeros(()), size).sum(0)
        torch.testing.assert_close(total, torch.ones(size), rtol=0, atol=1e-6)
    assert float(canvas.shares.sum()) == pytest.approx(1, abs=1e-6)
    assert masks.min() >= 0


def test_the_whole_picture_is_all_ones_and_leaves_no_background():
    masks = partition([WHOLE], 64, 64, feather=0.3)
    assert masks[0].eq(0).all()
    assert masks[1].eq(1).all()
    assert not partition([LEFT, RIGHT], 64, 64, feather=0.3)[0].any()


def test_a_box_covers_cells_by_their_share():
    mask = Box(0.25, 0.5, 0.625, 1).mask(2, 4)
    assert torch.equal(mask, torch.tensor([[0, 0, 0, 0], [0, 1, 0.5, 0]], dtype=torch.float64))


def test_an_edge_fades_over_the_feather_and_the_border_of_the_picture_does_not():
    mask = partition([LEFT], 100, 100, feather=0.2)[1]
    row = mask[50]
    assert row[49:51].mean() == pytest.approx(0.5, abs=1e-6)
    assert row[:39].eq(1).all()
    assert row[61:].eq(0).all()
    assert (row[40:61].diff() < 0).all()
    torch.testing.assert_close(mask, row.expand(100, 100))
    sharp = partition([LEFT], 100, 100, feather=0)[1]
    assert set(sharp.unique().tolist()) == {0, 1}


def test_where_regions_overlap_each_has_its_share():
    masks = partition([Box(0, 0, 0.75, 1), Box(0.25, 0, 1, 1)], 64, 64, feather=0)
    assert masks[:, 0, 32].tolist() == [0, 0.5, 0.5]
    assert masks[:, 0, 0].tolist() == [0, 1, 0]


def test_a_painted_mask_equals_the_box_that_it_shows(tmp_path):
    grey = np.zeros((40, 80), np.uint8)
    grey[10:30, 20:40] = 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    painted, box = (
        partition([shape], 64, 64, 0.1) for shape in (Painted(tmp_path / "mask.png"), Box(0.25, 0.25, 0.5, 0.75))
    )
    assert torch.equal(painted, box)


def test_a_painted_grey_counts_as_its_share(tmp_path):
    Image.new("L", (32, 32), 51).save(tmp_path / "grey.png")
    masks = partition([Painted(tmp_path / "grey.png")], 32, 32, 0.1)
    assert masks[:, 3, 3].tolist() == pytest.approx([0.8, 0.2])


# -- equal to the plain adapter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_of_all_equals_the_plain_adapter(base, kind):
    use = concept(base, kind)
    with wearing(base, [use]):
        plain = latents(base)
    assert (plain - latents(base)).norm() > 0.01 * plain.norm()
    assert_same(drawn(base, Region(WHOLE, "a cat", use), prompt="something else"), plain)


@pytest.mark.parametrize("kind", ["lora", "orthogonal"])
def test_a_region_of_all_equals_a_low_rank_adapter_bit_for_bit(base, kind):
    use = concept(base, kind)
    with wearing(base, [use]):
        plain = latents(base)
    assert torch.equal(drawn(base, Region(WHOLE, "a cat", use)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_among_the_same_adapter_equals_the_plain_adapter(base, kind):
    use = concept(base, kind, weight=0.8)
    with wearing(base, [use]):
        plain = latents(base)
    parts = [Box(0, 0, 0.4, 1), Box(0.4, 0, 1, 0.7), Box(0.4, 0.7, 1, 1)]
    assert_same(drawn(base, *(Region(box, "a cat", use) for box in parts)), plain)


@pytest.mark.parametrize("kind", ["lora", "orthogonal"])
def test_both_hold_for_two_text_encoders_and_pooled_text(kind):
    base = StableDiffusionXL.tiny()
    use = concept(base, kind)
    with wearing(base, [use]):
        plain = latents(base)
    assert torch.equal(drawn(base, Region(WHOLE, "a cat", use), prompt="something else"), plain)
    assert_same(drawn(base, Region(LEFT, "a cat", use), Region(RIGHT, "a cat", use)), plain)


def test_regions_without_adapters_and_one_text_are_the_base(base):
    plain = latents(base)
    assert_same(drawn(base, Region(Box(0.2, 0.2, 0.7, 0.7), "a cat")), plain)


def test_an_adapter_given_beside_regions_acts_on_all_of_them(base):
    use = concept(base)
    with wearing(base, [use]):
        plain = latents(base)
    assert_same(drawn(base, Region(LEFT, "a cat"), uses=[use]), plain)


def test_low_rank_changes_of_all_regions_are_one_product_down_and_one_up(base):
    uses = [concept(base, "lora", seed=s, rank=r) for s, r in ((1, 2), (2, 5))]
    with drawing(base, Layout((Region(LEFT, "a", uses[0]), Region(RIGHT, "b", uses[1])))):
        name = next(name for name in uses[0].adapter.patches if name.endswith("attn1.to_q"))
        ((patch, _),) = base.sites()[name].module.forward.terms
        assert patch.down.shape[0] == patch.up.shape[1] == 7
        assert len(patch.others) == 0


def test_a_picture_of_any_sides_is_masked_by_rows_and_columns(base):
    """The left half stays as the base has it where only the right half's layer changes, in a wide picture."""
    name = next(
        name for name in base.sites() if name.endswith("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    )
    use = concept(base, "lora", targets=(name,))
    seen = []
    handle = base.sites()[name].module.register_forward_hook(lambda _, __, y: seen.append(y))
    try:
        size = {"width": 64, "height": 32, "num_inference_steps": 1}
        latents(base, **size)
        drawn(base, Region(RIGHT, "a cat", use), blend=Blend(0, 0), size=(64, 32), **size)
    finally:
        handle.remove()
    changed = (seen[1] - seen[0]).abs().amax((0, 2)).view(8, 16)  # the latents' size: 16 x 32, halved
    assert torch.equal(changed[:, :8], torch.zeros(8, 8))
    assert (changed[:, 8:] > 0).all()


# -- nothing of one region in another ------------------------------------------------------------------------------


def hard_canvas(size=(4, 6)):
    canvas = Canvas(partition([LEFT, RIGHT], 48, 72, feather=0)[1:], [0, 1], Blend(apart=0.5))
    canvas.size = size
    return canvas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_kind", ["tokens", "maps", "texts"])
def test_nothing_of_one_concept_reaches_anothers_tokens_in_a_layer(kind, layer_kind):
    from studio.method import Origin, method_from

    torch.manual_seed(0)
    canvas, text = hard_canvas(), layer_kind == "texts"
    layer = torch.nn.Conv2d(8, 8, 1) if layer_kind == "maps" else torch.nn.Linear(8, 12)
    x = torch.randn(2, 8, 4, 6) if layer_kind == "maps" else torch.randn(2, 14 if text else 24, 8)
    shape = LayerShape.of(layer)
    patches = [
        train_a_little(method_from({"kind": kind}).patches({"l": shape}, Origin(c, s), {"l": layer})["l"])
        for s, c in enumerate("ab")
    ]
    from studio.attachment import Site, attach

    site = {"unet.l": Site("unet.l", layer, shape)}
    outs = {}
    with torch.no_grad():
        for name, terms in {"a": [(0, patches[0], 1.0)], "b": [(1, patches[1], 1.0)], "both": [
            (0, patches[0], 1.0), (1, patches[1], 1.0)]}.items():  # fmt: skip
            with attach(site, {"unet.l": [RegionPatch(canvas, shape, layer, terms, text)]}):
                outs[name] = layer(x)
        plain = layer(x)
    if text:
        first, second = (slice(None), slice(0, 7)), (slice(None), slice(7, 14))
    else:
        inside = torch.zeros(4, 6, dtype=torch.bool)
        inside[:, :3] = True
        places = (Ellipsis, inside) if layer_kind == "maps" else (slice(None), inside.flatten())
        others = (Ellipsis, ~inside) if layer_kind == "maps" else (slice(None), ~inside.flatten())
        first, second = places, others
    assert torch.equal(outs["a"][second], plain[second])
    assert torch.equal(outs["b"][first], plain[first])
    assert not torch.equal(outs["a"][first], plain[first])
    torch.testing.assert_close(outs["both"][first], outs["a"][first])
    torch.testing.assert_close(outs["both"][second], outs["b"][second])


def test_cross_attention_is_the_masked_sum_of_attention_to_each_text(base):
    layer = cross_attention(base)[0]
    canvas = Canvas(partition([Box(0, 0, 0.6, 0.5), RIGHT], 64, 64, 0.3), [1, 2], Blend())
    canvas.size = (4, 4)
    x, texts = torch.randn(2, 16, layer.to_q.in_features), torch.randn(3, 2, 7, layer.cross_attention_dim)
    with torch.no_grad():
        wanted = sum(
            mask[None, :, None] * layer(x, encoder_hidden_states=text)
            for mask, text in zip(canvas.of_tokens(x), texts, strict=True)
        )
        found = RegionAttention(canvas)(layer, x, torch.cat(list(texts), 1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_regions_do_not_look_at_each_other_while_they_are_kept_apart(base):
    layer = base.denoiser.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    canvas, attend = hard_canvas(), RegionAttention(hard_canvas())
    one = torch.randn(1, 24, layer.to_q.in_features)
    other = one.clone()
    right = canvas.of_tokens(one)[1].bool()
    other[:, right] = torch.randn(1, 12, one.shape[-1])
    with torch.no_grad():
        attend.canvas.progress = 0.0
        torch.testing.assert_close(attend(layer, one)[:, ~right], attend(layer, other)[:, ~right], rtol=1e-4, atol=1e-5)
        attend.canvas.progress = 0.5
        assert (attend(layer, one)[:, ~right] - attend(layer, other)[:, ~right]).abs().max() > 1e-3
        torch.testing.assert_close(attend(layer, one), layer(one))


def test_the_background_is_looked_at_by_all_and_feathered_edges_in_part():
    masks = torch.tensor([[1.0, 0.5, 0, 0], [0, 0.5, 1, 0]])  # the fourth token is the background's
    left = apart(masks, 1.0).exp()
    assert left[0, 2] == pytest.approx(0, abs=1e-5)
    assert left[0, 1] == left[1, 2] == 0.5
    assert left[3].tolist() == left[:, 3].tolist() == [1, 1, 1, 1]
    assert apart(masks, 0.4).exp()[0, 2] == pytest.approx(0.6)


def test_regions_are_kept_apart_in_the_first_share_of_the_steps_only(base, monkeypatch):
    asked = []
    bias = Canvas.bias

    def watched(self, like):
        asked.append((self.progress, found := bias(self, like)))
        return found

    monkeypatch.setattr(Canvas, "bias", watched)
    regions = (Region(LEFT, "a cat"), Region(RIGHT, "a dog"))
    drawn(base, *regions, blend=Blend(apart=0.5), num_inference_steps=6)
    steps = sorted({progress for progress, _ in asked})
    assert steps == pytest.approx([i / 6 for i in range(6)])
    assert all((found is not None) == (progress < 0.5) for progress, found in asked)
    free = drawn(base, *regions, blend=Blend(apart=0))
    assert not torch.equal(drawn(base, *regions, blend=Blend(apart=0.5)), free)
    assert torch.equal(drawn(base, *regions, blend=Blend(apart=1, distance=0)), free)


# -- texts ---------------------------------------------------------------------------------------------------------


def encoded(base, *args):
    with torch.no_grad():
        return base.pipe.encode_prompt(*args)


def test_each_text_is_read_with_its_own_concept_only(base):
    uses = [concept(base, "lora", ("text-encoder",), seed) for seed in (1, 2)]
    request = ("grass", base.device, 1, True, "bad")
    bare = encoded(base, *request)
    own = []
    for text, use in zip(("a cat", "a dog"), uses, strict=True):
        with wearing(base, [use]):
            own.append(encoded(base, text, *request[1:]))
    layout = Layout((Region(Box(0, 0, 0.4, 1), "a cat", uses[0]), Region(Box(0.6, 0, 1, 1), "a dog", uses[1])))
    with drawing(base, layout):
        found = encoded(base, *request)
    for condition, parts in zip(found, zip(bare, *own, strict=True), strict=True):
        assert torch.equal(condition, torch.cat(parts, 1))
    assert not torch.equal(own[0][1], own[1][1])  # the negative prompt too


def test_the_background_of_nothing_is_not_read(base):
    with drawing(base, Layout((Region(LEFT, "a cat"), Region(RIGHT, "a dog")))):
        found, _ = encoded(base, "grass", base.device, 1, False)
    parts = [encoded(base, text, base.device, 1, False)[0] for text in ("a cat", "a dog")]
    assert torch.equal(found, torch.cat(parts, 1))


def test_what_is_pooled_counts_by_the_regions_share_of_the_picture():
    base = StableDiffusionXL.tiny()
    box = Box(0, 0, 0.25, 1)
    with drawing(base, Layout((Region(box, "a dog"),), Blend(feather=0))):
        pooled = encoded(base, "a cat")[2]
    cat, dog = (encoded(base, text)[2] for text in ("a cat", "a dog"))
    torch.testing.assert_close(pooled, 0.75 * cat + 0.25 * dog)


@pytest.mark.parametrize("layerwise", [False, True])
def test_learned_words_are_known_to_their_own_region(base, layerwise):
    use = concept(base)
    layers, width = len(cross_attention(base)), base.pipe.text_encoder.config.hidden_size
    vectors = 0.5 * torch.randn(*([layers] if layerwise else []), 2, width, generator=torch.Generator().manual_seed(0))
    use.adapter.words = {"text_encoder": {"blip": vectors}}
    with wearing(base, [use]):
        plain = latents(base, "a blip")
    assert_same(drawn(base, Region(WHOLE, "a blip", use)), plain, 0)
    halves = drawn(base, Region(LEFT, "a blip", use), Region(RIGHT, "a blip", use))
    assert_same(halves, plain)
    mixed = drawn(base, Region(LEFT, "a blip", use), Region(RIGHT, "a cat"))
    assert (mixed - plain).norm() > 0.01 * plain.norm()


# -- on and off ----------------------------------------------------------------------------------------------------


def test_afterwards_the_base_is_as_before(base):
    before, processors = latents(base), base.denoiser.attn_processors
    hooks = [len(module._forward_pre_hooks) for module in base.denoiser.modules()]
    state = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
    with pytest.raises(RuntimeError), drawing(base, Layout((Region(LEFT, "a dog", concept(base, "sara")),))):
        raise RuntimeError
    assert torch.equal(latents(base), before)
    assert base.denoiser.attn_processors == processors
    assert [len(module._forward_pre_hooks) for module in base.denoiser.modules()] == hooks
    assert "encode_prompt" not in vars(base.pipe)
    assert all(torch.equal(value, state[key]) for key, value in base.denoiser.state_dict().items())


def test_a_base_with_joint_attention_is_refused():
    base = StableDiffusion3.tiny()
    with pytest.raises(RequestError, match="cannot draw regions"), drawing(base, Layout((Region(LEFT, "a cat"),))):
        pass


# -- what is asked -------------------------------------------------------------------------------------------------


@pytest.fixture
def concepts(tiny_base_folder, tmp_path, home):
    """Two adapters in the library, `cat` and `dog`, and a painted mask of the right half."""
    base = load_base(str(tiny_base_folder))
    for seed, name in enumerate(("cat", "dog")):
        use = concept(base, seed=seed)
        use.adapter.save(tmp_path / f"{name}.safetensors")
        library.add(name, tmp_path / f"{name}.safetensors", {"base": str(tiny_base_folder)})
    grey = Image.new("L", (64, 64))
    grey.paste(255, (32, 0, 64, 64))
    grey.save(tmp_path / "right.png")
    return tmp_path


def test_a_region_is_a_place_an_adapter_and_a_prompt(concepts):
    region = parse_region("0, .25,0.5,1:cat:-0.5: a red cat: and a hat")
    assert (region.shape, region.prompt) == (Box(0, 0.25, 0.5, 1), "a red cat: and a hat")
    assert (region.use.name, region.use.weight) == ("cat", -0.5)
    painted = parse_region(f"{concepts / 'right.png'}::grass")
    assert (painted.shape, painted.use) == (Painted(concepts / "right.png"), None)


def test_a_picture_of_two_concepts_from_the_command_line(studio, concepts):  # noqa: F811
    draw = [
        "generate", "grass", "--region", "0,0,0.5,1:cat:0.9:a cat", "--region", f"{concepts / 'right.png'}:dog:a dog",
        "--steps", 2, "--seed", 4,
    ]  # fmt: skip
    assert studio(*draw, "--out", concepts / "one.png")[0] == 0
    picture = Image.open(concepts / "one.png")
    facts = json.loads(picture.text["studio"])
    first, second = facts["regions"]
    assert first == {"box": [0, 0, 0.5, 1], "adapter": "cat", "weight": 0.9, "prompt": "a cat"}
    assert (second["mask"], second["adapter"], len(second["mask_sha256"])) == ("right.png", "dog", 64)
    told = [arg for name in ("feather", "apart", "distance") for arg in (f"--{name}", facts[name])]
    assert studio(*draw, *told, "--out", concepts / "again.png")[0] == 0
    assert Image.open(concepts / "again.png").tobytes() == picture.tobytes()
    assert studio(*draw, "--apart", 0, "--out", concepts / "other.png")[0] == 0
    assert Image.open(concepts / "other.png").tobytes() != picture.tobytes()


def test_from_python_it_is_the_same_picture(studio, concepts):  # noqa: F811
    regions = ("0,0,0.5,1:cat:a cat", "0.5,0,1,1:dog:0.7:a dog")
    (picture,) = generate("grass", regions=regions, seed=4)
    told = [argument for region in regions for argument in ("--region", region)]
    assert studio("generate", "grass", *told, "--seed", 4, "--out", concepts / "one.png")[0] == 0
    assert Image.open(concepts / "one.png").tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ("0,0,1.5,1:cat:a cat", ["leaves the picture"]),
        ("-0.1,0,0.5,1:cat:a cat", ["leaves the picture"]),
        ("0.5,0,0.5,1:cat:a cat", ["no area", "X0 < X1"]),
        ("0.5,0,0.2,1:cat:a cat", ["no area"]),
        ("0,0,0.01,0.01:cat:a cat", ["next to no area"]),
        ("0,0,1:cat:a cat", ["no box of four numbers"]),
        ("0,0,nan,1:cat:a cat", ["no box of four numbers"]),
        ("0,0,1,1:cat", ["WHERE:ADAPTER:PROMPT"]),
        ("0,0,1,1:cat:", ["WHERE:ADAPTER:PROMPT"]),
        ("0,0,1,1:catt:a cat", ["catt", "did you mean 'cat'"]),
        ("nowhere.png:cat:a cat", ["no mask 'nowhere.png'"]),
        ("black.png:cat:a cat", ["black.png", "paint white"]),
        ("broken.png:cat:a cat", ["broken.png", "damaged"]),
        ("text.png:cat:a cat", ["text.png", "no PNG"]),
        ("0,0,1,1:xl.safetensors:a cat", ["built otherwise"]),
    ],
)
def test_a_region_that_cannot_be_is_one_line_and_nothing_is_written(
    studio,  # noqa: F811
    concepts,
    tiny_base_folder,
    monkeypatch,
    region,
    words,
):
    monkeypatch.chdir(concepts)
    Image.new("L", (64, 64)).save("black.png")
    (concepts / "broken.png").write_bytes((concepts / "right.png").read_bytes()[:60])
    (concepts / "text.png").write_text("white")
    concept(StableDiffusionXL.tiny()).adapter.save(concepts / "xl.safetensors")
    before = sorted(concepts.rglob("*"))
    result = studio("generate", "grass", "--base", tiny_base_folder, "--region", region, "--out", "x.png")
    assert refused(result, *words)
    assert sorted(concepts.rglob("*")) == before


def test_how_regions_meet_is_only_said_of_regions(studio, tiny_base_folder):  # noqa: F811
    command = ("generate", "grass", "--base", tiny_base_folder)
    assert refused(studio(*command, "--feather", 0.2), "--feather", "--region")
    assert refused(studio(*command, "--region", "0,0,1,1::a cat", "--feather", 2), "--feather")
