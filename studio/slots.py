"""The ledger of slots: which concept holds which columns of a shared orthogonal matrix, and what is free.

Concepts trained apart in disjoint columns do not meet when their updates are summed (trainers/orthogonal.py). Slot s of
rank r is the columns [s r, (s + 1) r), so concepts of any ranks are kept apart by comparing columns. One file,
`$STUDIO_HOME/slots.json`, holds all banks; it is replaced whole, under a lock, so that two trainings never take the
same columns. A bank is where columns can meet: one architecture and one layout of columns; where the columns depend on
the base's weights, one base.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio.base import same_values
from studio.errors import PresetError, RequestError, nearest
from studio.files import disk_error, write_atomically
from studio.paths import studio_home

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bank:
    """`layout` names the matrix whose columns are given out. `values` sketches the base's weights, or is ""."""

    base: str
    architecture: str
    layout: str
    values: str = ""

    def meets(self, other: Bank) -> bool:
        """Whether both give out the same columns. The base's name is only for people."""
        if (self.architecture, self.layout) != (other.architecture, other.layout):
            return False
        return not (self.values or other.values) or (
            bool(self.values and other.values) and same_values(self.values, other.values)
        )


@dataclass(frozen=True)
class Holding:
    """A concept's slot. `width` is the number of columns of the narrowest layer that the concept was trained on."""

    bank: Bank
    concept: str
    slot: int
    rank: int
    width: int
    trigger: str = ""
    holder: str = ""
    since: str = ""

    @property
    def columns(self) -> range:
        return range(self.slot * self.rank, (self.slot + 1) * self.rank)

    def overlaps(self, slot: int, rank: int) -> bool:
        return slot * rank < self.columns.stop and self.columns.start < (slot + 1) * rank


def ledger_path() -> Path:
    return studio_home() / "slots.json"


def capacity(width: int, rank: int) -> int:
    """How many slots of a rank the narrowest layer, of `width` columns, has room for."""
    return width // rank


# -- reading -------------------------------------------------------------------------------------------------------


def holdings(bank: Bank | None = None) -> list[Holding]:
    """What is taken, in all banks or in one, in the order of the columns. Raises RequestError for a damaged ledger."""
    found = [one for one in _read() if bank is None or one.bank.meets(bank)]
    return sorted(found, key=lambda one: (one.bank.base, one.bank.layout, one.columns.start, one.since))


def free_slots(bank: Bank, rank: int, width: int, concept: str = "") -> list[int]:
    """The slots of a rank that nobody holds, beside `concept` itself, within the narrowest layer's columns."""
    return _free(_read(), bank, rank, width, concept)


def choose(bank: Bank, concept: str, rank: int, width: int, narrowest: str = "", wanted: int | None = None) -> int:
    """The slot that `concept` is to train in: the wanted one, else the one it holds, else the first free one.

    `width` is the number of columns of the narrowest layer, whose name is `narrowest`: a slot beyond it would fit the
    wider layers only, so it is not given out. Nothing is written. Raises PresetError, also if the bank is full.
    """
    taken, room = _read(), capacity(width, rank)
    if room == 0:
        raise PresetError(
            f"rank {rank} is more than the {width} columns of the narrowest layer, '{narrowest}'",
            "lower method.rank, or leave that layer out of method.target_modules",
        )
    if wanted is not None:
        if wanted >= room:
            raise PresetError(
                f"there is no slot {wanted}: the narrowest layer, '{narrowest}', has {width} columns, "
                f"which are {room} slots of rank {rank}, 0 to {room - 1}"
            )
        if holder := _holder(taken, bank, wanted, rank, concept):
            raise _occupied(holder, wanted)
        return wanted
    own = [one for one in taken if one.bank.meets(bank) and one.concept == concept and one.rank == rank]
    if own and own[-1].slot < room:
        return own[-1].slot
    free = _free(taken, bank, rank, width, concept)
    if not free:
        raise PresetError(
            f"'{bank.base}' has no free slot of rank {rank}: {room} fit the narrowest layer, '{narrowest}' "
            f"({width} columns), and each meets one that is taken",
            "use a smaller rank, free a slot that is no longer needed, or train with basis=subset and merge with gram",
        )
    return free[0]


def _free(taken: Sequence[Holding], bank: Bank, rank: int, width: int, concept: str) -> list[int]:
    return [slot for slot in range(capacity(width, rank)) if not _holder(taken, bank, slot, rank, concept)]


def _holder(taken: Sequence[Holding], bank: Bank, slot: int, rank: int, concept: str) -> Holding | None:
    others = (one for one in taken if one.concept != concept and one.bank.meets(bank))
    return next((one for one in others if one.overlaps(slot, rank)), None)


def _occupied(holder: Holding, slot: int) -> PresetError:
    return PresetError(
        f"slot {slot} meets slot {holder.slot} (rank {holder.rank}) of '{holder.trigger or holder.concept}', taken "
        f"{holder.since}",
        "leave method.slot out for the next free one, or free that slot if it is no longer needed",
    )


def find(word: str) -> Holding:
    """The holding of a concept, named by its trigger word or its beginning. Raises RequestError."""
    taken = _read()
    found = [one for one in taken if one.trigger == word] or [one for one in taken if one.concept.startswith(word)]
    if not found or not word:
        raise RequestError(f"no slot is held by '{word}'", nearest(word, {one.trigger for one in taken}))
    if len(found) > 1:
        places = ", ".join(f"{one.concept[:12]} (slot {one.slot}, rank {one.rank})" for one in found)
        raise RequestError(f"'{word}' holds {len(found)} slots: {places}", "name it by the beginning of its concept")
    return found[0]


def overview() -> list[dict[str, Any]]:
    """Every bank with its holdings, and how full it is for concepts of the rank that was taken last, as plain facts."""
    banks: list[tuple[Bank, list[Holding]]] = []
    for one in holdings():
        known = next((taken for bank, taken in banks if bank.meets(one.bank)), None)
        if known is None:
            banks.append((one.bank, [one]))
        else:
            known.append(one)
    return [_facts(bank, taken) for bank, taken in banks]


def _facts(bank: Bank, taken: list[Holding]) -> dict[str, Any]:
    width, rank = min(one.width for one in taken), max(taken, key=lambda one: one.since).rank
    free = free_slots(bank, rank, width)
    columns = {column for one in taken for column in one.columns if column < width}
    return {
        "base": bank.base,
        "layout": bank.layout,
        "columns": width,
        "columns_taken": len(columns),
        "rank": rank,
        "free_slots": len(free),
        "full": not free,
        "holdings": [
            {
                "slot": one.slot,
                "rank": one.rank,
                "columns": f"{one.columns.start}-{one.columns.stop - 1}",
                "trigger": one.trigger,
                "concept": one.concept,
                "holder": one.holder,
                "since": one.since,
            }
            for one in taken
        ],
    }


# -- writing -------------------------------------------------------------------------------------------------------


def claim(bank: Bank, concept: str, slot: int, rank: int, width: int, trigger: str = "") -> Holding:
    """Writes down that `concept` holds the slot; once more for the same slot changes nothing.

    Raises PresetError if another concept has taken columns of it meanwhile, DiskError if the ledger cannot be written.
    """
    with _locked():
        taken = _read()
        if holder := _holder(taken, bank, slot, rank, concept):
            raise _occupied(holder, slot)
        for one in taken:
            if one.bank.meets(bank) and (one.concept, one.slot, one.rank) == (concept, slot, rank):
                return one
        today = time.strftime("%Y-%m-%d")
        holding = Holding(bank, concept, slot, rank, width, trigger, _user(), today)
        _write([*taken, holding])
        return holding


def release(holding: Holding) -> None:
    """Frees a slot. Adapters trained in it keep working, but may meet the concept that takes it next."""
    with _locked():
        _write([one for one in _read() if one != holding])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in containers
        return ""


# -- the file ------------------------------------------------------------------------------------------------------


def _read() -> list[Holding]:
    path = ledger_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] > FORMAT_VERSION:
            raise RequestError(f"'{path}' was written by a newer studio", "update the studio")
        return [_holding(entry) for entry in content["holdings"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"the ledger of slots, '{path}', is damaged: {error}",
            "mend or remove it; adapters keep their slots in their cards",
        ) from None


def _holding(entry: dict[str, Any]) -> Holding:
    one = Holding(**{**entry, "bank": Bank(**entry["bank"])})
    if not (isinstance(one.slot, int) and isinstance(one.rank, int) and one.slot >= 0 and one.rank > 0):
        raise ValueError(f"slot {one.slot!r} of rank {one.rank!r}")
    return one


def _write(all_holdings: Sequence[Holding]) -> None:
    content = {"format_version": FORMAT_VERSION, "holdings": [asdict(one) for one in all_holdings]}
    write_atomically(ledger_path(), json.dumps(content, indent=1) + "\n")


@contextmanager
def _locked() -> Iterator[None]:
    """Inside, no other process writes the ledger. The lock is a file of its own, for the ledger is replaced."""
    path = ledger_path().with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise disk_error(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
