"""The training of one adapter, whatever its base makes: patches on sites, learned words, checkpoints.

What is shown, and what the loss is, say the tasks for pictures (`customize.py`), for clips (`customize_clips.py`) and
for sounds (`music/task.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapter import Card, load_adapter, new_adapter
from studio.attachment import attach
from studio.base import Base, Request
from studio.data.captions import put_words
from studio.errors import WorkError
from studio.fit import Group, Task
from studio.method import PatchMethod
from studio.patch import Patch
from studio.preset import Preset
from studio.run import Event, Run


class AdapterTraining(Task):
    """Trains the patches (and learned words) of one adapter. Subclasses have the data."""

    base: Any  # of the family that the subclass is for; it can `generate`

    def __init__(
        self,
        method: PatchMethod,
        base: Base,
        preset: Preset,
        run: Run,
        card: Card,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method, self.preset, self.run = method, preset, run
        self.sites = method.sites(base)
        layers = {name: site.module for name, site in self.sites.items()}
        self.adapter = new_adapter(card, layers, inputs or {})
        self.attachment = attach(self.sites, self.adapter.by_site(), train=True)

    @abstractmethod
    def prepare(self) -> Iterator[Event]:
        """Encodes the data; yields `progress` and `warning` events. Called once, before anything else."""

    def sketch_inputs(self) -> Iterator[Event]:
        """Puts into the finished adapter what merging wants to know of its layers' inputs; may yield `warning`."""
        yield from ()

    def _fill(self, text: str) -> str:
        card = self.adapter.card
        return put_words(text, {"trigger": card.trigger, "class": card.class_word})

    def draw_samples(self, step: int) -> Iterator[Event]:
        """One sample of each prompt, always from the same noise; at step 0 by the base alone."""
        self.attachment.weight = float(step > 0)
        self._train_mode(False)
        for column, prompt in enumerate(map(self._fill, self.preset.sample_prompts)):
            work = self.base.generate(self.sample_request(prompt, column))[0]
            yield self.save_sample(work, step, column, prompt)
        self._train_mode(True)
        self.attachment.weight = 1.0

    def sample_request(self, prompt: str, seed: int) -> Request:
        """What is asked of the base for a sample."""
        return Request([prompt], [seed], steps=self.preset.sample_steps, seconds=self.preset.sample_seconds)

    @abstractmethod
    def save_sample(self, work: Any, step: int, column: int, prompt: str) -> Event:
        """Stores what the base made of a prompt and returns its `sample` event."""

    def processes(self) -> int:
        return max(1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)

    # -- held-out data -------------------------------------------------------------------------------------------

    def validation_loss(self) -> float | None:
        """The mean loss on what is held out, over noises and times that are the same each time."""
        self._train_mode(False)
        losses = list(self.held_out_losses())
        self._train_mode(True)
        return torch.cat(losses).mean().item() if losses else None

    @abstractmethod
    def held_out_losses(self) -> Iterator[Tensor]:
        """The losses of held-out examples, (B,) each; nothing if nothing is held out."""

    # -- what the loop asks ------------------------------------------------------------------------------------

    @property
    def patches(self) -> dict[str, Patch]:
        """By site; an adapter in training has one term on each."""
        return {site: terms["main"] for site, terms in self.adapter.patches.items()}

    def groups(self) -> list[Group]:
        patches = {
            f"{site}.main.{name}": parameter
            for site, patch in self.patches.items()
            for name, parameter in patch.named_parameters()
        }
        words: dict[str, Any] = {f"{e}.{w}": v for e, ws in self.adapter.words.items() for w, v in ws.items()}
        groups = [Group(patches)]
        if words:
            assert self.preset.learning_rate is not None
            groups.append(Group(words, self.preset.learned_words_lr / self.preset.learning_rate))
        return groups

    def restore(self, folder: Path) -> None:
        """Takes the patches from the checkpoint, whose sizes may be others by now."""
        stored = load_adapter(folder / "adapter.safetensors").patches
        self.adapter.patches = {site: stored[site] for site in self.sites}  # sums over them keep their order
        self.attachment.detach()
        self.attachment = attach(self.sites, self.adapter.by_site(), train=True)

    def reselect(self, step: int) -> dict[str, tuple[nn.Parameter, Tensor]]:
        patches = self.patches
        return {
            f"{site}.main.{name}": (patches[site].get_parameter(name), positions)
            for site, kept in self.method.reselect(patches, step, self.preset.steps).items()
            for name, positions in kept.items()
        }

    def penalise(self, step: int) -> None:
        self.method.penalise(self.patches, step, self.preset.seed)

    def updated(self) -> None:
        self.attachment.refresh()

    def _train_mode(self, on: bool) -> None:
        for patch in self.patches.values():
            patch.train(on)  # dropout

    def save(self, folder: Path, step: int) -> Path:
        self.adapter.card.steps = step
        self.adapter.save(folder / "adapter.safetensors")
        return folder / "adapter.safetensors"

    def check_first_step(self) -> None:
        names = {site.module: name for name, site in self.sites.items()}
        silent = self.attachment.silent_sites(names)
        if silent:
            raise WorkError(
                f"{len(silent)} of {len(self.sites)} patched layers were never reached, first '{silent[0]}'",
                hint="leave them out of method.target_modules",
            )

    def close(self) -> None:
        """Takes everything off the base again."""
        self.attachment.detach()
