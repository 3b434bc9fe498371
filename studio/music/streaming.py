"""State that lives as long as a generation's cache.

A network that writes token by token shows an inserted module one new step at a time, and transformers hands every layer
the same cache object throughout one generation. What the module must remember hangs on that object: it is gone with
it, it doubles with the batch under classifier-free guidance, and several adapters and generations never meet.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from studio.patch import LayerCall

CACHE = "past_key_values"  # what transformers calls the cache

State = dict[str, Tensor | int]


class Memory:
    """The states of one module, by generation. Without a cache every call begins anew."""

    def __init__(self) -> None:
        self._states: WeakKeyDictionary[Any, State] = WeakKeyDictionary()

    def of(self, call: LayerCall) -> State:
        """The state to read and to write to: that of this generation, or an empty one."""
        cache = call.told(CACHE)
        return {} if cache is None else self._states.setdefault(cache, {})

    def __deepcopy__(self, _: Any) -> Memory:
        return Memory()  # a copy of a module takes part in no generation of the original
