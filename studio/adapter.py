"""An adapter: the patches of one training, its learned words, and a card that says where it comes from.

On disk it is one `.safetensors` file: tensors `<component>.<site>.<term>.<tensor>`, learned words
`<encoder>.tokens.<word>`, and the card as one JSON string in the header. The same adapter gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from studio.errors import AdapterError
from studio.files import is_pickle, write_atomically
from studio.method import Method, Origin, PatchMethod, method_from
from studio.patch import LayerShape, Patch

FORMAT_VERSION = 1
HEADER_KEY = "studio_card"
TOKENS = "tokens"
SKETCHES = ("sketch", "base_sketch")  # terms that are no patch: second moments of a site's inputs


class BaseIdentity(BaseModel):
    """Which base an adapter was made for. `architecture` must match; `values` must only for some methods."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    family: str
    architecture: str
    values: str
    licence: str = ""


class Card(BaseModel):
    """What is known of an adapter, stored with it."""

    model_config = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    method: dict[str, Any]
    base: BaseIdentity
    sites: dict[str, LayerShape]
    trigger: str = ""
    class_word: str = ""
    concept: str = ""
    data_fingerprint: str = ""
    data_count: int = 0
    preset: dict[str, Any] = {}
    seed: int = 0
    steps: int = 0
    library_version: str = ""
    parents: list[dict[str, Any]] = []
    shared_inputs: dict[str, str] = {}  # site -> the site whose sketches of inputs are its own too


@dataclass
class Adapter:
    """Patches by site name and term, learned words by text encoder and word, and the card.

    `sketches` holds what merging knows of the sites' inputs, by full name, `<site>.sketch.<tensor>`.
    """

    card: Card
    patches: dict[str, dict[str, Patch]]
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return method_from(self.card.method)

    def by_site(self) -> dict[str, list[Patch]]:
        """The patches in the form that `attach` takes."""
        return {name: list(terms.values()) for name, terms in self.patches.items()}

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, in the order of the sites."""
        trained = [p for terms in self.patches.values() for patch in terms.values() for p in patch.parameters()]
        trained += [w for words in self.words.values() for w in words.values() if isinstance(w, torch.nn.Parameter)]
        return trained

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, trained and frozen, by their names in the file."""
        found: dict[str, Tensor] = {}
        for site, terms in self.patches.items():
            for term, patch in terms.items():
                found |= {f"{site}.{term}.{name}": value for name, value in patch.state_dict().items()}
        for encoder, words in self.words.items():
            found |= {f"{encoder}.{TOKENS}.{word}": value.detach() for word, value in words.items()}
        return found | self.sketches

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the patches and words. Raises AdapterError if names or shapes differ."""
        own = self.tensors()
        if set(own) != set(tensors):
            odd = sorted(set(own) ^ set(tensors))[0]
            raise AdapterError(f"the tensors do not fit the card: '{odd}' is {'missing' if odd in own else 'unknown'}")
        for name, value in tensors.items():
            if own[name].shape != value.shape:
                raise AdapterError(f"tensor '{name}' is {tuple(value.shape)}, expected {tuple(own[name].shape)}")
            with torch.no_grad():
                own[name].copy_(value)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises DiskError."""
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self.tensors().items()}
        card = json.dumps(self.card.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        write_atomically(path, save(dict(sorted(tensors.items())), {HEADER_KEY: card}))


def new_adapter(card: Card, layers: Mapping[str, nn.Module] | None = None, inputs: Mapping | None = None) -> Adapter:
    """Fresh patches of the card's method for the card's sites.

    `layers` gives the pristine layers by site to methods that look at their weights, `inputs` the second moments of
    their inputs. Raises AdapterError for a method that makes no patches, PresetError for one that is unknown or cannot
    serve a site.
    """
    method = _patch_method(card)
    patches = method.patches(card.sites, Origin(card.concept, card.seed, inputs or {}), layers or {})
    return Adapter(card, {name: {"main": patch} for name, patch in patches.items()})


def _patch_method(card: Card) -> PatchMethod:
    method = method_from(card.method)
    if not isinstance(method, PatchMethod):
        raise AdapterError(f"a '{method.kind}' is not an adapter")
    return method


def load_adapter(path: Path) -> Adapter:
    """Reads an adapter file. Raises AdapterError, saying what is wrong with a file that cannot be used."""
    card_text, tensors = read_safetensors(path)
    if HEADER_KEY not in card_text:
        raise AdapterError(f"'{path}' is a safetensors file, but no adapter of the studio: it has no card")
    try:
        card = Card.model_validate_json(card_text[HEADER_KEY])
    except ValidationError as error:
        raise AdapterError(f"the card in '{path}' is damaged: {error.errors()[0]['msg']}") from None
    if card.format_version > FORMAT_VERSION:
        raise AdapterError(
            f"'{path}' was written by a newer studio (format {card.format_version})", "update the studio"
        )
    return adapter_from(card, tensors)


def adapter_from(card: Card, tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter from its card and all its tensors by their names in the file. Raises AdapterError, PresetError."""
    method, origin = _patch_method(card), Origin(card.concept, card.seed)
    terms = _by_site_and_term(card, tensors)
    patches = {
        name: {term: method.stored(name, shape, origin, own) for term, own in terms.get(name, {"main": {}}).items()}
        for name, shape in card.sites.items()
    }
    sketches = {name: torch.empty_like(t) for name, t in tensors.items() if _is_sketch(name)}
    adapter = Adapter(card, patches, sketches=sketches)
    for name, value in tensors.items():
        encoder, _, word = name.partition(f".{TOKENS}.")
        if word and encoder not in adapter.patches:
            adapter.words.setdefault(encoder, {})[word] = torch.empty_like(value)
    adapter.load_tensors(tensors)
    return adapter


def _is_sketch(name: str) -> bool:
    return name.count(".") >= 2 and name.rsplit(".", 2)[1] in SKETCHES


def _by_site_and_term(card: Card, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """`<site>.<term>.<tensor>` taken apart. A site's name has dots, a term's and a tensor's have none."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        site, term, tensor = name.rsplit(".", 2) if name.count(".") >= 2 else ("", "", "")
        if site in card.sites and term not in SKETCHES:
            found.setdefault(site, {}).setdefault(term, {})[tensor] = value
    return found


def refuse_pickle(path: Path) -> None:
    """Raises AdapterError for a pickle, whatever its name says, and for a file that cannot be read."""
    try:
        pickled = is_pickle(path)
    except OSError as error:
        raise AdapterError(f"cannot read '{path}': {error.strerror or error}") from None
    if pickled:
        raise AdapterError(
            f"'{path}' is a pickle, not a safetensors file",
            hint="pickles can run code when they are opened, so the studio never does; convert it to safetensors",
        )


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header strings and tensors of a file. Raises AdapterError for a missing, foreign, truncated or NaN file."""
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"'{path}' is damaged or truncated: {error}", "copy or download it again") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"'{path}' holds values that are not finite, in '{name}'", "use an earlier checkpoint")
    return header, tensors
