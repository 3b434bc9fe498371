"""The arrows of docs/architecture.md: who may import whom, and that help is instant."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONVERTER = ROOT / "studio/bases/mustango/convert.py"  # of weights that are published as pickles alone
LEAVES = {"errors.py": set(), "patch.py": {"torch"}, "objective.py": {"torch"}}


def imported(path):
    """The top-level packages that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
    return found


class WithoutTexts(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


def code_of(path):
    """A file without what stands in its texts: instructions to others may name what we never do."""
    return ast.unparse(WithoutTexts().visit(ast.parse(path.read_text())))


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("studio"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_never_imports_trainers_or_the_ui(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"trainers", "ui", "gradio"}


@pytest.mark.parametrize("path", files("trainers"), ids=lambda p: str(p.relative_to(ROOT)))
def test_trainers_never_import_each_other_or_the_ui(path):
    own = ".".join(path.relative_to(ROOT).parts[:2])  # the files of one method, where it has several
    others = {name for name in imported(path) if name != own and not name.startswith(f"{own}.")}
    assert not {name.split(".")[0] for name in others} & {"trainers", "ui", "gradio"}


@pytest.mark.parametrize("path", files("ui"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_ui_never_imports_what_computes(path):
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "trainers"}
    assert not {name.split(".")[0] for name in imported(path)} & heavy


def test_what_the_ui_imports_of_the_studio_loads_no_torch():
    mine = sorted({n for path in files("ui") for n in imported(path) if n.split(".")[0] == "studio"})
    program = f"import importlib, sys; [importlib.import_module(n) for n in {mine}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_torch_and_the_standard_library_alone(name):
    foreign = {n.split(".")[0] for n in imported(ROOT / "studio" / name)} - set(sys.stdlib_module_names)
    assert foreign <= LEAVES[name]


@pytest.mark.parametrize("package", ["studio", "trainers", "ui"])
def test_nothing_is_ever_unpickled_and_no_shell_or_remote_code_is_run(package):
    banned = ("torch.load(", "pickle.", "import pickle", "trust_remote_code=True", "shell=True", "os.system")
    for path in files(package):
        text = code_of(path)
        if path == CONVERTER:
            assert text.count("torch.load(") == text.count("weights_only=True)") == 1
            text = text.replace("torch.load(", "")
        assert not [word for word in banned if word in text], path


def test_help_loads_no_torch():
    program = "import sys, studio.cli; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_no_module_bears_the_name_of_a_public_function():
    import studio

    modules = {path.stem for path in (ROOT / "studio").glob("*.py")} | {
        p.name for p in (ROOT / "studio").iterdir() if p.is_dir()
    }
    assert not modules & set(studio.__all__)


def test_every_package_travels_in_a_wheel():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("studio", "trainers", "ui")
        for file in (ROOT / top).rglob("*.py")
    }
    assert found == {name for name in told if not name.startswith("studio._data")}
