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
