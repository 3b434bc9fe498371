"""RDTF: a small network for animated stickers, trained whole with dual masks and a curriculum (arXiv 2503.17735)."""

from trainers.rdtf.method import Rdtf

__all__ = ["Rdtf"]
