"""A picture file as sRGB: turned as its EXIF data say, alpha on a plain ground, or a reason why it cannot be used."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 100_000_000  # pixels; beyond it a picture is refused from its header alone
SMALLEST = 16  # pixels a side

_ORIENTATION = 0x0112  # EXIF tag; its values are undone by these
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """A picture file that cannot be trained on; the message says why and goes after "it"."""


def decode(path: Path, ground: str = "white") -> Image.Image:
    """The whole picture in sRGB, what is transparent over `ground`. Raises Unusable; never writes.

    Of an animation it is the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on odd files; what matters is raised below
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image.size)
                image.load()
                return _turned(_as_rgb(image, ground), _orientation(image))
    except Unusable:
        raise
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise Unusable("is empty" if empty else "is no PNG, JPEG or WebP picture, whatever its name says") from None
    except Image.DecompressionBombError:
        raise Unusable(_TOO_LARGE) from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}" if error.strerror else f"is damaged: {error}") from None
    except Exception as error:  # Pillow's parsers raise anything from struct.error to IndexError on damaged files
        raise Unusable(f"is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


_TOO_LARGE = f"has more than {LARGEST // 1_000_000} megapixels: scale it down"


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > LARGEST:
        raise Unusable(_TOO_LARGE)
    if min(size) < SMALLEST:
        raise Unusable(f"is too small: {size[0]} x {size[1]} pixels, and {SMALLEST} a side is the least")


def _as_rgb(image: Image.Image, ground: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip at 255
        grey = (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        clear = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, ground)
        canvas.paste(_in_srgb(clear.convert("RGB"), image), mask=clear.getchannel("A"))
        return canvas
    return _in_srgb(image, image)


def _in_srgb(image: Image.Image, source: Image.Image) -> Image.Image:
    """In RGB by the colour profile of `source`; as it is where that is absent, damaged or of another mode."""
    profile = source.info.get("icc_profile")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, own, _srgb(), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def frames_of(path: Path) -> int:
    """How many frames a picture file that `decode` accepts has; 1 but for animations."""
    with Image.open(path, formats=FORMATS) as image:
        return int(getattr(image, "n_frames", 1))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data leave the picture as it is
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
