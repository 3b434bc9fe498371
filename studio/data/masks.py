"""Masks: NAME.mask.png beside NAME.png (or .jpg, .webp). White counts; black and transparent do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from studio.data.buckets import Size
from studio.data.decode import Unusable, decode
from studio.data.listing import Listing
from studio.errors import DataError


def mask_path(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}.mask.png")


def read_mask(path: Path, name: str) -> Image.Image:
    """The mask in mode L, upright. Raises DataError, which calls it `name`."""
    try:
        return decode(path, ground="black").convert("L")
    except Unusable as error:
        raise DataError(f"the mask '{name}' cannot be used: it {error}", "save it anew as a PNG") from None


class Masks:
    """The masks of a listing, as far as its pictures have asked for them; remembers what is odd."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.known = set(listing.masks)
        self.without: list[Path] = []  # pictures
        self.black: list[Path] = []

    def of(self, picture: Path, size: Size) -> Path | None:
        """The mask of a picture of this size. Raises DataError if it is damaged or of another size."""
        path = mask_path(picture)
        if path not in self.known:
            self.without.append(picture)
            return None
        grey = read_mask(path, self.listing.name(path))
        if grey.size != size:
            raise DataError(
                f"the mask '{self.listing.name(path)}' is {grey.width} x {grey.height} pixels, and its picture "
                f"'{self.listing.name(picture)}' {size[0]} x {size[1]}",
                "draw it at the picture's size, as the picture is shown upright",
            )
        if not np.asarray(grey).any():
            self.black.append(path)
        return path
