"""The adapter file and attachment, beyond the contract of the methods."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_methods import tiny_adapter

from studio.adapter import HEADER_KEY, load_adapter
from studio.attachment import attach
from studio.base import Request
from studio.errors import AdapterError
from studio.generation import Use, wearing


@pytest.fixture
def saved(tmp_path):
    _, _, adapter = tiny_adapter("lora")
    adapter.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", adapter.card.model_dump(mode="json")


def rewritten(path, card, tensors=None):
    save_file(load_file(path) if tensors is None else tensors, path, {HEADER_KEY: json.dumps(card)})
    return path


def test_a_file_of_a_newer_studio_is_refused_with_what_to_do(saved):
    path, card = saved
    with pytest.raises(AdapterError) as caught:
        load_adapter(rewritten(path, {**card, "format_version": 99}))
    assert "newer" in caught.value.message
    assert "update" in caught.value.hint


def test_a_damaged_card_is_refused(saved):
    path, card = saved
    with pytest.raises(AdapterError, match="card"):
        load_adapter(rewritten(path, {**card, "sites": 3}))


def test_no_header_length_makes_a_file_look_like_a_pickle(saved):
    path, card = saved
    for padding in range(0x100):
        rewritten(path, {**card, "preset": {"description": "x" * padding}})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert load_adapter(path).card.preset["description"] == "x" * padding


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name(saved):
    path, card = saved
    tensors = load_file(path)
    name = sorted(tensors)[0]
    broken = {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "unknown": {**tensors, "unet.nothing.main.up": torch.ones(2)},
        "expected": {**tensors, name: torch.ones(3, 3)},
    }
    for word, changed in broken.items():
        with pytest.raises(AdapterError, match=word):
            load_adapter(rewritten(path, card, changed))


def test_the_header_tells_everything_in_one_string_and_no_clock(saved):
    path, card = saved
    assert json.loads(json.dumps(card))["base"]["family"] == "stable_diffusion"
    assert "time" not in card


def test_strength_is_linear_in_the_weights_and_changes_at_run_time():
    base, sites, adapter = tiny_adapter("lora", rank=2)
    name = next(iter(sites))
    patch = adapter.patches[name]["main"]
    torch.nn.init.normal_(patch.up)
    layer, x = sites[name].module, torch.randn(2, 3, sites[name].shape.in_features)
    plain = layer(x)
    with attach(sites, {name: [patch]}, 1.0) as attachment:
        full = layer(x) - plain
        for weight in (0.0, 0.25, -2.0, torch.tensor(1.5)):
            attachment.weight = weight
            torch.testing.assert_close(layer(x) - plain, float(weight) * full, rtol=1e-4, atol=1e-5)
        attachment.weight = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1)  # one strength for each token
        torch.testing.assert_close(layer(x) - plain, attachment.weight * full, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), plain)


def test_a_base_that_was_worn_draws_what_it_drew_before():
    base, _, adapter = tiny_adapter("lora")
    for terms in adapter.patches.values():
        torch.nn.init.normal_(terms["main"].up)
    request = Request(["a cat"], [1], steps=2)
    before = base.generate(request)[0].tobytes()
    with wearing(base, [Use("x", adapter, 0.8), Use("y", adapter, -0.3)]):
        assert base.generate(request)[0].tobytes() != before
    assert base.generate(request)[0].tobytes() == before


def test_an_attachment_that_fails_leaves_nothing_behind():
    base, sites, adapter = tiny_adapter("lora")
    patches = adapter.by_site()
    with pytest.raises(AdapterError, match="shape"):
        attach(sites, {**patches, next(iter(sites)): [tiny_adapter("lora", ("conv",))[2].by_site()["unet.conv_in"][0]]})
    assert not [name for name, site in sites.items() if "forward" in vars(site.module)]


def test_a_worn_adapter_drops_nothing_out(tmp_path):
    base, _, adapter = tiny_adapter("lora", dropout=0.5)
    for terms in adapter.patches.values():
        torch.nn.init.ones_(terms["main"].up)
    adapter.save(tmp_path / "a.safetensors")
    request = Request(["a cat"], [0], steps=2)
    with wearing(base, [Use("a", load_adapter(tmp_path / "a.safetensors"))]):
        one, other = (base.generate(request)[0] for _ in range(2))
    assert one.tobytes() == other.tobytes()
