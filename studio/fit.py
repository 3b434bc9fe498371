"""The training loop. Everything that trains runs through `fit`: adapters, whole networks, the bundled bases.

`fit` yields events and does nothing else with them; the command line prints them, the run folder stores them, tests
look at them. Randomness is keyed by (seed, step, slot): a slot is a sample's place in the batch over all processes.
So a resumed run equals an uninterrupted one bit for bit on a CPU, whatever was sampled in between, and two processes
equal one with twice the batch.
"""

from __future__ import annotations

import json
import math
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from studio.errors import NonFiniteLoss, RequestError
from studio.files import write_atomically
from studio.keyed import key_of
from studio.preset import Schedule
from studio.run import Event, Run


@dataclass(frozen=True)
class Group:
    """Trainable tensors by name, with a factor on the learning rate."""

    parameters: dict[str, nn.Parameter]
    learning_rate_factor: float = 1.0


class Task(ABC):
    """What is trained, on what, and what it shows for it."""

    @abstractmethod
    def groups(self) -> list[Group]: ...

    @abstractmethod
    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        """The loss of each sample in these slots of a micro-batch, (B,). Must depend on nothing but its arguments."""

    @abstractmethod
    def describe(self, step: int, micro: int, slots: range) -> str:
        """Which samples and times these slots hold, for a message about a loss that is not finite."""

    @abstractmethod
    def validation_loss(self) -> float | None:
        """The loss on held-out data at fixed noise, or None if nothing is held out."""

    @abstractmethod
    def draw_samples(self, step: int) -> Iterator[Event]:
        """Draws the sample pictures and yields a `sample` event for each."""

    @abstractmethod
    def save(self, folder: Path, step: int) -> Path:
        """Writes what is trained, as the user would use it, and returns where."""

    @abstractmethod
    def check_first_step(self) -> None:
        """Called after the first backward pass; raises if a part of what is trained was never reached."""

    # -- for tasks that do more than follow gradients ------------------------------------------------------------

    def prepare(self) -> Iterator[Event]:
        """Called before all else: draws or encodes the data; yields `progress` events."""
        yield from ()

    def restore(self, folder: Path) -> None:  # noqa: B027
        """Called before `groups` on resume: takes from what `save` wrote all that decides what is trained."""

    def reselect(self, step: int) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Before step `step`: by name, a smaller parameter that replaces a flat one, and the positions kept."""
        return {}

    def penalise(self, step: int) -> None:  # noqa: B027
        """Adds gradients of penalties, after clipping."""

    def updated(self) -> None:  # noqa: B027
        """Called whenever trained values have changed."""


def fit(
    task: Task,
    schedule: Schedule,
    run: Run,
    accelerator: Accelerator,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Trains `task` and yields events until it is finished or asked to stop. Raises NonFiniteLoss, DiskError."""
    checkpoint = run.newest_checkpoint() if resume else None
    if checkpoint is not None:
        task.restore(checkpoint)
    groups = task.groups()
    named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = _optimizer(groups, schedule, accelerator.device)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
    ema = {name: p.detach().clone() for name, p in named.items()} if schedule.ema_decay else {}
    state = _State(named, optimizer, ema, scaler, schedule, task.updated)
    main = accelerator.is_main_process
    started_at = time.monotonic()
    done = False

    # -- begin, or go on from the newest checkpoint
    step = 0
    if checkpoint is not None:
        step = state.load(checkpoint)
        yield Event("resumed", step, {"from_step": step})
    else:
        yield Event(
            "started", 0, {"steps": schedule.steps, "trained_parameters": sum(p.numel() for p in named.values())}
        )
        if main and schedule.sample_every:
            yield from _undisturbed(task.draw_samples, 0)
    window = _Window(schedule.batch_size * schedule.gradient_accumulation_steps * accelerator.num_processes)

    try:
        while step < schedule.steps:
            # -- requests
            if _any_process(accelerator, should_stop() or run.requested("stop")):
                yield from _checkpoint(task, state, run, step, schedule, main)
                done = True
                yield Event("stopped", step, {"steps": schedule.steps})
                return

            # -- gradients: summed over micro-batches, then over processes
            for name, (smaller, kept) in task.reselect(step).items():
                state.shrink(name, smaller, kept)
            parameters = list(named.values())
            learning_rate = schedule.learning_rate_at(step)
            for group, settings in zip(groups, optimizer.param_groups, strict=True):
                settings["lr"] = learning_rate * group.learning_rate_factor
            loss = 0.0
            for micro in range(schedule.gradient_accumulation_steps):
                slots = _own_slots(schedule.batch_size, accelerator)
                torch.manual_seed(key_of(schedule.seed, "stream", step, micro, accelerator.process_index))
                with accelerator.autocast():
                    losses = task.losses(step, micro, slots)
                part = losses.float().sum() / (window.batch_size)
                if not torch.isfinite(part):
                    raise _non_finite("loss", task, step, micro, slots, accelerator)
                scaler.scale(part).backward()
                loss += part.item()
            loss = _reduce_gradients(parameters, loss, accelerator)
            if step == 0:
                task.check_first_step()

            # -- update
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm or math.inf)
            if not torch.isfinite(norm) and not scaler.is_enabled():
                raise _non_finite("gradient", task, step, 0, _own_slots(schedule.batch_size, accelerator), accelerator)
            task.penalise(step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                _update_ema(ema, named, schedule.ema_decay, step)
            task.updated()
            step += 1
            yield Event("step", step, window.figures(loss, learning_rate, float(norm)))

            # -- what happens now and then
            if schedule.validate_every and (step % schedule.validate_every == 0 or step == schedule.steps):
                with state.averaged():
                    value = _undisturbed_value(task.validation_loss)
                if value is not None:
                    yield Event("validation", step, {"loss": value})
            due = schedule.sample_every and (step % schedule.sample_every == 0 or step == schedule.steps)
            if main and (run.requested("sample") or due):
                with state.averaged():
                    yield from _undisturbed(task.draw_samples, step)
            if step % schedule.checkpoint_every == 0 and step < schedule.steps:
                yield from _checkpoint(task, state, run, step, schedule, main)
            window.skip()  # what was drawn and saved does not count as training time

        # -- end
        yield from _checkpoint(task, state, run, step, schedule, main)
        if ema:
            _copy_values(ema, named)
            task.updated()
        done = True
        yield Event("finished", step, {"seconds": round(time.monotonic() - started_at, 3)})
    finally:
        if not done:
            _leave(accelerator)


# -- state -----------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """All that a resumed run needs beside the task: trained values, moments, averages, the step."""

    named: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    scaler: torch.amp.GradScaler
    schedule: Schedule
    updated: Callable[[], None]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"value.{name}": p.detach() for name, p in self.named.items()}
        found |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.named.items():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": value for key, value in moments.items() if isinstance(value, Tensor)}
        return {name: value.cpu().contiguous().clone() for name, value in found.items()}

    def save(self, folder: Path, step: int) -> None:
        write_atomically(folder / "state.safetensors", save(self.tensors()))
        facts = {"step": step, "schedule": self.schedule.fingerprint(), "scaler": self.scaler.state_dict()}
        write_atomically(folder / "state.json", json.dumps(facts))

    def load(self, folder: Path) -> int:
        """Restores everything and returns the step. Raises RequestError if the schedule is another one."""
        facts, tensors = _read_state(folder)
        if facts["schedule"] != self.schedule.fingerprint():
            raise RequestError(
                f"'{folder}' was written under other settings, so it cannot be resumed exactly",
                hint="resume with the run's own preset.yaml, or start a new run",
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"value.{name}"])
                kinds = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
                # AdamW keeps its step counter on the CPU, its moments beside the parameter.
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device) for key in kinds
                }
            for name in self.ema:
                self.ema[name].copy_(tensors[f"ema.{name}"])
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.updated()
        return facts["step"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold the averaged values; outside, their own again."""
        if not self.ema:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.named.items()}
        try:
            _copy_values(self.ema, self.named)
            self.updated()
            yield
        finally:
            _copy_values(own, self.named)
            self.updated()

    def shrink(self, name: str, smaller: nn.Parameter, kept: Tensor) -> None:
        """Puts a smaller parameter in the place of a flat one, with its share of moments and averages."""
        old = self.named[name]
        self.named[name] = smaller
        for settings in self.optimizer.param_groups:
            settings["params"] = [smaller if p is old else p for p in settings["params"]]
        moments = self.optimizer.state.pop(old, {})
        if moments:
            self.optimizer.state[smaller] = {k: v[kept] if v.ndim else v for k, v in moments.items()}
        if name in self.ema:
            self.ema[name] = self.ema[name][kept]


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise RequestError(
            f"the checkpoint '{folder}' is damaged (state.json or state.safetensors): {error}",
            hint="remove that folder; the run then resumes from the checkpoint before it",
        ) from None


def _checkpoint(task: Task, state: _State, run: Run, step: int, schedule: Schedule, main: bool) -> Iterator[Event]:
    if not main:
        return
    partial = run.begin_checkpoint(step)
    with state.averaged():
        task.save(partial, step)
    state.save(partial, step)
    final = run.commit_checkpoint(partial, step, schedule.checkpoints_kept)
    yield Event("checkpoint", step, {"path": str(final.relative_to(run.folder))})


@torch.no_grad()
def _copy_values(values: dict[str, Tensor], named: dict[str, nn.Parameter]) -> None:
    for name, value in values.items():
        named[name].copy_(value)


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], named: dict[str, nn.Parameter], decay: float, step: int) -> None:
    # The average forgets the random start: its horizon grows with the steps made.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(named.values()), 1 - decay)


def _optimizer(groups: list[Group], schedule: Schedule, device: torch.device) -> torch.optim.AdamW:
    settings = [{"params": list(group.parameters.values())} for group in groups]
    return torch.optim.AdamW(
        settings,
        lr=schedule.learning_rate_at(0),
        betas=schedule.betas,
        weight_decay=schedule.weight_decay,
        fused=device.type == "cuda" or None,
    )


# -- processes -------------------------------------------------------------------------------------------------


def _own_slots(batch_size: int, accelerator: Accelerator) -> range:
    first = accelerator.process_index * batch_size
    return range(first, first + batch_size)


def _reduce_gradients(parameters: list[nn.Parameter], loss: float, accelerator: Accelerator) -> float:
    """Sums gradients and loss over processes in one flat exchange. The models themselves are never wrapped."""
    if accelerator.num_processes == 1:
        return loss
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([*(g.reshape(-1).float() for g in gradients), torch.tensor([loss], device=accelerator.device)])
    torch.distributed.all_reduce(flat)
    start = 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = flat[start : start + gradient.numel()].view_as(gradient).to(gradient.dtype)
        start += gradient.numel()
    return float(flat[-1])


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    votes = torch.tensor([float(flag)], device=accelerator.device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item() > 0)


def _leave(accelerator: Accelerator) -> None:
    """Tells the other processes, which wait at the next step's vote, that this one has gone."""
    if accelerator.num_processes > 1:
        _any_process(accelerator, True)


# -- figures and faults ----------------------------------------------------------------------------------------


class _Window:
    """Speed and memory since the last look."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.skip()

    def skip(self) -> None:
        self.since = time.monotonic()

    def figures(self, loss: float, learning_rate: float, grad_norm: float) -> dict[str, float]:
        now = time.monotonic()
        speed = self.batch_size / max(now - self.since, 1e-9)
        self.since = now
        return {
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "samples_per_second": round(speed, 3),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }


def peak_memory_gib() -> float:
    """The most memory held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _undisturbed(draw: Callable[[int], Iterator[Event]], step: int) -> Iterator[Event]:
    with torch.random.fork_rng():
        yield from draw(step)


def _undisturbed_value(compute: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        return compute()


def _non_finite(what: str, task: Task, step: int, micro: int, slots: range, accelerator: Accelerator) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"the {what} is not finite at step {step + 1}, in {accelerator.mixed_precision} precision: "
        + task.describe(step, micro, slots),
        hint="the last checkpoint is good: lower learning_rate, or set mixed_precision to 'no' or 'bf16', then resume",
    )
