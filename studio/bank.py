"""The concept bank: the library's adapters whose trigger words stand in a prompt, made one for the moment.

Looking reads the headers of the files alone; merging goes by `auto`, so concepts that overlap are fused where their
files tell what the layers' inputs are. Nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from studio import library
from studio.adapter import load_adapter
from studio.base import Base
from studio.cards import read_card
from studio.errors import StudioError
from studio.generation import Use
from studio.library import Entry
from studio.merging import Merger, make_plan, make_recipe


@dataclass
class Pick:
    """The entries that a prompt calls, in the order of their words in it."""

    entries: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    base: str = ""

    def worn(self, base: Base) -> list[Use]:
        """What to wear: nothing, the one adapter, or all made one. Raises StudioError."""
        if not self.entries:
            return []
        if len(self.entries) == 1:
            (entry,) = self.entries
            return [Use(entry.name, load_adapter(entry.path), 1.0, self.base)]
        recipe = make_recipe({"adapters": [str(entry.path) for entry in self.entries]})
        merger = Merger(make_plan(recipe, lambda name: base))
        adapter = merger.adapter()
        self.warnings += merger.report.warnings
        return [Use(" + ".join(entry.name for entry in self.entries), adapter, 1.0, self.base)]


def pick(prompt: str, taken: Collection[str] = (), architecture: str = "") -> Pick:
    """The adapters of the library, beside those `taken` already, whose trigger words stand in the prompt.

    Merges are left out, since their parents are there. Of several with one word the newest counts, and of several bases
    that of `architecture`, or of the first word.
    """
    found: dict[str, list[tuple[Entry, dict[str, Any]]]] = {}
    for entry in library.entries():
        card = _card(entry)
        word = card.get("trigger", "")
        if word and not card.get("parents") and entry.name not in taken and _place(word, prompt) >= 0:
            found.setdefault(word.lower(), []).append((entry, card))
    chosen = Pick()
    for word in sorted(found, key=lambda word: _place(word, prompt)):
        entry, card = max(found[word], key=lambda one: (one[0].path.stat().st_mtime_ns, one[0].name))
        others = sorted(one.name for one, _ in found[word] if one is not entry)
        if others:
            text = f"'{word}' calls '{entry.name}', the newest; also: {', '.join(others)} (choose with --adapter)"
            chosen.warnings.append(text)
        own = card["base"]["architecture"]
        architecture = architecture or own
        if own != architecture:
            chosen.warnings.append(f"'{entry.name}' was made for '{card['base']['name']}', another base: left out")
            continue
        chosen.entries.append(entry)
        chosen.base = chosen.base or str(entry.facts.get("base", "")) or card["base"]["name"]
    if not chosen.entries:
        chosen.warnings.append("no adapter of the library has its trigger word in the prompt")
    return chosen


def _card(entry: Entry) -> dict[str, Any]:
    try:
        return read_card(entry.path)
    except StudioError:
        return {}


def _place(word: str, prompt: str) -> int:
    """Where a whole word stands in a text, capitals aside; -1 if nowhere."""
    match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
    return match.start() if match else -1
