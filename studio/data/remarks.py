"""What a user should hear about a folder of pictures that can be used, but perhaps not as it was meant."""

from __future__ import annotations

from studio.data.buckets import WIDEST, kept_fraction
from studio.data.listing import Listing
from studio.data.masks import Masks, mask_path
from studio.data.picture import Picture

LEAST_KEPT = 0.7  # a crop that leaves less of a picture's area than this is told
MOST_ENLARGED = 2.0


def on_files(listing: Listing) -> list[str]:
    found = []
    if listing.other_pictures:
        found.append(f"not read, for their format: {listing.names(listing.other_pictures)}; save them as PNG or JPEG")
    if listing.linked_folders:
        found.append(f"links to folders are not followed: {listing.names(listing.linked_folders)}")
    return found


def on_masks(listing: Listing, masks: Masks | None) -> list[str]:
    """`masks` is None where the preset leaves them out."""
    found = []
    wanted = {mask_path(path) for path in listing.pictures}
    orphans = [path for path in listing.masks if path not in wanted]
    if orphans:
        found.append(f"masks that belong to no picture (NAME.mask.png beside NAME.png): {listing.names(orphans)}")
    if masks is None and len(orphans) < len(listing.masks):
        found.append("masks lie beside the pictures, and data.masks is off: they are not used")
    if masks and masks.without:
        found.append(f"pictures without a mask, which count in full: {listing.names(masks.without)}")
    if masks and masks.black:
        found.append(f"masks that are all black, so that nothing is learned there: {listing.names(masks.black)}")
    return found


def on_captions(pictures: list[Picture], captioned: list[Picture], template: str, trigger: str) -> list[str]:
    """`captioned` are the pictures whose caption came from a file."""
    found = []
    own = {picture.path for picture in captioned}
    bare = [picture for picture in pictures if picture.path not in own]
    if bare:
        who = f"{_names(bare)} have none" if captioned else "none of the pictures has one"
        found.append(f"captions: {who}, so the template is used: '{template}'")
    without = [picture for picture in captioned if trigger.lower() not in picture.caption.lower()]
    if without:
        found.append(f"the trigger '{trigger}' is not in the captions of {_names(without)}: it learns nothing there")
    return found


def on_pictures(pictures: list[Picture]) -> list[str]:
    copies: dict[str, list[Picture]] = {}
    for picture in pictures:
        copies.setdefault(picture.content, []).append(picture)
    found = [f"the same picture {len(group)} times: {_names(group)}" for group in copies.values() if len(group) > 1]
    small = [p for p in pictures if max(p.bucket[0] / p.width, p.bucket[1] / p.height) > MOST_ENLARGED]
    if small:
        found.append(f"smaller than half the resolution, hence enlarged and blurred: {_names(small)}")
    cut = [p for p in pictures if _is_cut(p)]
    if cut:
        worst = min(kept_fraction(p.size, p.bucket) for p in cut)
        found.append(f"cut to fit a bucket, {worst:.0%} of the worst is left: {_names(cut)}")
    return found


def on_animations(pictures: list[Picture]) -> list[str]:
    return [f"animated, and only the first frame is used: {_names(pictures)}"] if pictures else []


def _is_cut(picture: Picture) -> bool:
    ratio = picture.width / picture.height
    return max(ratio, 1 / ratio) > WIDEST or kept_fraction(picture.size, picture.bucket) < LEAST_KEPT


def _names(pictures: list[Picture], shown: int = 3) -> str:
    more = f" and {len(pictures) - shown} more" if len(pictures) > shown else ""
    return ", ".join(f"'{picture.name}'" for picture in pictures[:shown]) + more
