"""A clip base for other programs: as a package for those who have the studio, portable for those who have not."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studio.bases.registry import load_base
from studio.bases.sticker_video import layers, network
from studio.bases.sticker_video.family import StickerVideo
from studio.bases.sticker_video.standalone import FORMS, bundle, export_base
from studio.errors import BaseError, RequestError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
{load}
frames = pipe("a cat", num_frames=3, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(3)).frames[0]
assert {studio} == any(name.split(".")[0] == "studio" for name in sys.modules)
sys.stdout.buffer.write(b"".join(frame.tobytes() for frame in frames))
"""
LOADS = {
    "package": "from studio.bases.sticker_video.pipeline import StickerVideoPipeline as P\npipe = P.from_pretrained(F)",
    # Opened, saved again and opened again: what is saved must bring the code along.
    "portable": "from diffusers import DiffusionPipeline as P\npipe = P.from_pretrained(F, trust_remote_code=True)\n"
    "pipe.save_pretrained(F + '-again')\npipe = P.from_pretrained(F + '-again', trust_remote_code=True)",
}


@pytest.fixture(scope="module")
def base():
    base = StickerVideo.tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.pipe.unet.parameters():
            if parameter.abs().sum() == 0:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base


def drawn_elsewhere(folder, form, tmp_path):
    """What a fresh process draws, that has the studio only for the package."""
    load = f"F = {str(folder)!r}\n{LOADS[form]}"
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"HF_MODULES_CACHE": str(tmp_path / "modules")} | ({"PYTHONPATH": str(ROOT)} if form == "package" else {})
    program = PROGRAM.format(load=load, studio=form == "package")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], check=False, capture_output=True, env=own, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()[-800:]
    return done.stdout


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_base_draws_the_same_in_a_fresh_process(base, form, tmp_path):
    folder = export_base(base, form, tmp_path / form)
    opened = drawn_elsewhere(folder, form, tmp_path)
    weights = {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")}
    assert {name.split("/")[0] for name in weights} == {"unet", "vae", "text_encoder"}
    assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == (form == "portable")
    expected = export_base(base, "package", tmp_path / "reference")
    frames = (
        load_base(expected)
        .pipe("a cat", num_frames=3, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(3))
        .frames[0]
    )
    assert opened == b"".join(frame.tobytes() for frame in frames)


def test_the_portable_form_is_code_that_the_studio_itself_does_not_run(base, tmp_path):
    folder = export_base(base, "portable", tmp_path / "p")
    with pytest.raises(BaseError, match="code of its own"):
        load_base(folder)


def test_a_bundle_imports_nothing_of_the_studio_and_keeps_every_definition():
    code = bundle([layers, network])
    tree = ast.parse(code)
    imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("studio" in line for line in imported)
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {"StickerUNet", "MaskedTemporalAttention", "LowRankChange", "with_neighbours", "zeroed"} <= defined


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(base, tmp_path):
    with pytest.raises(RequestError, match="unknown form"):
        export_base(base, "portabel", tmp_path / "p")
    folder = export_base(base, "package", tmp_path / "p")
    with pytest.raises(RequestError, match="already there"):
        export_base(base, "package", folder)
    assert json.loads((folder / "export.json").read_text())["format"] == "package"
