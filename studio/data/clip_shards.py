"""Large collections of clips as shards, read as a stream: tar files in WebDataset's layout, NAME.webp beside NAME.txt.

The k-th clip of the stream is a function of (seed, k) alone: shards come in an order drawn anew for each round, the
clips of a shard too. So the place in the stream follows from the step, a resumed run goes on where it was, and several
processes agree without a word. Only the headers of the shards are read beforehand. Files are only read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from studio.data.clip_pool import EncodedClip
from studio.data.clips import PICTURES, VIDEOS, Clip, first_line, looked_through, walk
from studio.errors import DataError
from studio.keyed import numpy_generator

MOST_BYTES = 64 * 2**20  # of one clip
MOST_BROKEN = 100  # unreadable clips in a row before it is given up


@dataclass(frozen=True)
class Member:
    """A clip in a shard: where its bytes lie, and where those of its caption do, if it has one."""

    name: str
    at: tuple[int, int]
    caption_at: tuple[int, int] | None


@dataclass(frozen=True)
class StreamedClip:
    """A clip of the stream, looked through; its pictures are decoded again when it is loaded."""

    content: bytes
    name: str
    caption: str
    kept: tuple[int, ...]
    durations: tuple[int, ...]
    loop: bool

    def load(self, fit: Callable[[Image.Image], Image.Image]) -> Clip:
        wanted = set(self.kept)
        frames = [fit(p) for i, (p, _) in enumerate(walk(Path(self.name), io.BytesIO(self.content))) if i in wanted]
        return Clip(tuple(frames), self.durations, self.loop)


class ShardStream:
    """`dropped` names the clips that could not be read, and why. Raises DataError for a folder without clips."""

    def __init__(self, folder: Path, most_frames: int, caption: str, seed: int) -> None:
        self.most_frames, self.caption, self.seed = most_frames, caption, seed
        shards = {path: len(members_of(path)) for path in sorted(folder.glob("*.tar"))}
        self.shards = [path for path, count in shards.items() if count]
        self.counts = [shards[path] for path in self.shards]
        self.total = sum(self.counts)
        self.dropped: dict[str, str] = {}
        if not self.total:
            raise DataError(f"'{folder}' holds no shard with clips", "give .tar files with NAME.webp and NAME.txt")

    def clip(self, number: int) -> StreamedClip:
        """The clip at a place of the endless stream; of one that is damaged, the next that is not."""
        for k in range(number, number + min(self.total, MOST_BROKEN)):
            path, member = self.member(k)
            try:
                return self._looked_at(path, member)
            except DataError as error:
                self.dropped[f"{path.name}:{member.name}"] = error.message
        raise DataError("the shards hold too many clips that cannot be read", next(iter(self.dropped.values())))

    def member(self, number: int) -> tuple[Path, Member]:
        """Which clip of which shard stands at a place of the stream."""
        turn, place = divmod(number, self.total)
        for shard in numpy_generator("shards", self.seed, turn).permutation(len(self.shards)):
            if place < self.counts[shard]:
                order = numpy_generator("shard", self.seed, turn, int(shard)).permutation(self.counts[shard])
                return self.shards[shard], members_of(self.shards[shard])[order[place]]
            place -= self.counts[shard]
        raise AssertionError("a place in a turn lies in one of its shards")

    def _looked_at(self, path: Path, member: Member) -> StreamedClip:
        content = _bytes_at(path, member.at)
        name = f"{path.name}:{member.name}"
        caption = self.caption
        if member.caption_at is not None:
            caption = first_line(_bytes_at(path, member.caption_at), f"{name}, its caption") or caption
        _, kept, durations, loop = looked_through(Path(member.name), self.most_frames, io.BytesIO(content))
        return StreamedClip(content, member.name, caption, kept, durations, loop)

    def report(self) -> list[str]:
        lines = [f"{self.total} clips in {len(self.shards)} shards, read as a stream; {len(self.dropped)} left out"]
        return lines + [f"left out: {name}: {reason}" for name, reason in list(self.dropped.items())[:100]]


@lru_cache(maxsize=8)
def members_of(path: Path) -> list[Member]:
    """The clips of a shard in its own order, with their captions. Raises DataError for a file that is no tar."""
    clips: dict[str, tuple[str, tuple[int, int]]] = {}
    captions: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                name = PurePosixPath(entry.name)
                if not entry.isfile() or name.name.startswith("."):
                    continue
                key, where = str(name.with_suffix("")), (entry.offset_data, entry.size)
                if name.suffix.lower() in (*PICTURES, *VIDEOS) and entry.size <= MOST_BYTES:
                    clips.setdefault(key, (entry.name, where))
                elif name.suffix.lower() == ".txt":
                    captions[key] = where
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"the shard '{path}' cannot be read: {error}", "copy it again, or remove it") from None
    return [Member(name, where, captions.get(key)) for key, (name, where) in clips.items()]


def _bytes_at(path: Path, where: tuple[int, int]) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(where[0])
            return file.read(where[1])
    except OSError as error:
        raise DataError(f"the shard '{path}' cannot be read: {error}", "copy it again") from None


class StreamPool:
    """A window on the stream, in the manner of ClipPool: at each step the oldest `refresh` clips give way to new ones.

    `encode` gives latents of a clip's frames. The window at a step is a function of the step, so nothing is kept of it.
    """

    def __init__(
        self, stream: ShardStream, window: int, refresh: int, seed: int, encode: Callable[[StreamedClip], EncodedClip]
    ) -> None:
        self.stream, self.window, self.refresh, self.seed, self.encode = stream, window, refresh, seed, encode
        self._looked: dict[int, StreamedClip] = {}
        self._encoded: dict[int, EncodedClip] = {}
        self.used: set[int] = set()

    def draw(self, step: int, micro: int, slots: range, bucketed: bool) -> list[EncodedClip]:
        """The clips of these slots. In a bucketed step all slots of all processes have one length."""
        first = step * self.refresh
        self._move_to(first)
        choices = list(self._looked)
        if bucketed:
            chosen = int(numpy_generator("bucket", self.seed, step, micro).integers(self.window))
            length = len(self._looked[choices[chosen]].kept)
            choices = [number for number in choices if len(self._looked[number].kept) == length]
        picks = [numpy_generator("clip slot", self.seed, step, micro, slot).integers(len(choices)) for slot in slots]
        return [self.clip(choices[int(pick)]) for pick in picks]

    def clip(self, number: int) -> EncodedClip:
        if number not in self._encoded:
            self._encoded[number] = self.encode(self._looked[number])
        self.used.add(number)
        return self._encoded[number]

    def _move_to(self, first: int) -> None:
        wanted = range(first, first + self.window)
        for held in (self._looked, self._encoded):
            for number in [number for number in held if number not in wanted]:
                del held[number]
        kept = self._looked
        self._looked = {number: kept[number] if number in kept else self.stream.clip(number) for number in wanted}
