"""What all trainings of music from nothing share: pieces of the melody world, networks, saving. T samples."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from studio.data import melodies
from studio.data.cache import Cache
from studio.data.melodies.fields import Fields, draw_fields
from studio.data.melodies.modes import TAUGHT, TRADITIONS
from studio.data.melodies.pool import MelodyPool
from studio.data.melodies.source import Melody, draw_melody
from studio.fit import Group, Task
from studio.keyed import numpy_generator
from studio.paths import studio_home
from studio.preset import Preset
from studio.run import Event, Run

UNHEARD = {"__main__.py", "folder.py", "pool.py"}  # of the world's files, those that keep or write what others play


class MusicTask(Task):
    """What both stages share: the networks, the pieces, saving."""

    networks: tuple[str, ...]
    piece_seconds: float
    every_mode = TAUGHT  # leaves out what adapters are to teach; a network that is told nothing may hear all

    def __init__(self, method: Any, base: Any, preset: Preset, run: Run) -> None:
        self.method, self.base, self.preset, self.run = method, base, preset, run
        self.modes = frozenset(preset.data.modes) or self.every_mode
        self.modules = self._networks()
        for module in self.modules.values():
            module.requires_grad_(True)
        self._train_mode(True)
        data, encoder = preset.data, self._encoder()
        kept = (Cache(studio_home() / "cache"), self._source(encoder)) if encoder is not None else ()
        self.pool = MelodyPool(self._piece, self._row, data.pool, data.refresh, preset.seed, *kept)

    def prepare(self) -> Iterator[Event]:
        for done in self.pool.fill():
            yield Event("progress", 0, {"what": "playing pieces", "done": done, "total": self.pool.size})
        for text in self.pool.cache.warnings if self.pool.cache else ():
            yield Event("warning", 0, {"text": text})

    def _networks(self) -> dict[str, Any]:
        """What is trained, by name."""
        return {name: getattr(self.base.denoiser, name) for name in self.networks}

    def _encoder(self) -> Any:
        """The frozen network that makes rows of waves, whose rows are then kept on disk; None where waves are kept."""
        return None

    def _source(self, encoder: Any) -> str:
        """All that a row depends on beside its key: how pieces are drawn, of what length, and what encodes them."""
        digest = hashlib.sha256()
        for file in sorted(Path(melodies.__file__).parent.glob("*.py")):
            if file.name not in UNHEARD:
                digest.update(file.read_bytes())
        for name, value in sorted(encoder.state_dict().items()):
            digest.update(name.encode() + value.cpu().float().numpy().tobytes())
        data, kind = self.preset.data, type(self).__name__
        told = (self.piece_seconds, sorted(self.modes), data.intonation, data.stems, self.method.basses, kind)
        return f"{digest.hexdigest()}|{told}"

    def _train_mode(self, on: bool) -> None:
        for module in self.modules.values():
            module.train(on)

    def _row(self, waves: Tensor) -> Tensor:
        """What the pool keeps of waves (B, 1, T)."""
        return waves

    def _piece(self, key: tuple[object, ...], held_out: bool = False) -> tuple[Tensor, str]:
        piece = self._drawn(key, self._is_stem(key), held_out)
        return piece.wave, self._told(piece)

    def _is_stem(self, key: tuple[object, ...]) -> bool:
        """Of a third of the pieces the line is played alone, as it will be measured."""
        return self.preset.data.stems or numpy_generator("stem", *key).random() < 1 / 3

    def _drawn(
        self, key: tuple[object, ...], stem: bool, held_out: bool = False, fields: Fields | None = None
    ) -> Melody:
        return draw_melody(
            key,
            self.piece_seconds,
            self.base.sample_rate_hz,
            TRADITIONS,
            held_out=held_out,
            modes=self.modes,
            stem=stem,
            intonation=self.preset.data.intonation,
            fields=fields or (None if held_out else self._bass(key)),
        )

    def _bass(self, key: tuple[object, ...]) -> Fields | None:
        """The fields of a piece that is turned into a bass's; None for others."""
        rng = numpy_generator("bass", *key)
        if rng.random() >= self.method.basses:
            return None
        while (fields := draw_fields(rng, ("western",), modes=self.modes)).instrument != "bass":
            pass
        return fields

    def _told(self, piece: Melody) -> str:
        """What the network is told of a piece."""
        return piece.caption

    def _held_out(self, count: int) -> list[tuple[Tensor, str]]:
        """Pieces of combinations that training never has."""
        return [self._piece(("validation", i), held_out=True) for i in range(count)]

    def groups(self) -> list[Group]:
        named: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            named |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        return [Group(named)]

    def describe(self, step: int, micro: int, slots: range) -> str:
        return f"melodies of seed {self.preset.seed}, slots {slots.start} to {slots.stop - 1}"

    def save(self, folder: Path, step: int) -> Path:
        self._write(folder / "base")
        return folder / "base"

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """The whole base as a folder that its libraries load."""
