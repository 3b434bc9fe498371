"""Our SaRA beside the public implementation, sjtuplayer/SaRA at ea21192, on a UNet of 7.1 M parameters.

    python docs/methods/sara-parity.py FOLDER [--time]

FOLDER is a checkout of that repository; nothing of it is copied here. Its `optim/adamw.py` takes the magnitude of the
weights it selects, so every negative one changes its sign at the start. It is run as it is, and with that `.abs()`
taken out (in memory); `optim/adamw2.py` has no such fault. Prints the greatest difference of any weight after 7 steps.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from studio.attachment import Attachment, attach, find_sites
from studio.method import Origin, method_from

STEPS, RATE, THETA, HALF = 7, 5e-4, 4e-3, 3
NEVER = 10**9
ONE_MATRIX = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def batches() -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 4, 16, 16, generator=g),
            torch.randint(0, 1000, (2,), generator=g),
            torch.randn(2, 7, 96, generator=g),
            torch.randn(2, 4, 16, 16, generator=g),
        )
        for _ in range(STEPS)
    ]


DATA = batches()


def loss(model: nn.Module, step: int) -> Tensor:
    noisy, times, text, target = DATA[step % STEPS]
    return (model(noisy, times, text).sample - target).square().mean()


def values(model: nn.Module) -> dict[str, Tensor]:
    names = [name for name, _ in unet().named_parameters()]
    return {name: _attribute(model, name).detach().clone() for name in names}


def _attribute(model: Any, name: str) -> Tensor:
    for part in name.split("."):
        model = getattr(model, part)
    return model  # type: ignore[return-value]


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# -- ours --------------------------------------------------------------------------------------------------------


@contextmanager
def ours(decay: float = 0.0, only: str = "", **settings: Any) -> Iterator[tuple[Callable[[int], None], nn.Module]]:
    """A function that makes a step, and the model."""
    model = unet().requires_grad_(False)
    sites = {name: site for name, site in find_sites({"unet": model}).items() if name.endswith(only)}
    method: Any = method_from(
        {"kind": "sara", "threshold": THETA, "rank_exact": True, "progressive": False, **settings}
    )
    layers, shapes = {n: s.module for n, s in sites.items()}, {n: s.shape for n, s in sites.items()}
    patches = method.patches(shapes, Origin("parity"), layers)
    optimizer = torch.optim.AdamW([p for q in patches.values() for p in q.parameters()], RATE, weight_decay=decay)
    attachment: Attachment
    with attach(sites, {name: [patch] for name, patch in patches.items()}, train=True) as attachment:

        def step(number: int) -> None:
            before = {(n, k): p for n, q in patches.items() for k, p in q.named_parameters()}
            for name, kept_by in method.reselect(patches, number, 2 * HALF).items():
                for key, kept in kept_by.items():
                    shrink(optimizer, before[name, key], patches[name].get_parameter(key), kept)
            loss(model, number).backward()
            method.penalise(patches, number, 0)
            optimizer.step()
            optimizer.zero_grad()
            attachment.refresh()

        yield step, model


def shrink(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, kept: Tensor) -> None:
    group, moments = optimizer.param_groups[0], optimizer.state.pop(old)
    group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    optimizer.state[new] = {key: value[kept] if value.ndim else value for key, value in moments.items()}


def trained(**settings: Any) -> dict[str, Tensor]:
    with ours(**settings) as (step, model):
        for number in range(STEPS):
            step(number)
        return values(model)


# -- theirs ------------------------------------------------------------------------------------------------------


def module(folder: Path, name: str, **changes: str) -> Any:
    text = (folder / "optim" / name).read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    made = types.ModuleType(name)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


def reference(cls: Any, whole_model: bool, only: str = "", half: int = NEVER, **settings: Any) -> Any:
    """A function that makes a step with one of the reference's optimizers, and the model."""
    random.seed(0)
    model = unet()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in name)
    what = model if whole_model else [p for p in model.parameters() if p.requires_grad]
    optimizer = cls(what, lr=RATE, threshold=THETA, progressive_iter=half, **settings)

    def step(number: int) -> None:
        loss(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def after(step: Callable[[int], None], model: nn.Module) -> dict[str, Tensor]:
    for number in range(STEPS):
        step(number)
    return values(model)


def compare(folder: Path) -> None:
    dense = module(folder, "adamw2.py").AdamW
    sparse, whole = module(folder, "adamw.py").AdamW, {"whole_model": True, "weight_decay": 0.0}
    mended = module(folder, "adamw.py", **{"trainable_params[i].abs()": "trainable_params[i]"}).AdamW
    plain = trained()
    none = {"whole_model": False, "weight_decay": 0.0}
    one = {"only": ONE_MATRIX, "biases": False}
    rank = {"lambda_rank": 5e-4, "only": f"{ONE_MATRIX}.weight", **none}
    rows = {
        "moved from the start": farthest(plain, values(unet())),
        "adamw2": farthest(plain, after(*reference(dense, **none))),
        "adamw, signs mended": farthest(plain, after(*reference(mended, **whole))),
        "adamw as it is": farthest(plain, after(*reference(sparse, **whole))),
        "adamw2, reselection": farthest(trained(progressive=True), after(*reference(dense, half=HALF, **none))),
        "adamw2, lambda 5e-4 on one matrix": farthest(
            trained(rank_weight=5e-4, **one), after(*reference(dense, **rank))
        ),
        "what lambda does there": farthest(trained(rank_weight=5e-4, **one), trained(**one)),
        "adamw2, weight decay 1e-2": farthest(
            trained(decay=1e-2), after(*reference(dense, whole_model=False, weight_decay=1e-2))
        ),
    }
    for name, value in rows.items():
        print(f"{name:36} {value:.1e}")  # noqa: T201


def clock(folder: Path, rounds: int = 15) -> None:
    """Seconds of processor time of one step; the candidates take turns."""
    dense = module(folder, "adamw2.py").AdamW
    mended = module(folder, "adamw.py", **{"trainable_params[i].abs()": "trainable_params[i]"}).AdamW
    full_model = unet()
    full_optimizer = torch.optim.AdamW(full_model.parameters(), RATE)

    def full(number: int) -> None:
        loss(full_model, number).backward()
        full_optimizer.step()
        full_optimizer.zero_grad()

    with ours() as (off, _), ours(rank_weight=5e-4, rank_exact=False) as (on, _):
        steps = {
            "ours": off,
            "ours, lambda 5e-4": on,
            "adamw, signs mended": reference(mended, whole_model=True)[0],
            "adamw2": reference(dense, whole_model=False)[0],
            "adamw2, lambda 5e-4": reference(dense, whole_model=False, lambda_rank=5e-4)[0],
            "full fine-tuning": full,
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds):
            for name, step in steps.items():
                start = time.process_time()
                step(number)
                seconds[name].append(time.process_time() - start)
    for name, taken in seconds.items():
        print(f"{name:24} median {statistics.median(taken[1:]):.3f} s, best {min(taken):.3f} s")  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare(Path(sys.argv[1]))
    if "--time" in sys.argv:
        clock(Path(sys.argv[1]))
