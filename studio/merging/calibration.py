"""What the layers' inputs are, recorded anew with the base: for gram, where the files do not tell.

The base draws a few pictures of each concept with that concept alone on, and of generic things with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

from studio.adapter import load_adapter
from studio.attachment import Site, attach
from studio.base import Base
from studio.data.cache import Cache
from studio.errors import RequestError
from studio.importing.own import AdapterFile
from studio.importing.source import Source
from studio.inputs import KINDS, Sketch, base_inputs, sketch
from studio.paths import studio_home
from studio.sketching import concept_inputs
from studio.words import WordAttachment

WIDTH = 64  # directions kept of each input
STEPS = 10  # of sampling, for each picture


class Calibration:
    """Sketches by adapter and site, made when first asked for."""

    def __init__(self, base: Base, sources: Sequence[Source], width: int = WIDTH) -> None:
        self.base, self.width = base, width
        names = {name for source in sources for name in source.shapes}
        self.sites = {n: s for n, s in base.sites().items() if n in names and s.shape.kind in KINDS}
        self.concepts: dict[str, dict[str, Sketch]] = {}

    def concept(self, source: Source, site: str) -> Sketch | None:
        """The inputs of a site while the base draws this adapter's concept."""
        if source.sha256 not in self.concepts:
            self.concepts[source.sha256] = self._record(source)
        return self.concepts[source.sha256].get(site)

    def generic(self, site: str) -> Sketch | None:
        """The inputs of a site while the base draws generic things."""
        return self._generic.get(site)

    @cached_property
    def _generic(self) -> dict[str, Sketch]:
        found = base_inputs(self.base, self.sites, Cache(studio_home() / "cache"))
        return {name: sketch(matrix, self.width) for name, matrix in found.items()}

    def _record(self, source: Source) -> dict[str, Sketch]:
        if not isinstance(source, AdapterFile):
            raise RequestError(
                f"'{source.name}' comes from another program and has no trigger word to draw with",
                "merge it into the studio's own format first, or use --strategy sum",
            )
        adapter = load_adapter(source.path)
        own: dict[str, Site] = {name: self.sites[name] for name in source.shapes if name in self.sites}
        word = source.trigger or source.class_word or "thing"
        with ExitStack() as stack:
            stack.enter_context(attach(self.base.sites(), adapter.by_site()))
            if adapter.words:
                stack.callback(WordAttachment(self.base, adapter.words).detach)
            grams = concept_inputs(self.base, own, word, steps=STEPS)
        return {name: sketch(gram, self.width) for name, gram in grams.items()}
