"""Clips: animated stickers as files and folders of them, with transparency, durations and captions.

Read are GIF, APNG and animated WebP, single pictures (clips of one frame), folders of frames (01.png, 02.png, ...),
and with the package `av` also WebM and MP4. A file is walked through frame by frame, so its length costs no memory;
of a long one the key frames are kept, and the time between them is kept too. Files are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from studio.errors import DataError, reason_of

PICTURES = (".png", ".apng", ".gif", ".webp", ".jpg", ".jpeg")
VIDEOS = (".webm", ".mp4", ".mov")
STILL_MS = 100  # shown for a frame whose file does not say how long
MOST_PIXELS = 64_000_000
CAPTION = "caption.txt"


@dataclass(frozen=True)
class Clip:
    """RGBA pictures of one size, how long each is shown in milliseconds, and whether it starts again at the end."""

    frames: tuple[Image.Image, ...]
    durations: tuple[int, ...]
    loop: bool = True

    @classmethod
    def at_rate(cls, frames: Sequence[Image.Image], fps: float, loop: bool = True) -> Clip:
        return cls(tuple(frames), (max(1, round(1000 / fps)),) * len(frames), loop)

    @property
    def size(self) -> tuple[int, int]:
        return self.frames[0].size

    @property
    def seconds(self) -> float:
        return sum(self.durations) / 1000

    @property
    def fps(self) -> float:
        return len(self.frames) / max(self.seconds, 1e-3)

    def sheet(self, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
        """All frames side by side on a ground, as an RGB picture."""
        width, height = self.size
        canvas = Image.new("RGB", (width * len(self.frames), height), ground)
        for index, frame in enumerate(self.frames):
            canvas.paste(frame, (index * width, 0), frame)
        return canvas


@dataclass(frozen=True)
class ClipFile:
    """A clip on disk: which of its frames are taken, how long each stands for, and its caption."""

    path: Path
    caption: str
    total: int  # frames in the file
    kept: tuple[int, ...]  # those that are taken, in time order
    durations: tuple[int, ...]  # of the taken, milliseconds, with the time until the next taken one
    loop: bool

    def load(self, fit: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> Clip:
        """The kept frames, each passed through `fit`. Raises DataError if the file changed or is gone."""
        wanted = set(self.kept)
        frames = [fit(picture) for index, (picture, _) in enumerate(walk(self.path)) if index in wanted]
        if len(frames) != len(self.kept):
            raise DataError(f"'{self.path}' has changed since it was looked through", "start again")
        return Clip(tuple(frames), self.durations, self.loop)


@dataclass
class ClipSet:
    """What a folder gave. `dropped` names each file that could not be used, and why."""

    clips: list[ClipFile]
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def report(self) -> list[str]:
        """Lines that say how much of the folder is used."""
        seen, used = sum(c.total for c in self.clips), sum(len(c.kept) for c in self.clips)
        counts: dict[int, int] = {}
        for clip in self.clips:
            counts[len(clip.kept)] = counts.get(len(clip.kept), 0) + 1
        lengths = ", ".join(f"{n}: {count}" for n, count in sorted(counts.items()))
        lines = [
            f"{len(self.clips)} clips used, {len(self.dropped)} left out; {used} of {seen} frames are key frames",
            f"clips by number of frames: {lengths}",
        ]
        return lines + [f"left out: {name}: {reason}" for name, reason in self.dropped]


# -- reading -----------------------------------------------------------------------------------------------------


def walk(path: Path, content: BinaryIO | None = None) -> Iterator[tuple[Image.Image, int]]:
    """(RGBA picture, milliseconds) of each frame in order, one at a time. Raises DataError, MissingPart.

    With `content` the bytes are read from there, and `path` is only the name.
    """
    try:
        if content is None and path.is_dir():
            yield from _walk_folder(path)
        elif path.suffix.lower() in VIDEOS:
            from studio.data.video_files import walk_video

            yield from walk_video(path, content)
        else:
            yield from _walk_picture(path, content)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"'{path}' is no picture: {reason_of(error)}", "remove it") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"'{path}' is damaged or truncated: {error}", "copy it again, or remove it") from None


def _walk_picture(path: Path, content: BinaryIO | None = None) -> Iterator[tuple[Image.Image, int]]:
    if content is None and path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty", "copy it again, or remove it")
    with Image.open(content or path) as file:
        if file.width * file.height > MOST_PIXELS:
            raise DataError(f"'{path}' has {file.width}x{file.height} pixels", "make it smaller")
        for index in range(getattr(file, "n_frames", 1)):
            file.seek(index)
            file.load()  # durations are those of the frame before until it is loaded
            upright = ImageOps.exif_transpose(file) if index == 0 and getattr(file, "n_frames", 1) == 1 else file
            yield upright.convert("RGBA"), int(file.info.get("duration") or STILL_MS)


def _walk_folder(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Frames of one size: that of the first, into which others are fitted whole."""
    size = None
    for file in frame_files(path):
        picture, milliseconds = next(_walk_picture(file))
        size = size or picture.size
        yield (picture if picture.size == size else fitted_to(picture, size)), milliseconds


def fitted_to(frame: Image.Image, size: tuple[int, int], margin: float = 0.0) -> Image.Image:
    """The whole frame, as large as the canvas takes it, on transparency; `margin` of it stays free all around."""
    room = [round(side * (1 - 2 * margin)) for side in size]
    scale = min(room[0] / frame.width, room[1] / frame.height)
    shape = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    # Premultiplied while it is resized: else what lies unseen under transparency bleeds into the edges.
    drawn = frame.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    canvas.paste(drawn, ((size[0] - shape[0]) // 2, (size[1] - shape[1]) // 2))
    return canvas


def frame_files(path: Path) -> list[Path]:
    """The frames in a folder, in order."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))


def look_at(path: Path, caption: str, most_frames: int) -> ClipFile:
    """Walks through a clip once and chooses its key frames. Raises DataError."""
    return ClipFile(path, caption, *looked_through(path, most_frames))


def looked_through(
    path: Path, most_frames: int, content: BinaryIO | None = None
) -> tuple[int, tuple[int, ...], tuple[int, ...], bool]:
    """(frames in all, those to keep, how long each of these stands, whether it loops). Raises DataError."""
    features, durations = [], []
    for picture, milliseconds in walk(path, content):
        features.append(_feature(picture))
        durations.append(milliseconds)
    if not features:
        raise DataError(f"'{path}' has no frames", "remove it")
    kept = key_frames(np.stack(features), most_frames)
    ends = [*kept[1:], len(durations)]
    spans = tuple(sum(durations[start:end]) for start, end in zip(kept, ends))
    return len(durations), kept, spans, _loops(path, content)


def _loops(path: Path, content: BinaryIO | None) -> bool:
    """Whether a file says that it starts again without end. Frame folders and videos do not say."""
    if path.suffix.lower() in VIDEOS or (content is None and path.is_dir()):
        return False
    if content is not None:
        content.seek(0)
    with Image.open(content or path) as file:
        return getattr(file, "n_frames", 1) > 1 and file.info.get("loop", None) == 0


def _feature(picture: Image.Image) -> np.ndarray:
    """The picture in 8 x 8 cells, premultiplied, in [0, 1]: (256,)."""
    small = picture.convert("RGBa").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1) / 255


def key_frames(features: np.ndarray, most: int) -> tuple[int, ...]:
    """At most `most` frames that tell the clip, in time order; all of them if they are not more.

    After RDTF's preparation of VSD2M: k-means over features (N, D), and of each cluster the first frame in time.
    Deterministic: it starts from the frames that are farthest from each other, the first of all among them.
    """
    count = len(features)
    if count <= most:
        return tuple(range(count))
    chosen = [0]
    distance = ((features - features[0]) ** 2).sum(1)
    while len(chosen) < most:
        farthest = int(distance.argmax())
        if distance[farthest] == 0:  # fewer different frames than wanted: spread over time instead
            return tuple(round(i) for i in np.linspace(0, count - 1, most))
        chosen.append(farthest)
        distance = np.minimum(distance, ((features - features[farthest]) ** 2).sum(1))
    centres = features[chosen].copy()
    for _ in range(20):
        nearest = _nearest(features, centres)
        moved = np.stack([features[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(most)])
        if np.allclose(moved, centres):
            break
        centres = moved
    nearest = _nearest(features, centres)
    firsts = {int(np.argmax(nearest == i)) for i in range(most) if (nearest == i).any()}
    missing = [i for i in np.linspace(0, count - 1, most).round().astype(int).tolist() if i not in firsts]
    return tuple(sorted([*firsts, *missing[: most - len(firsts)]]))


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """For each feature the nearest centre; without the (N, K, D) cube, which long clips would make large."""
    squares = (centres**2).sum(1)[None] - 2 * features @ centres.T
    return squares.argmin(1)


# -- folders -----------------------------------------------------------------------------------------------------


def scan_clips(
    folder: Path, most_frames: int, caption: str = "", looking: Callable[[int, int], None] = lambda done, total: None
) -> ClipSet:
    """Every clip in a folder; `caption` for those that have none (NAME.txt, or caption.txt among frames).

    Raises DataError if the folder is missing or holds no clip that can be used.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'", "give a folder of GIF, APNG or WebP files, or of frames")
    found = ClipSet([])
    paths = [path for path in sorted(folder.iterdir()) if _may_be_clip(path)]
    for done, path in enumerate(paths):
        looking(done, len(paths))
        try:
            found.clips.append(look_at(path, _caption_of(path, caption), most_frames))
        except DataError as error:
            found.dropped.append((path.name, error.message))
    if not found.clips:
        reason = f": {found.dropped[0][1]}" if found.dropped else ""
        raise DataError(f"'{folder}' holds no clip that can be used{reason}", "give GIF, APNG, WebP or frame folders")
    return found


def _may_be_clip(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return bool(frame_files(path))
    return path.suffix.lower() in (*PICTURES, *VIDEOS)


def _caption_of(path: Path, default: str) -> str:
    """The first line of the text beside a clip. Raises DataError for one that is no UTF-8 text."""
    inside = path / CAPTION
    text_file = inside if path.is_dir() and inside.exists() else path.with_name(f"{path.stem}.txt")
    if not text_file.is_file():
        return default
    try:
        return first_line(text_file.read_bytes(), text_file.name) or default
    except OSError as error:
        raise DataError(f"the caption '{text_file.name}' cannot be read: {error}", "look at its permissions") from None


def first_line(content: bytes, name: str) -> str:
    """The first line of a caption. Raises DataError for one that is no UTF-8 text."""
    try:
        lines = content.decode("utf-8-sig").strip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"the caption '{name}' cannot be read: {error}", "save it as UTF-8") from None
    return lines[0].strip() if lines else ""
