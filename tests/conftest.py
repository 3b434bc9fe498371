"""Every test runs offline, on one thread, with a home of its own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

torch.set_num_threads(1)  # two processes with two threads each on two cores are a hundred times slower


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A fresh `$STUDIO_HOME` for each test."""
    folder = tmp_path / "studio-home"
    monkeypatch.setenv("STUDIO_HOME", str(folder))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of four small drawn pictures of two shapes, with captions for two of them."""
    from PIL import Image, ImageDraw

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (size, colour) in enumerate(
        [((64, 64), "red"), ((64, 64), "blue"), ((96, 64), "green"), ((64, 64), "black")]
    ):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse([10 + number, 10, 40, 50 - number], fill=colour)
        image.save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a {trigger} in red")
    (folder / "1.txt").write_text("a {trigger} in blue")
    return folder


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory):
    """A pico Stable Diffusion pipeline as a folder that plain diffusers loads."""
    from studio.bases.stable_diffusion import StableDiffusion

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    StableDiffusion.tiny().pipe.save_pretrained(folder)
    return folder
