"""Families of bases, one file each, and how a base is found by name."""
