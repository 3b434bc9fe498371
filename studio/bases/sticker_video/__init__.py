"""Animated stickers: a clip network around an image UNet, its pipeline, and the family of bases built so."""

from studio.bases.sticker_video.family import StickerVideo

__all__ = ["StickerVideo"]
