"""The studio's own adapter files, read site by site."""

from __future__ import annotations

import torch
from pydantic import ValidationError
from torch import Tensor

from studio import library
from studio.adapter import FORMAT_VERSION, HEADER_KEY, TOKENS, Card
from studio.deltas import WeightDelta, total
from studio.deltas.patches import change_of
from studio.errors import AdapterError
from studio.importing.source import Source, Weights
from studio.importing.tensor_file import TensorFile
from studio.inputs import Sketch
from studio.method import Origin, PatchMethod, method_from
from studio.patch import Delta, LayerShape, Patch

SKETCHES = ("sketch", "base_sketch")  # terms that tell of inputs: of the concept's pictures, and of the base's own


class AdapterFile(Source):
    """An adapter of the studio. Raises AdapterError for a file that is damaged, foreign or too new."""

    def __init__(self, name: str, file: TensorFile) -> None:
        self.file = file
        self.card = read_card(file)
        method = method_from(self.card.method)
        if not isinstance(method, PatchMethod):
            raise AdapterError(f"'{file.path}': a '{method.kind}' is not an adapter")
        self.method = method
        self.origin = Origin(self.card.concept, self.card.seed)
        self.by_site, self.by_encoder = _sorted_out(self.card, file)
        shapes = {site: shape for site, shape in self.card.sites.items() if site in self.by_site}
        kind = method.kind
        super().__init__(name, file.path, kind, self.card.base, shapes, self.card.trigger, self.card.class_word)

    @property
    def sha256(self) -> str:
        return self.file.sha256

    @property
    def trained_on(self) -> str:
        """The base as the library remembers it, else by its name in the card."""
        return str(library.facts_of(self.path).get("base", "")) or self.card.base.name

    @property
    def needs_weights(self) -> bool:
        site = next(iter(self.shapes), None)
        return site is not None and any(getattr(p, "depends_on_weight", False) for p in self._patches(site))

    def numbers(self, site: str) -> int:
        terms = self.by_site.get(site, {})
        names = [key for term, own in terms.items() if term not in SKETCHES for key in own.values()]
        return sum(self.file.entries[key].numel for key in names)

    def read(self, site: str, weights: Weights | None) -> tuple[WeightDelta | None, Tensor | None]:
        changes, biases = [], []
        for patch in self._patches(site):
            needed = getattr(patch, "depends_on_weight", False) and weights is not None
            try:
                change = change_of(patch, weights(site) if needed and weights else None)
            except AdapterError as error:
                raise AdapterError(f"'{self.name}' at '{site}': {error.message}", error.hint) from None
            bias = patch.bias_delta() if isinstance(patch, Delta) else None
            changes += [change] if change is not None else []
            biases += [bias.detach()] if bias is not None else []
        return (total(changes) if changes else None), (sum(biases[1:], start=biases[0]) if biases else None)

    def _patches(self, site: str) -> list[Patch]:
        shape = self.card.sites[site]
        return [self._patch(site, shape, own) for term, own in self.by_site[site].items() if term not in SKETCHES]

    @torch.no_grad()
    def _patch(self, site: str, shape: LayerShape, names: dict[str, str]) -> Patch:
        tensors = {name: self.file.read(key) for name, key in names.items()}
        patch = self.method.stored(site, shape, self.origin, tensors)
        room = patch.state_dict()
        if set(room) != set(tensors) or any(room[name].shape != value.shape for name, value in tensors.items()):
            raise AdapterError(f"'{self.file.path}': the tensors of '{site}' do not fit its card")
        for name, value in tensors.items():
            room[name].copy_(value)
        return patch

    def words(self) -> dict[str, dict[str, Tensor]]:
        return {
            encoder: {word: self.file.read(key) for word, key in words.items()}
            for encoder, words in self.by_encoder.items()
        }

    def sketch(self, site: str, term: str = "sketch") -> Sketch | None:
        names = self.by_site.get(site, {}).get(term)
        return Sketch.of({name: self.file.read(key) for name, key in names.items()}) if names else None


def read_card(file: TensorFile) -> Card:
    """The card in a file's header. Raises AdapterError."""
    if HEADER_KEY not in file.header:
        raise AdapterError(f"'{file.path}' is a safetensors file, but no adapter of the studio: it has no card")
    try:
        card = Card.model_validate_json(file.header[HEADER_KEY])
    except ValidationError as error:
        raise AdapterError(f"the card in '{file.path}' is damaged: {error.errors()[0]['msg']}") from None
    if card.format_version > FORMAT_VERSION:
        raise AdapterError(
            f"'{file.path}' was written by a newer studio (format {card.format_version})", "update the studio"
        )
    return card


Names = dict[str, dict[str, dict[str, str]]]  # site -> term -> tensor -> key in the file


def _sorted_out(card: Card, file: TensorFile) -> tuple[Names, dict[str, dict[str, str]]]:
    sites: Names = {}
    words: dict[str, dict[str, str]] = {}
    for key in file.entries:
        site, term, tensor = key.rsplit(".", 2) if key.count(".") >= 2 else ("", "", "")
        encoder, found, word = key.partition(f".{TOKENS}.")
        if site in card.sites:
            sites.setdefault(site, {}).setdefault(term, {})[tensor] = key
        elif found:
            words.setdefault(encoder, {})[word] = key
        else:
            raise AdapterError(f"'{file.path}': its card does not know the tensor '{key}'")
    for site, holder in card.shared_inputs.items():
        if site in sites:
            sites[site] |= {term: own for term, own in sites.get(holder, {}).items() if term in SKETCHES}
    return sites, words
