"""Merging LoRA files of SDXL's size: `studio merge` beside PEFT's own merging, each in processes of its own.

Both read the same numbers from the same disk, ours in the studio's format, PEFT's in that of diffusers, and write one
file. Counted is the processor time of the whole process and the most memory that it held. PEFT needs a network to hang
the adapters on: here that is one whose weights take no memory, where its users load the base.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import studio
from studio.adapter import Adapter, BaseIdentity, Card
from studio.bench.rows import Row
from studio.bench.speed import ratio
from studio.bench.workload import sdxl
from studio.errors import WorkError
from studio.method import method_from
from studio.patch import LayerShape

COUNT, RANK = 10, 16
PEFT, STUDIO = "peft", "studio"


@dataclass(frozen=True)
class FileCase:
    """`every` takes one layer in so many; `ours` are options of `studio merge`, `theirs` a combination_type of PEFT."""

    name: str
    every: int
    ours: tuple[str, ...]
    theirs: str


CASES = (
    FileCase("exact sum of 10 files, 560 layers of SDXL", 1, ("--strategy", "sum"), "cat"),
    FileCase("sum of 10 files at rank 32, 56 layers of SDXL", 10, ("--strategy", "svd", "--rank", "32"), "svd"),
)


def measure(chosen: str, rounds: int, progress: Callable[[str, int, int], None] = lambda *_: None) -> list[Row]:
    rows = []
    for case in (case for case in CASES if chosen in case.name):
        with tempfile.TemporaryDirectory() as folder:
            progress(f"{case.name}: writing the files", 0, rounds)
            own, others = _files(Path(folder), case.every)
            merged = Path(folder) / "merged.safetensors"
            commands = {
                STUDIO: [sys.executable, "-m", "studio", "merge", *own, *case.ours, "--max-ram", "2GiB", "--out"],
                PEFT: [sys.executable, "-m", "studio.bench.peft_files", case.theirs, *others, "--out"],
            }
            seconds: dict[str, list[float]] = {name: [] for name in commands}
            peaks = dict.fromkeys(commands, 0)
            for number in range(rounds):
                progress(case.name, number, rounds)
                for name, command in commands.items():
                    merged.unlink(missing_ok=True)
                    took, peak = spent([*command, str(merged)])
                    seconds[name].append(took)
                    peaks[name] = max(peaks[name], peak)
            for name in commands:
                figures = {"cpu_s": sorted(seconds[name])[rounds // 2], "peak_mib": peaks[name] / 2**20}
                ratios = {PEFT: ratio(seconds, name, PEFT)} if name != PEFT else {}
                rows.append(Row(case.name, name, 0, figures, ratios))
    return rows


def spent(command: Sequence[str]) -> tuple[float, int]:
    """Processor seconds and the most bytes held of a process on one thread. Raises WorkError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            last = told.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkError(f"'{' '.join(command[2:5])} ...' failed: {''.join(last)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- the files -----------------------------------------------------------------------------------------------------


def attention_layers(every: int = 1) -> dict[str, LayerShape]:
    """The linear layers of SDXL's attention, or one in `every`, by name."""
    with torch.device("meta"):
        base = sdxl()
    names = list(base.select(("attention",), ("linear",)))[::every]
    return {name: site.shape for name, site in base.sites().items() if name in set(names)}


def _files(folder: Path, every: int) -> tuple[list[str], list[str]]:
    """The same random LoRAs in the studio's format and in that of diffusers."""
    layers = attention_layers(every)
    own, others = [], []
    for seed in range(COUNT):
        numbers = dict(_factors(layers, seed))
        own.append(str(folder / f"own-{seed}.safetensors"))
        _adapter(layers, numbers, seed).save(Path(own[-1]))
        others.append(str(folder / f"diffusers-{seed}.safetensors"))
        theirs = {f"{site}.lora_{'A' if part == 'down' else 'B'}.weight": v for (site, part), v in numbers.items()}
        save_file(theirs, others[-1])
    return own, others


def _factors(layers: dict[str, LayerShape], seed: int) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for site, shape in layers.items():
        yield (site, "down"), torch.randn(RANK, shape.in_features, generator=generator) / shape.in_features**0.5
        yield (site, "up"), 0.01 * torch.randn(shape.out_features, RANK, generator=generator)


def _adapter(layers: dict[str, LayerShape], numbers: dict[tuple[str, str], torch.Tensor], seed: int) -> Adapter:
    from studio.adapter import new_adapter

    method = method_from({"kind": "lora", "rank": RANK})
    identity = BaseIdentity(name="sdxl", family="sdxl", architecture="benchmark", values="", licence="")
    card = Card(
        method=method.model_dump(mode="json"),
        base=identity,
        sites=layers,
        trigger=f"word{seed}",
        concept=str(seed),
        seed=seed,
        library_version=studio.__version__,
    )
    adapter = new_adapter(card)
    adapter.load_tensors({f"{site}.main.{part}": value for (site, part), value in numbers.items()})
    return adapter
