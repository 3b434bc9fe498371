"""A clip base on disk without what it shares with an image base: smaller, the same, and refused if that changed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.bases import registry
from studio.bases.folder import size_of
from studio.bases.registry import load_base
from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.sticker_video.building import video_around
from studio.bases.sticker_video.sharing import save_clip_base
from studio.errors import BaseError


@pytest.fixture
def bundled(tmp_path, tiny_base_folder, monkeypatch):
    """The pico image base as the bundled base `pico`."""
    folder = tmp_path / "bases" / "pico"
    shutil.copytree(tiny_base_folder, folder)
    monkeypatch.setattr(registry, "bundled", lambda: {"pico": folder})
    return folder


def trained(seed=0, **options):
    """A clip base around the pico base whose temporal layers, low-rank changes and words are not at their start."""
    image = StableDiffusion.tiny()
    base = video_around(image, "m", words=["bouncing"], interaction_head_dim=4, spatial_rank=2, **options)
    base.shares_with = "pico"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in base.pipe.unet.temporal_names():
            parameter = base.pipe.unet.get_parameter(name)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half())  # as it is stored
        words = base.pipe.text_encoder.get_input_embeddings().weight
        words.copy_(words.half())
    return base


def clip_of(base, prompt="a cat bouncing"):
    return base.pipe(
        prompt, num_frames=3, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames


def test_a_sharing_base_loads_as_it_was_and_holds_only_its_own_weights(bundled, tmp_path):
    base = trained()
    before = clip_of(base)
    save_clip_base(base, tmp_path / "shared")
    save_clip_base(base, tmp_path / "whole", share=False)
    assert torch.equal(clip_of(base), before)  # saving changed nothing
    assert not (tmp_path / "shared" / "vae").exists()
    own = load_file(tmp_path / "shared" / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(own) == base.pipe.unet.temporal_names()
    assert list(load_file(tmp_path / "shared" / "text_encoder" / "model.safetensors")) == [
        "embeddings.token_embedding.weight"
    ]
    assert size_of(tmp_path / "shared") < 0.7 * size_of(tmp_path / "whole")
    loaded = load_base(tmp_path / "shared")
    assert torch.equal(clip_of(loaded), before)
    assert loaded.shares_with == "pico"
    save_clip_base(loaded, tmp_path / "again")
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        files = [tmp_path / name / f"{part}.safetensors" for name in ("shared", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_spatial_weights_that_were_trained_are_written_and_the_rest_is_shared(bundled, tmp_path):
    base = trained()
    with torch.no_grad():
        weight = base.pipe.unet.image.mid_block.resnets[0].conv1.weight
        weight.copy_((1.5 * weight).half())
    save_clip_base(base, tmp_path / "base")
    own = load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    spatial = {name for name in own if name.startswith("image.")} - base.pipe.unet.temporal_names()
    assert spatial == {"image.mid_block.resnets.0.conv1.weight"}
    assert torch.equal(clip_of(load_base(tmp_path / "base")), clip_of(base))


def test_a_base_whose_lender_has_changed_or_gone_is_refused(bundled, tmp_path, monkeypatch):
    save_clip_base(trained(), tmp_path / "base")
    weights = bundled / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "mid_block" in name)
    save_file({**tensors, name: tensors[name] + 1}, weights)
    with pytest.raises(BaseError, match="has others now"):
        load_base(tmp_path / "base")
    monkeypatch.setattr(registry, "bundled", dict)
    with pytest.raises(BaseError, match="not bundled"):
        load_base(tmp_path / "base")


def test_a_sharing_base_that_lacks_a_tensor_or_has_a_wrong_list_is_refused(bundled, tmp_path):
    save_clip_base(trained(), tmp_path / "base")
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "image.conv_in.weight"}, weights)
    with pytest.raises(BaseError, match=r"lacks 'image\.conv_in\.weight'"):
        load_base(tmp_path / "base")
    (tmp_path / "base" / "shared.json").write_text(json.dumps({"base": "pico"}))
    with pytest.raises(BaseError, match=r"shared\.json"):
        load_base(tmp_path / "base")
