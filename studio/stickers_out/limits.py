"""What platforms take as an animated sticker: sides in pixels, bytes, seconds. Sources: docs/methods/rdtf.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`canvas` is the exact size, or None for the clip's own. `whole_seconds`: playback ends on a full second."""

    name: str
    ending: str
    canvas: tuple[int, int] | None = None
    most_bytes: int | None = None
    most_seconds: float | None = None
    least_frames: int = 1
    most_frames: int | None = None
    least_ms: int = 1
    whole_seconds: bool = False
    most_loops: int | None = None  # None: without end
    rate: int | None = None  # frames a second, constant, of a video; None where each frame has its own time


TARGETS: dict[str, Limits] = {
    limits.name: limits
    for limits in (
        Limits("whatsapp", ".webp", (512, 512), 500 * 1024, 10.0, least_frames=2, least_ms=8),
        Limits("telegram", ".webm", (512, 512), 256 * 1024, 3.0, 2, 88, least_ms=34, rate=30),
        Limits("line", ".png", (270, 270), 300 * 1024, 4.0, 5, 20, whole_seconds=True, most_loops=4),
        Limits("discord", ".png", (320, 320), 512 * 1024, 5.0, least_frames=2),
        Limits("webp", ".webp"),
        Limits("apng", ".png"),
        Limits("gif", ".gif", least_ms=20),
    )
}
