"""Drawing with a base and any number of adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
def wearing(base: Base, uses: Sequence[Use], only: Collection[str] | None = None) -> Iterator[list[str]]:
    """Inside, the base has the adapters on; yields warnings about bases that differ. Raises AdapterError, RequestError.

    `only` names the networks that wear them, by default all; learned words go with the text encoders.
    """
    warnings = []
    sites = base.sites()
    taken: list[Attachment | WordAttachment] = []
    try:
        for use in uses:
            patches, notes = base.worn(use.adapter)
            warnings += notes
            chosen = {name: p for name, p in patches.items() if only is None or name.split(".", 1)[0] in only}
            for patch in (p for ps in chosen.values() for p in ps):
                patch.eval()  # else one that was trained with dropout would draw at random
            taken.append(attach(sites, chosen, use.weight))
        words = merged_words(uses) if only is None or any(name in only for name in base.text_encoder_names) else {}
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


@dataclass(frozen=True)
class Works:
    """What a base of some medium makes: how it is called, named, described and written."""

    noun: str
    ending: str  # of a file, where nobody asks for another
    paths: Callable[[Path | None, int, str, bool], list[Path]]
    facts: Callable[[Request, int, Base, Sequence[Use]], dict]
    save: Callable[[Any, Path, dict], None]


def works_of(base: Base) -> Works:
    if base.medium == "audio":
        from studio.data.sounds import save_sound

        return Works("sounds", ".wav", sound_paths, sound_facts, save_sound)
    if base.medium == "video":
        from studio.data.clip_files import save_clip

        return Works("clips", ".webp", clip_paths, clip_facts, save_clip)
    from studio.samples import save_image

    return Works("pictures", ".png", picture_paths, facts_of, save_image)


def missing_triggers(prompt: str, uses: Sequence[Use]) -> list[str]:
    """A line for each adapter that the prompt does not call by its word."""
    words = [(use.name, word) for use in uses for word in use.adapter.card.trigger.split(", ")]  # a merge has several
    return [
        f"the prompt does not have '{word}', the trigger word of '{name}'"
        for name, word in words
        if word and word not in prompt
    ]


def remarks_on(prompt: str, uses: Sequence[Use], base: Base) -> list[str]:
    """What may be wrong with a prompt: triggers that it lacks, words that a base of few words has not learned."""
    return [*missing_triggers(prompt, uses), *_strange_to(base, prompt, uses)]


def _strange_to(base: Base, prompt: str, uses: Sequence[Use]) -> list[str]:
    from studio.bases.melody import speaks_of_melodies
    from studio.data.melodies.fields import strange_words
    from studio.music.score import read_score

    if base.medium != "audio" or not speaks_of_melodies(base):
        return []
    triggers = {word for use in uses for word in use.adapter.card.trigger.split(", ")}
    text = read_score(prompt).text if hasattr(base, "encode_signs") else prompt  # beats and chords are no words
    words = [word for word in text.split() if word not in triggers]
    found = strange_words(" ".join(words))
    return [f"'{base.name}' has not learned {', '.join(found)}"] if found else []


def facts_of(request: Request, index: int, base: Base, uses: Sequence[Use]) -> dict:
    """What a picture's metadata says of its making; enough to draw it again."""
    return {
        "prompt": request.prompts[index],
        "negative": request.negative,
        "seed": request.seeds[index],
        "steps": request.steps,
        "guidance": base.guidance if request.guidance is None else request.guidance,
        "width": request.width,
        "height": request.height,
        "base": base.name,
        "base_values": base.identity().values[:32],
        "scheduler": type(base.pipe.scheduler).__name__,
        "adapters": [{"name": use.name, "weight": use.weight, "trigger": use.adapter.card.trigger} for use in uses],
    }


def sound_facts(request: Request, index: int, base: Base, uses: Sequence[Use]) -> dict:
    """The same for a sound."""
    return {
        "prompt": request.prompts[index],
        "negative": request.negative,
        "seed": request.seeds[index],
        "steps": request.steps,
        "guidance": base.guidance if request.guidance is None else request.guidance,
        "seconds": getattr(base, "seconds", None) if request.seconds is None else request.seconds,
        "base": base.name,
        "base_values": base.identity().values[:32],
        "licence": base.licence,
        "adapters": [{"name": use.name, "weight": use.weight, "trigger": use.adapter.card.trigger} for use in uses],
    }


def given_frames(
    texts: Sequence[str], base: Base, frames: int | None, fps: float | None, loop: bool
) -> dict[int, Image.Image]:
    """Pictures of given frames by index, from `INDEX=FILE`. Raises RequestError, also for a base without clips."""
    if base.medium != "video":
        if texts or frames is not None or fps is not None or loop:
            raise RequestError(f"'{base.name}' makes no clips", "give a clip base with --base; see 'studio bases'")
        return {}
    pictures = {}
    for text in texts:
        index, equals, name = text.partition("=")
        if not equals or not index.isdigit():
            raise RequestError(f"--given '{text}' is not of the form INDEX=FILE", "for example --given 0=first.png")
        if not Path(name).is_file():
            raise RequestError(f"there is no picture '{name}'", "check the path")
        from studio.data.clips import walk

        pictures[int(index)] = next(walk(Path(name)))[0]
    return pictures


def clip_facts(request: Request, index: int, base: Base, uses: Sequence[Use]) -> dict:
    """The same for a clip."""
    own = {"frames": request.frames, "fps": request.fps, "loop": request.loop, "given": sorted(request.given)}
    return facts_of(request, index, base, uses) | own


def clip_paths(out: Path | None, count: int, prompt: str, force: bool) -> list[Path]:
    """Where `count` clips go, as `picture_paths`."""
    from studio.data.clip_files import CLIP_ENDINGS
    from studio.files import slugify

    out = out or Path(f"{slugify(prompt)[:40]}.webp")
    if out.suffix and out.suffix.lower() not in CLIP_ENDINGS:
        raise RequestError(f"cannot write clips as '{out.suffix}'", f"use {', '.join(CLIP_ENDINGS)}")
    return free_paths(out, count, ".webp", force)


SOUND_ENDINGS = (".wav", ".flac")


def sound_paths(out: Path | None, count: int, prompt: str, force: bool) -> list[Path]:
    """Where `count` sounds go, as `picture_paths`."""
    from studio.files import slugify

    out = out or Path(f"{slugify(prompt)[:40]}.wav")
    if out.suffix and out.suffix.lower() not in SOUND_ENDINGS:
        raise RequestError(f"cannot write sounds as '{out.suffix}'", f"use {' or '.join(SOUND_ENDINGS)}")
    return free_paths(out, count, ".wav", force)


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
    return free_paths(out, count, ".png", force)


def free_paths(out: Path, count: int, ending: str, force: bool) -> list[Path]:
    """One file, numbered files, or files in a folder. Raises RequestError for what exists."""
    if out.suffix:
        paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:03d}") for number in range(count)]
    else:
        paths = [out / f"{number:03d}{ending}" for number in range(count)]
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None and not force:
        raise RequestError(f"'{existing}' exists already", "choose another --out, or overwrite with --force")
    return paths
