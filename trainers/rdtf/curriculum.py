"""Which task a clip is trained on, and when: RDTF's difficulty-adaptive curriculum, and what it can be compared with.

`none`     every task alike.
`linear`   the paper's static weights of the tasks, from easy to hard over E steps.
`paper`    these plus the adaptive ones: a PID value of the training loss, ranked among the last thousand, chooses a
           level. The published scheduler cannot run (undefined names, a rank loop that stops early), so this is its
           intent: a high or rising loss moves towards the easy tasks.
`adaptive` ours: difficulty is the entropy left in a *sample* after its conditions, competence rises with time and
           falls when the loss is high for its task and noise level, and samples beyond competence are drawn less.
           In the paper's loop drawing harder tasks raises the loss itself, which then reads as failure.

State is a function of the losses seen, in order; it goes into checkpoints, so a resumed run draws what it would have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trainers.rdtf.masks import GENERATION, Draw, draw_mask, tasks_for

Mode = Literal["none", "linear", "paper", "adaptive"]
RING = 1000
KP, KI, KD = 5.0, 3.0, 1.3  # the paper's
STATIC = {"generation": (0.1, 0.5, 0.9), "interpolation": (0.9, 0.5, 0.1), "prediction": (0.7, 0.5, 0.3)}
LEVELS = {
    "generation": (0.1, 0.3, 0.5, 0.7, 0.9),
    "interpolation": (0.9, 0.7, 0.5, 0.3, 0.1),
    "prediction": (0.5, 0.5, 0.5, 0.5, 0.5),
}
GAP, ENERGY, NO_TEXT = 0.5, 0.5, 0.15  # a, b and g of the difficulty
SPREAD, FLOOR = 0.2, 0.05  # s of the draw, and the weight that no sample falls below
BACKWARD = 0.3  # rho: how much of competence the loss decides
CANDIDATES = 8


@dataclass
class Curriculum:
    """`end` is E, the step at which the static part is over."""

    mode: Mode
    end: int
    values: deque[float] = field(default_factory=lambda: deque(maxlen=RING))  # PID values of the last losses
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RING))
    difficulties: deque[float] = field(default_factory=lambda: deque(maxlen=RING))
    usual: dict[str, float] = field(default_factory=dict)  # running mean loss by task and noise level
    drawn: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self, step: int, count: int, energy: float, rng: np.random.Generator) -> Draw:
        """A task and its mask for a clip of `count` frames."""
        tasks = tasks_for(count)
        if len(tasks) == 1:
            return draw_mask(tasks[0], count, rng)
        if self.mode != "adaptive":
            weights = np.array([self.weight(task, step) for task in tasks])
            return draw_mask(tasks[rng.choice(len(tasks), p=weights / weights.sum())], count, rng)
        candidates = [draw_mask(tasks[rng.integers(len(tasks))], count, rng) for _ in range(CANDIDATES)]
        ranks = np.array([self.rank(difficulty(candidate, energy)) for candidate in candidates])
        weights = draw_weights(ranks, self.competence(step))
        return candidates[rng.choice(CANDIDATES, p=weights / weights.sum())]

    def weight(self, task: str, step: int) -> float:
        """The weight of a task in the draw, for the modes that weigh tasks."""
        if self.mode == "none":
            return 1.0
        kind = kind_of(task)
        weight = float(np.interp(step, (0, self.end / 2, self.end), STATIC[kind]))
        return weight + LEVELS[kind][self.level()] if self.mode == "paper" else weight

    def level(self) -> int:
        """0 to 4: the lower the loss stands among the last thousand, the higher, hence the harder."""
        return min(4, int((1 - self.quantile()) * 5))

    def quantile(self) -> float:
        """How much of the ring lies below its newest value, in [0, 1]; a half while it is empty."""
        if len(self.values) < 2:
            return 0.5
        return bisect_left(sorted(self.values), self.values[-1]) / (len(self.values) - 1)

    def competence(self, step: int) -> float:
        """k = clip(t / E, 0, 1) (1 - rho) + rho (1 - q)."""
        grown = min(1.0, step / max(1, self.end))
        return grown * (1 - BACKWARD) + BACKWARD * (1 - self.quantile())

    def rank(self, value: float) -> float:
        """A difficulty as its place among those seen of late, in [0, 1]."""
        if len(self.difficulties) < 32:
            return min(1.0, value / 2)
        ordered = sorted(self.difficulties)
        return bisect_left(ordered, value) / len(ordered)

    # -- learning from losses ------------------------------------------------------------------------------------

    def observe(
        self, step: int, draws: list[Draw], energies: list[float], times: list[float], losses: list[float]
    ) -> None:
        """Takes in the losses of a batch, in the order of its slots; `times` in [0, 1] are the noise levels."""
        for draw, energy, time, loss in zip(draws, energies, times, losses):
            self.drawn[draw.task] = self.drawn.get(draw.task, 0) + 1
            if len(draw.given) > 1:
                self.difficulties.append(difficulty(draw, energy))
            if not np.isfinite(loss):
                continue
            measured = self._relative(draw.task, time, loss) if self.mode == "adaptive" else loss
            before = self.losses[-1] if self.losses else measured
            self.losses.append(measured)
            mean = sum(self.losses) / len(self.losses)
            self.values.append(KP * measured + KI * mean + KD * (measured - before))
        if step % max(1, self.end // 100) == 0:
            self.history.append({"step": step, "competence": self.competence(step), "drawn": dict(self.drawn)})
            self.drawn = {}

    def _relative(self, task: str, time: float, loss: float) -> float:
        """The loss over what is usual for this task at this noise level."""
        key = f"{task}:{min(9, int(time * 10))}"
        usual = self.usual.get(key, loss)
        self.usual[key] = 0.95 * usual + 0.05 * loss
        return loss / max(usual, 1e-12)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("values", "losses", "difficulties")}
        return {**lists, "usual": dict(self.usual), "drawn": dict(self.drawn), "history": list(self.history)}

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("values", "losses", "difficulties"):
            setattr(self, name, deque(state[name], maxlen=RING))
        self.usual, self.drawn, self.history = dict(state["usual"]), dict(state["drawn"]), list(state["history"])


def kind_of(task: str) -> str:
    if task in GENERATION:
        return "generation"
    return "interpolation" if task == "interpolation" else "prediction"


def difficulty(draw: Draw, energy: float) -> float:
    """h = targets / n (1 + a gap / n + b energy) + g [no text]: what is left open once the conditions are known.

    The gap is the mean distance from a target to the nearest given frame; n where none is given.
    """
    count = len(draw.given)
    given = np.flatnonzero(draw.given)
    targets = np.flatnonzero(~np.array(draw.given))
    gap = float(np.abs(targets[:, None] - given[None]).min(1).mean()) if len(given) and len(targets) else float(count)
    return len(targets) / count * (1 + GAP * gap / count + ENERGY * energy) + NO_TEXT * (not draw.told)


def draw_weights(ranks: np.ndarray, competence: float) -> np.ndarray:
    """exp(-((h - k)+)^2 / 2 s^2), and never less than the floor, so that no task starves."""
    beyond = np.clip(ranks - competence, 0, None)
    return np.maximum(np.exp(-(beyond**2) / (2 * SPREAD**2)), FLOOR)
