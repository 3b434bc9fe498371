"""Pipelines from a model hub. What is in the local cache is used as it is, without asking the hub at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studio.bases.folder import CONFIG, INDEX, choose_weights, open_folder, parts_of
from studio.errors import BaseError, StudioError, reason_of
from studio.files import disk_error

PATIENCE_SECONDS = 10


def cached(repo: str) -> Path | None:
    """The folder of a pipeline that is whole in the hub's local cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(repo, name) for name in (INDEX, CONFIG))
        first = next((path for path in found if isinstance(path, str)), None)
        return open_folder(Path(first).parent).path if first else None
    except (HFValidationError, BaseError):
        return None


def obtain(repo: str, half: bool) -> Path:
    """The folder of a hub's pipeline, downloaded if it is not in the cache; `half` prefers fp16 weights.

    Raises BaseError where that cannot be done: no connection, no such repository, a licence to accept, no safetensors.
    """
    return cached(repo) or _download(repo, half)


def wanted_files(repo: str, names: list[str], index: dict[str, Any], half: bool) -> list[str]:
    """Of all files in a repository, those that a family loads: configurations, tokenizers, one set of safetensors."""
    wanted = [name for name in (INDEX, "README.md", "LICENSE", "LICENSE.md") if name in names]
    for part, _, _ in parts_of(index, Path(repo)):
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        weights = choose_weights(inside, prefer_half=half)
        texts = [name for name in inside if name.endswith((".json", ".txt", ".model")) and "/" not in name]
        wanted += [f"{part}/{name}" for name in (*texts, *weights)]
    return wanted


def files_of_one_network(names: list[str], half: bool) -> list[str]:
    """The same for a repository of transformers, which holds one network beside its tokenizer."""
    inside = [name for name in names if "/" not in name]
    texts = [name for name in inside if name.endswith((".json", ".txt", ".model", ".md")) or name == "LICENSE"]
    return [*texts, *choose_weights(inside, prefer_half=half)]


def _download(repo: str, half: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        facts = HfApi().model_info(repo, timeout=PATIENCE_SECONDS)  # fails at once where the others try five times
        names = [file.rfilename for file in facts.siblings or []]
        if INDEX in names:
            index = json.loads(Path(hf_hub_download(repo, INDEX, revision=facts.sha)).read_text(encoding="utf-8"))
            wanted = wanted_files(repo, names, index, half)
        elif CONFIG in names:
            wanted = files_of_one_network(names, half)
        else:
            raise BaseError(f"'{repo}' on the hub is no pipeline: it has neither {INDEX} nor {CONFIG}")
        return Path(snapshot_download(repo, revision=facts.sha, allow_patterns=wanted))
    except BaseError:
        raise
    except Exception as error:
        if (told := explain(repo, error)) is None:
            raise
        raise told from None


def explain(repo: str, error: Exception) -> StudioError | None:
    """What went wrong with the hub, as an error for the user; None for a fault of our own."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # The hub's client moved from httpx to httpx2, so a broken connection is told by the name of its class.
    unreachable = any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
    if unreachable or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return BaseError(
            f"'{repo}' is neither a folder here nor whole in the hub's cache, and the hub cannot be reached",
            hint="connect once so that it can be downloaded, or give a local folder; 'studio bases' lists what is here",
        )
    if isinstance(error, GatedRepoError):
        hint = "accept it on its page on the hub, then run 'hf auth login'"
        return BaseError(f"'{repo}' wants its licence accepted first", hint)
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the spelling, owner/name; a private one needs 'hf auth login'"
        return BaseError(f"there is no '{repo}' on the hub, and no such folder here", hint)
    if isinstance(error, HfHubHTTPError):
        return BaseError(f"the hub refused '{repo}': {reason_of(error)}", "try again later")
    return disk_error(Path("the hub's cache"), error) if isinstance(error, OSError) else None
