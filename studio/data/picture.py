"""One picture to train on, and its tensors. Sizes are (width, height) in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studio.data.buckets import Size, crop_box
from studio.data.decode import Unusable, decode
from studio.data.masks import read_mask
from studio.data.sticker_pool import to_pixels
from studio.errors import DataError


@dataclass(frozen=True)
class Picture:
    """One usable picture. `content` is the SHA-256 of its file; width and height are after the EXIF turn."""

    path: Path
    name: str
    caption: str
    width: int
    height: int
    content: str
    bucket: Size
    mask: Path | None = None

    @property
    def size(self) -> Size:
        return self.width, self.height


def load_pixels(picture: Picture, flip: bool = False) -> Tensor:
    """(3, H, W) in [-1, 1]: resized to cover the bucket, cut in the middle. Raises DataError if the file changed."""
    try:
        image = decode(picture.path)
    except Unusable as error:
        raise DataError(f"'{picture.name}' {error}", "it was whole before: put it back and run again") from None
    return to_pixels([_fitted(image, picture, picture.bucket, Image.Resampling.LANCZOS, flip)])[0].contiguous()


def load_mask(picture: Picture, latent_size: Size, flip: bool = False) -> Tensor:
    """(1, h, w) in [0, 1] for `latent_size` = (w, h): the mean of the mask over each latent; ones without a mask."""
    if picture.mask is None:
        return torch.ones(1, latent_size[1], latent_size[0])
    image = read_mask(picture.mask, picture.mask.name)
    fitted = _fitted(image, picture, latent_size, Image.Resampling.BOX, flip)
    return torch.from_numpy(np.array(fitted)).float()[None] / 255


def _fitted(image: Image.Image, picture: Picture, size: Size, resampling: Image.Resampling, flip: bool) -> Image.Image:
    """The part of the image that its bucket shows, at `size`."""
    if image.size != picture.size:
        raise DataError(f"'{picture.name}' or its mask changed its size during the run", "put it back and run again")
    fitted = image.resize(size, resampling, box=crop_box(picture.size, picture.bucket))
    return fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else fitted
