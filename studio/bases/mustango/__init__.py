"""Mustango: music by diffusion of spectrograms; its networks, its pipeline, and the family of bases built so."""

from studio.bases.mustango.family import Mustango

__all__ = ["Mustango"]
