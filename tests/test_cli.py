"""The command line as a user meets it: results on stdout, one line for an error, the exit code of the contract."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from studio.cli import run
from studio.run import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def studio(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def train_args(pictures, tiny_base_folder, tmp_path):
    return [
        "train", "--preset", "subject", "--base", tiny_base_folder, "--data", pictures, "--run", tmp_path / "run",
        "--steps", 3, "--set", "sample_steps=2", "--set", "sample_every=3", "--set", "data.prior.pictures=0",
        "--set", "method.target_modules=[attention]", "--set", "learned_words=0", "--set", "mixed_precision=no",
        "--set", "batch_size=2", "--set", "export=[]",
    ]  # fmt: skip


def refused(result, *words):
    """Exit 2, one `error:` line, at most a `hint:` line, no traceback; the words are in it."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert code == 2, err
    assert sum(line.startswith("error:") for line in lines) == 1, err
    assert "Traceback" not in err
    assert not out
    for word in words:
        assert word in " ".join(lines), (word, lines)
    return True


def test_training_generating_and_exporting_from_the_command_line(studio, train_args, tmp_path):
    code, out, err = studio(*train_args, "--name", "blip")
    assert code == 0, err
    assert "trigger word" in out
    assert "attention: sdpa" in err
    code, out, _ = studio(
        "generate", "a blip", "--adapter", "blip:0.5", "--steps", 2, "--seed", 4, "--out", tmp_path / "a.png"
    )
    assert code == 0
    facts = json.loads(Image.open(tmp_path / "a.png").text["studio"])
    assert (facts["prompt"], facts["seed"], facts["adapters"][0]["weight"]) == ("a blip", 4, 0.5)
    code, out, _ = studio("export", "blip", "--out", tmp_path / "lora", "--json")
    assert code == 0
    assert json.loads(out)["status"] == "exact"
    code, out, _ = studio("inspect", "blip", "--json")
    assert json.loads(out)[0]["trigger"] == "blip"
    code, out, _ = studio("library", "--json")
    assert [entry["name"] for entry in json.loads(out)] == ["blip"]
    code, out, _ = studio("runs", "--json")
    assert json.loads(out)[0]["state"] == "finished"


def test_json_is_one_document_on_stdout(studio, train_args):
    code, out, _ = studio(*train_args, "--json")
    assert code == 0
    assert {"adapter", "report", "trigger", "seconds"} <= json.loads(out).keys()


def test_several_pictures_are_numbered_and_each_is_the_one_of_its_seed(studio, tiny_base_folder, tmp_path):
    base = ("--base", tiny_base_folder, "--steps", 2)
    assert studio("generate", "a cat", *base, "--count", 2, "--seed", 7, "--out", tmp_path / "many")[0] == 0
    assert studio("generate", "a cat", *base, "--seed", 8, "--out", tmp_path / "one.png")[0] == 0
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == ["000.png", "001.png"]
    assert Image.open(tmp_path / "many" / "001.png").tobytes() == Image.open(tmp_path / "one.png").tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_suffix_chooses_the_format_and_the_making_is_told_inside(studio, tiny_base_folder, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert studio("generate", "a cat", "--base", tiny_base_folder, "--steps", 1, "--out", path)[0] == 0
    assert json.loads(Image.open(path).getexif()[0x010E])["prompt"] == "a cat"


def test_an_existing_picture_is_kept_unless_forced(studio, tiny_base_folder, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"mine")
    command = ("generate", "a cat", "--base", tiny_base_folder, "--steps", 1, "--out", path)
    assert refused(studio(*command), "x.png", "--force")
    assert refused(studio("generate", "a", "--base", tmp_path / "nowhere", "--out", path), "x.png")  # nothing is loaded
    assert path.read_bytes() == b"mine"
    assert studio(*command, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "subjekt"], ["subjekt", "subject"]),
        (["train"], ["preset"]),
        (["train", "--preset", "subject", "--set", "learning_rat=1"], ["learning_rat", "learning_rate"]),
        (["train", "--preset", "subject", "--set", "method.rank=many"], ["method.rank"]),
        (["train", "--preset", "subject", "--set", "steps"], ["key=value"]),
        (["train", "--preset", "subject", "--method", "orthogonl"], ["orthogonl", "orthogonal"]),
        (["train", "--preset", "subject", "--data", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["train", "--preset", "subject", "--name", "../../x"], ["../../x"]),
        (["train", "--resume"], ["--run"]),
        (["train", "--resume", "--run", "/nowhere"], ["/nowhere"]),
        (["trian"], ["trian", "train"]),
        (["generate"], ["prompt"]),
        (["generate", "a cat", "--base", "stickr"], ["stickr", "sticker"]),
        (["generate", "a cat", "--adapter", "nobody"], ["nobody"]),
        (["generate", "a cat", "--adapter", "a:b"], ["a:b"]),
        (["generate", "a cat", "--size", "big"], ["big"]),
        (["generate", "a cat", "--out", "x.wav"], [".wav"]),
        (["export", "nobody", "--out", "x"], ["nobody"]),
        (["inspect", "no-file.safetensors"], ["no-file.safetensors"]),
        (["library", "remove", "../../x"], ["../../x"]),
        (["presets", "subjct"], ["subjct", "subject"]),
    ],
)
def test_a_wrong_request_is_one_line_with_the_next_move_and_writes_nothing(
    studio, tmp_path, home, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert refused(studio(*arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before


def bad_adapter(kind, path):
    if kind == "pickle":
        torch.save({"a": torch.ones(2)}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "truncated":
        save_file({"a": torch.ones(200)}, path)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "nan":
        save_file({"a": torch.full((2,), float("nan"))}, path, {"studio_card": "{}"})
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickle", ["pickle"]),
        ("text", ["damaged"]),
        ("empty", ["damaged"]),
        ("foreign", ["no card"]),
        ("truncated", ["damaged"]),
        ("nan", ["not finite"]),
    ],
)
def test_an_adapter_file_that_is_none_is_refused_saying_why(studio, tmp_path, tiny_base_folder, kind, words):
    path = bad_adapter(kind, tmp_path / "x.safetensors")
    assert refused(studio("inspect", path), "x.safetensors", *words)
    assert refused(studio("generate", "a", "--base", tiny_base_folder, "--adapter", path), *words)


def test_an_adapter_of_another_base_is_refused_naming_both(studio, train_args, tmp_path):
    from studio.bases.sticker import build_sticker

    assert studio(*train_args, "--name", "blip")[0] == 0
    build_sticker().pipe.save_pretrained(tmp_path / "other")
    assert refused(studio("generate", "a blip", "--base", tmp_path / "other", "--adapter", "blip"), "tiny", "other")


def test_a_text_file_named_png_and_a_truncated_jpeg_are_named_and_left_out(studio, train_args, pictures):
    (pictures / "words.png").write_text("no picture")
    Image.open(pictures / "0.png").save(pictures / "half.jpg")
    (pictures / "half.jpg").write_bytes((pictures / "half.jpg").read_bytes()[:300])
    code, _, err = studio(*train_args)
    assert code == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert any("words.png" in line for line in warnings)
    assert any("half.jpg" in line for line in warnings)


def test_a_folder_that_cannot_be_written_is_exit_1_and_said(studio, train_args, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = [tmp_path / "file" / "run" if a == tmp_path / "run" else a for a in train_args]
    code, _, err = studio(*arguments)
    assert code == 1, err
    assert "error: cannot write" in err
    assert "Traceback" not in err


def test_a_full_disk_is_exit_1_and_leaves_no_half_file(studio, train_args, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = studio(*train_args)
    assert code == 1
    assert "No space left" in err
    assert not [p for p in tmp_path.rglob("*.safetensors") if "home" not in str(p)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(train_args, tmp_path, home, number):
    arguments = [str(a) for a in train_args] + ["--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from studio.cli import main; main()", *arguments]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    events = Run(tmp_path / "run")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(e["kind"] == "step" for e in events.events()):
        time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "train --resume --run" in err
    assert "Traceback" not in err
    assert events.newest_checkpoint().exists()


def test_ctrl_c_ends_a_program_beside_the_cli_in_one_line(tmp_path):
    heeding = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler)"  # else not in background
    program = f"{heeding}; runpy.run_module('studio.data.melodies', run_name='__main__')"
    command = [sys.executable, "-c", program, "--out", str(tmp_path / "pieces"), "--count", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "pieces" / "0001.wav").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "broken off\n")


@pytest.mark.parametrize(
    "command",
    ["train", "generate", "export", "inspect", "check", "presets", "bases", "methods", "runs", "library", "doctor"],
)
def test_every_command_has_help_with_an_example(studio, command):
    code, out, _ = studio(command, "--help")
    assert code == 0
    assert "Example: studio" in out


@pytest.mark.parametrize("command", ["presets", "bases", "methods", "runs", "library", "doctor"])
def test_lists_are_json_too(studio, command):
    code, out, _ = studio(command, "--json")
    assert code == 0
    assert isinstance(json.loads(out), list | dict)
    assert studio(command)[0] == 0


def test_check_reports_data_memory_and_export_and_leaves_nothing(studio, train_args, tmp_path, pictures):
    arguments = ["check", *train_args[1:-1], "export=[diffusers]"]
    for option in ("--run", "--steps"):
        at = arguments.index(option)
        del arguments[at : at + 2]
    code, out, err = studio(*arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["pictures"] == 4
    assert report["layers"] == 32
    assert any("exact" in line for line in report["export"])
    assert not (tmp_path / "run").exists()


def test_the_library_renames_notes_and_removes(studio, train_args):
    assert studio(*train_args, "--name", "blip")[0] == 0
    assert studio("library", "note", "blip", "good at 0.8")[0] == 0
    assert studio("library", "rename", "blip", "zog")[0] == 0
    _, out, _ = studio("library", "--json")
    assert [(e["name"], e["note"]) for e in json.loads(out)] == [("zog", "good at 0.8")]
    assert studio("library", "remove", "zog")[0] == 0
    assert json.loads(studio("library", "--json")[1]) == []


def test_torchrun_starts_the_command_line_and_one_process_speaks(train_args, tmp_path):
    arguments = [str(a) for a in train_args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29741"]
    done = subprocess.run(
        [*torchrun, "-m", "--", "studio", *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done in") == 1
    assert done.stderr.count("trigger word") == 1
    assert (tmp_path / "run" / "adapter.safetensors").exists()
