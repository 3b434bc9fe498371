"""Randomness keyed by what it is for, so that it never depends on what was drawn before.

A run that is resumed, sampled in between or split over processes draws the same numbers as one that is not.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key_of(*parts: object) -> int:
    """A 63-bit integer from the parts, the same on every machine and in every version."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(*parts: object) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(key_of(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(key_of(*parts))


def hashed_order(count: int, *parts: object) -> list[int]:
    """A permutation of range(count) that no library version can change: sorted by SHA-256."""
    text = "\x1f".join(map(str, parts))
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{text}\x1f{i}".encode()).digest())


def hashed_signs(count: int, *parts: object) -> np.ndarray:
    """+1 or -1, `count` times, from SHA-256 in counter mode."""
    text = "\x1f".join(map(str, parts))
    blocks = (hashlib.sha256(f"{text}\x1f{block}".encode()).digest() for block in range(-(-count // 256)))
    bits = np.unpackbits(np.frombuffer(b"".join(blocks), np.uint8))[:count]
    return 1.0 - 2.0 * bits.astype(np.float64)
