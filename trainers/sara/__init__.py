"""SaRA: sparse training of the base's own, smallest weights (Hu et al. 2024). See method.py."""

from trainers.sara.method import Sara
from trainers.sara.patch import SparsePatch

__all__ = ["Sara", "SparsePatch"]
