"""Drawing with a base and any number of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from studio import library
from studio.adapter import Adapter, load_adapter
from studio.attachment import Attachment, attach
from studio.base import Base, Request
from studio.errors import RequestError
from studio.words import WordAttachment


@dataclass(frozen=True)
class Use:
    """An adapter and its strength; 1 is as trained."""

    name: str
    adapter: Adapter
    weight: float = 1.0
    trained_on: str = ""

    @property
    def base(self) -> str:
        """The base it was trained on: as the library remembers it, else by the name in the card."""
        return self.trained_on or self.adapter.card.base.name


def parse_use(text: str) -> Use:
    """`NAME|FILE[:WEIGHT]` as an adapter of the library or a file. Raises RequestError, AdapterError."""
    name, colon, weight_text = text.rpartition(":")
    weight = 1.0
    if colon:
        try:
            weight = float(weight_text)
        except ValueError:
            raise RequestError(f"'{weight_text}' in '{text}' is no weight", "for example my-cat:0.8") from None
    else:
        name = text
    path = library.find(name)
    return Use(name, load_adapter(path), weight, library.facts_of(path).get("base", ""))


@contextmanager
def wearing(base: Base, uses: Sequence[Use]) -> Iterator[list[str]]:
    """Inside, the base has the adapters on; yields warnings about bases that differ. Raises AdapterError."""
    warnings = []
    sites = base.sites()
    taken: list[Attachment | WordAttachment] = []
    try:
        for use in uses:
            patches = use.adapter.by_site()
            needs_values = any(getattr(p, "depends_on_weight", False) for ps in patches.values() for p in ps)
            if warning := base.check(use.adapter.card.base, needs_values):
                warnings.append(warning)
            taken.append(attach(sites, patches, use.weight))
        words = merged_words(uses)
        if words:
            taken.append(WordAttachment(base, words))
        yield warnings
    finally:
        for attachment in reversed(taken):
            attachment.detach()


def merged_words(uses: Sequence[Use]) -> dict[str, dict]:
    """The learned words of all adapters. Raises RequestError if two bring the same word."""
    words: dict[str, dict] = {}
    for use in uses:
        for encoder, own in use.adapter.words.items():
            for word, vectors in own.items():
                if word in words.setdefault(encoder, {}):
                    raise RequestError(
                        f"two of the adapters have learned the word '{word}'", "use one of them at a time"
                    )
                words[encoder][word] = vectors
    return words


def missing_triggers(prompt: str, uses: Sequence[Use]) -> list[str]:
    """A line for each adapter that the prompt does not call by its word."""
    words = [(use.name, word) for use in uses for word in use.adapter.card.trigger.split(", ")]  # a merge has several
    return [
        f"the prompt does not have '{word}', the trigger word of '{name}'"
        for name, word in words
        if word and word not in prompt
    ]


def facts_of(request: Request, index: int, base: Base, uses: Sequence[Use]) -> dict:
    """What a picture's metadata says of its making; enough to draw it again."""
    return {
        "prompt": request.prompts[index],
        "negative": request.negative,
        "seed": request.seeds[index],
        "steps": request.steps,
        "guidance": request.guidance,
        "width": request.width,
        "height": request.height,
        "base": base.name,
        "base_values": base.identity().values[:32],
        "scheduler": type(base.pipe.scheduler).__name__,
        "adapters": [{"name": use.name, "weight": use.weight, "trigger": use.adapter.card.trigger} for use in uses],
    }


def picture_paths(out: Path | None, count: int, prompt: str, force: bool) -> list[Path]:
    """Where `count` pictures go: one file, numbered files, or a folder. Raises RequestError for what exists."""
    from studio.files import slugify

    formats: Mapping[str, str] = Image.registered_extensions()
    out = out or Path(f"{slugify(prompt)[:40]}.png")
    if out.suffix:
        if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            known = "a sound or video format" if out.suffix.lower() in (".wav", ".mp4", ".flac", ".webm") else "unknown"
            raise RequestError(f"cannot write pictures as '{out.suffix}': {known}", "use .png, .jpg or .webp")
        assert formats
        paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:03d}") for number in range(count)]
    else:
        paths = [out / f"{number:03d}.png" for number in range(count)]
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None and not force:
        raise RequestError(f"'{existing}' exists already", "choose another --out, or overwrite with --force")
    return paths
