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

from studio.errors import NonFiniteLoss, PresetError, RequestError
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

    reaches_all = True  # whether every step has a gradient for everything that is trained

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
    def save(self, folder: Path, step: int) -> Path:
        """Writes what is trained, as the user would use it, and returns where."""

    def check_first_step(self) -> None:
        """Called after the first backward pass; raises if a part of what is trained was never reached."""
        grads = {name: p.grad for group in self.groups() for name, p in group.parameters.items()}
        silent = [name for name, grad in grads.items() if grad is None]
        if silent and (self.reaches_all or len(silent) == len(grads)):
            raise PresetError(f"no gradient reaches '{silent[0]}'")

    def draw_samples(self, step: int) -> Iterator[Event]:
        """Draws the sample pictures and yields a `sample` event for each."""
        yield from ()

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
    loop = _Loop(task, schedule, run, accelerator, run.newest_checkpoint() if resume else None)
    started_at = time.monotonic()
    done = False
    yield from loop.begin()
    try:
        while loop.step < schedule.steps:
            if _any_process(accelerator, should_stop() or run.requested("stop")):
                yield from loop.checkpoint()
                done = True
                yield Event("stopped", loop.step, {"steps": schedule.steps})
                return
            yield loop.advance()
            yield from loop.look_up()
        yield from loop.checkpoint()
        loop.keep_averages()
        done = True
        yield Event("finished", loop.step, {"seconds": round(time.monotonic() - started_at, 3)})
    finally:
        if not done:
            _leave(accelerator)


class _Loop:
    """One training under way: what `fit` does, in parts. Steps are counted from 0 while made, from 1 once made."""

    def __init__(
        self, task: Task, schedule: Schedule, run: Run, accelerator: Accelerator, checkpoint: Path | None
    ) -> None:
        self.task, self.schedule, self.run, self.accelerator = task, schedule, run, accelerator
        self.from_checkpoint = checkpoint
        if checkpoint is not None:
            task.restore(checkpoint)
        self.groups = task.groups()
        self.named = {name: parameter for group in self.groups for name, parameter in group.parameters.items()}
        self.optimizer = _optimizer(self.groups, schedule, accelerator.device)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
        self.ema = {name: p.detach().clone() for name, p in self.named.items()} if schedule.ema_decay else {}
        self.state = _State(self.named, self.optimizer, self.ema, self.scaler, schedule, task.updated)
        self.main = accelerator.is_main_process
        self.step = 0
        self.batch_size = schedule.batch_size * schedule.gradient_accumulation_steps * accelerator.num_processes
        self.window = _Window(self.batch_size)

    def begin(self) -> Iterator[Event]:
        """Begins, or goes on from the checkpoint."""
        if self.from_checkpoint is not None:
            self.step = self.state.load(self.from_checkpoint)
            yield Event("resumed", self.step, {"from_step": self.step})
        else:
            trained = sum(p.numel() for p in self.named.values())
            yield Event("started", 0, {"steps": self.schedule.steps, "trained_parameters": trained})
            if self.main and self.schedule.sample_every:
                yield from _undisturbed(self.task.draw_samples, 0)
        self.window.skip()

    def advance(self) -> Event:
        """One step of the optimizer."""
        for name, (smaller, kept) in self.task.reselect(self.step).items():
            self.state.shrink(name, smaller, kept)
        learning_rate = self.schedule.learning_rate_at(self.step)
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            settings["lr"] = learning_rate * group.learning_rate_factor
        loss = self._gradients()
        norm = self._update()
        self.step += 1
        return Event("step", self.step, self.window.figures(loss, learning_rate, norm))

    def _gradients(self) -> float:
        """Sums gradients over micro-batches, then over processes, and returns the loss."""
        loss = 0.0
        slots = _own_slots(self.schedule.batch_size, self.accelerator)
        for micro in range(self.schedule.gradient_accumulation_steps):
            torch.manual_seed(key_of(self.schedule.seed, "stream", self.step, micro, self.accelerator.process_index))
            with self.accelerator.autocast():
                losses = self.task.losses(self.step, micro, slots)
            part = losses.float().sum() / self.batch_size
            if not torch.isfinite(part):
                raise self._non_finite("loss", micro)
            self.scaler.scale(part).backward()
            loss += part.item()
        loss = _reduce_gradients(list(self.named.values()), loss, self.accelerator)
        if self.step == 0:
            self.task.check_first_step()
        return loss

    def _update(self) -> float:
        """Changes the trained values, and returns the norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), self.schedule.max_grad_norm or math.inf)
        if not torch.isfinite(norm) and not self.scaler.is_enabled():
            raise self._non_finite("gradient", 0)
        self.task.penalise(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            _update_ema(self.ema, self.named, self.schedule.ema_decay, self.step)
        self.task.updated()
        return float(norm)

    def look_up(self) -> Iterator[Event]:
        """What happens now and then, after a step: validation, samples, a checkpoint."""
        schedule, last = self.schedule, self.step == self.schedule.steps
        if schedule.validate_every and (self.step % schedule.validate_every == 0 or last):
            with self.state.averaged():
                value = _undisturbed_value(self.task.validation_loss)
            if value is not None:
                yield Event("validation", self.step, {"loss": value})
        due = schedule.sample_every and (self.step % schedule.sample_every == 0 or last)
        if self.main and (self.run.requested("sample") or due):
            with self.state.averaged():
                yield from _undisturbed(self.task.draw_samples, self.step)
        if self.step % schedule.checkpoint_every == 0 and not last:
            yield from self.checkpoint()
        self.window.skip()  # what was drawn and saved does not count as training time

    def checkpoint(self) -> Iterator[Event]:
        if not self.main:
            return
        partial = self.run.begin_checkpoint(self.step)
        with self.state.averaged():
            self.task.save(partial, self.step)
        self.state.save(partial, self.step)
        final = self.run.commit_checkpoint(partial, self.step, self.schedule.checkpoints_kept)
        yield Event("checkpoint", self.step, {"path": str(final.relative_to(self.run.folder))})

    def keep_averages(self) -> None:
        """Leaves the averaged values in the task, if there are any."""
        if self.ema:
            _copy_values(self.ema, self.named)
            self.task.updated()

    def _non_finite(self, what: str, micro: int) -> NonFiniteLoss:
        slots = _own_slots(self.schedule.batch_size, self.accelerator)
        return NonFiniteLoss(
            f"the {what} is not finite at step {self.step + 1}, in {self.accelerator.mixed_precision} precision: "
            + self.task.describe(self.step, micro, slots),
            hint="the last checkpoint is good: lower learning_rate, or set mixed_precision to 'no' or 'bf16', "
            "then resume",
        )


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
