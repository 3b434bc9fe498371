"""Folders of pictures: what is read, what is refused and why, and that nothing is ever written."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from studio.data import listing as listing_module
from studio.data.buckets import bucket_table, crop_box, kept_fraction, nearest_bucket, square
from studio.data.decode import decode
from studio.data.pictures import load_mask, load_pixels, scan
from studio.errors import DataError, PresetError
from studio.preset import Data

FILL = {"trigger": "zovuki", "class": "cup"}


def noise(size=(64, 64), seed=0, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0]) if channels == 1 else (size[1], size[0], channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def save(path, image=None, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(seed=zlib.crc32(path.name.encode()))).save(path, **settings)
    return path


def look(folder, fill=FILL, resolution=64, multiple=16, **data):
    return scan(folder, Data(**data), fill, resolution, multiple)


def only(folder, **data):
    found = look(folder, **data).pictures
    assert len(found) == 1
    return found[0]


def halves(size=(64, 32)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image


def colour(pixels, x, y):
    """The colour near a place given in [0, 1], as 0..255."""
    _, h, w = pixels.shape
    return [round(float(v)) for v in (pixels[:, int(y * (h - 1)), int(x * (w - 1))] + 1) * 127.5]


def near(colour, wanted, within=12):
    return all(abs(a - b) <= within for a, b in zip(colour, wanted))


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


# -- decoding --------------------------------------------------------------------------------------------------

UPRIGHT = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the turn that undoes the turn of each orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_turned_pictures_are_seen_upright(tmp_path, orientation, ending):
    from studio.data.decode import _TURNS

    image = Image.new("RGB", (96, 48), "red")
    image.paste("blue", (48, 0, 96, 48))
    image.paste("lime", (0, 0, 16, 16))  # a mark in a corner tells all eight apart
    undo = UPRIGHT[orientation]
    stored = image if undo == 1 else image.transpose(_TURNS[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"a.{ending}", stored, exif=exif.tobytes(), **({} if ending == "png" else {"quality": 95}))
    picture = only(tmp_path)
    assert (picture.width, picture.height) == (96, 48)
    pixels = load_pixels(picture)
    assert near(colour(pixels, 0.1, 0.1), (0, 255, 0), 40)
    assert near(colour(pixels, 0.2, 0.8), (255, 0, 0), 40)
    assert near(colour(pixels, 0.8, 0.5), (0, 0, 255), 40)


def test_damaged_exif_leaves_the_picture(tmp_path):
    save(tmp_path / "a.jpg", halves(), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage")
    assert only(tmp_path).size == (64, 32)


def test_what_is_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.putpixel((63, 63), (0, 0, 0, 128))
    save(tmp_path / "a.png", image)
    save(tmp_path / "b.webp", image, lossless=True)
    grey = Image.new("LA", (64, 64), (0, 0))
    grey.paste((0, 255), (0, 0, 32, 64))
    save(tmp_path / "c.png", grey)
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([255, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 32, 64))
    save(tmp_path / "d.png", palette, transparency=1)
    for picture, left in zip(look(tmp_path).pictures, [(255, 0, 0), (255, 0, 0), (0, 0, 0), (255, 0, 0)], strict=True):
        pixels = load_pixels(picture)
        assert near(colour(pixels, 0.2, 0.5), left, 1)
        assert near(colour(pixels, 0.8, 0.5), (255, 255, 255), 1)
    assert np.asarray(decode(tmp_path / "a.png"))[63, 63].tolist() == [127, 127, 127]


def test_a_colour_profile_is_followed(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, blue = (profile.index(tag) for tag in (b"rXYZ", b"bXYZ"))  # entries of the tag table: name, offset, size
    swapped = bytearray(profile)
    swapped[red + 4 : red + 12], swapped[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    save(tmp_path / "a.png", picture, icc_profile=profile)
    save(tmp_path / "b.png", picture, icc_profile=bytes(swapped))
    save(tmp_path / "c.png", picture, icc_profile=b"no profile at all")
    for found, wanted in zip(look(tmp_path).pictures, [(200, 30, 30), (30, 30, 200), (200, 30, 30)], strict=True):
        assert near(colour(load_pixels(found), 0.5, 0.5), wanted, 2)


def test_of_an_animation_the_first_frame_is_used_and_told(tmp_path):
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = look(tmp_path)
    assert near(colour(load_pixels(found.pictures[0]), 0.5, 0.5), (255, 0, 0), 2)
    assert any("animated" in text and "'a.webp'" in text for text in found.report.warnings)


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("L", "P", "1", "CMYK", "RGBA", "LA"):
        source = Image.new("RGB", (64, 64), (200, 200, 200)).convert(mode)
        save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}", source)
    deep = np.full((64, 64), 200 * 257, np.uint16)
    save(tmp_path / "deep.png", Image.fromarray(deep))
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    found = look(tmp_path).pictures
    assert len(found) == 7
    for picture in found:
        pixels = load_pixels(picture)
        assert pixels.shape == (3, 64, 64)
        if picture.name != "1.png":  # dithered
            assert near(colour(pixels, 0.5, 0.5), (200, 200, 200), 4)


def test_pixels_lie_between_minus_one_and_one(tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (64, 64), (255, 0, 0)))
    pixels = load_pixels(only(tmp_path))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels[0].unique().tolist() == [1.0]
    assert pixels[1].unique().tolist() == [-1.0]


def test_a_picture_at_its_buckets_size_is_not_resampled(tmp_path):
    image = noise((64, 64), 3)
    save(tmp_path / "a.png", image)
    picture = only(tmp_path)
    exact = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(load_pixels(picture), exact)
    assert torch.equal(load_pixels(picture, flip=True), exact.flip(-1))


def test_pictures_are_cut_in_the_middle(tmp_path):
    image = Image.new("RGB", (192, 64), "white")
    image.paste((255, 0, 0), (64, 0, 128, 64))
    save(tmp_path / "a.png", image)
    pixels = load_pixels(only(tmp_path, buckets=False))
    assert pixels.shape == (3, 64, 64)
    assert near(colour(pixels, 0.06, 0.5), (255, 0, 0))
    assert near(colour(pixels, 0.94, 0.5), (255, 0, 0))


# -- what is left out ------------------------------------------------------------------------------------------


def test_damaged_files_are_dropped_by_name_with_a_reason(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "cut.jpg", noise((200, 200)), quality=95)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    save(tmp_path / "cut.png", noise((200, 200), 1))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    save(tmp_path / "cut.webp", noise((200, 200), 2), lossless=True)
    content = (tmp_path / "cut.webp").read_bytes()
    (tmp_path / "cut.webp").write_bytes(content[: len(content) // 2])
    (tmp_path / "words.png").write_text("I am a letter")
    (tmp_path / "empty.webp").touch()
    save(tmp_path / "dot.png", noise((1, 1)))
    save(tmp_path / "thin.png", noise((400, 15)))
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    found = look(tmp_path)
    assert [p.name for p in found.pictures] == found.report.used == ["good.png"]
    reasons = dict(found.report.dropped)
    assert set(reasons) == {
        "cut.jpg", "cut.png", "cut.webp", "words.png", "empty.webp", "dot.png", "thin.png", "link.png", "self.png"
    }  # fmt: skip
    assert "truncated" in reasons["cut.jpg"]
    assert "damaged" in reasons["cut.png"]
    assert "no PNG, JPEG or WebP" in reasons["words.png"]
    assert "empty" in reasons["empty.webp"]
    assert "1 x 1" in reasons["dot.png"]
    assert "400 x 15" in reasons["thin.png"]
    assert "link to nothing" in reasons["link.png"]


def test_a_wrong_ending_does_not_matter(tmp_path):
    buffer = io.BytesIO()
    halves().save(buffer, "JPEG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert only(tmp_path).size == (64, 32)


@pytest.mark.parametrize("side", [10_001, 20_000, 2**31 - 1])
def test_gigantic_pictures_are_refused_from_the_header(tmp_path, side):
    save(tmp_path / "good.png")
    (tmp_path / "huge.png").write_bytes(png_header(side, side))
    assert [(n, "100 megapixels" in r) for n, r in look(tmp_path).report.dropped] == [("huge.png", True)]


def test_gigantic_pictures_take_no_memory(tmp_path):
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    vp8l = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + b"\0"
    (tmp_path / "huge.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(vp8x + vp8l)) + b"WEBP" + vp8x + vp8l)
    save(tmp_path / "good.png")
    program = f"""
import resource
from pathlib import Path
from studio.data.decode import decode
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(Path({str(tmp_path / "good.png")!r}))
before = peak()
for name in ("huge.png", "huge.webp"):
    try:
        decode(Path({str(tmp_path)!r}) / name)
    except Exception as error:
        print(type(error).__name__, "megapixels" in str(error))
print(peak() - before)
"""
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert lines[:4] == ["Unusable", "True", "Unusable", "True"]
    assert int(lines[4]) < 20_000  # KiB


def test_nothing_usable_is_an_error_with_the_first_reasons(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_text("no picture")
    with pytest.raises(DataError, match=r"'0\.png' is no PNG.*'1\.png'.*'2\.png'") as caught:
        look(tmp_path)
    assert "3.png" not in caught.value.message


def test_a_folder_without_pictures_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "notes.doc").write_text("hello")
    with pytest.raises(DataError, match="there are no pictures") as caught:
        look(tmp_path)
    assert "PNG" in caught.value.hint
    (tmp_path / "IMG_1.HEIC").touch()
    with pytest.raises(DataError) as caught:
        look(tmp_path)
    assert "IMG_1.HEIC" in caught.value.hint


def test_missing_folders_files_and_unreadable_folders_are_errors(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no folder"):
        look(tmp_path / "absent")
    file = save(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a file"):
        look(file)
    locked = tmp_path / "locked"
    save(locked / "b.png")
    real = Path.iterdir

    def iterdir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(listing_module.Path, "iterdir", iterdir)
    for folder in (locked, tmp_path):
        with pytest.raises(DataError, match=r"locked.*Permission denied"):
            look(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert dict(look(tmp_path).report.dropped).keys() == {"b.png"}


# -- the walk --------------------------------------------------------------------------------------------------


def test_sub_folders_are_read_in_order_and_hidden_files_are_not(tmp_path):
    for name in (
        "b.png",
        "a.jpg",
        "sub/c.webp",
        "Z.PNG",
        "sub/deep/d.JPEG",
        ".hidden.png",
        ".git/e.png",
        "sub/._f.jpg",
    ):
        save(tmp_path / name)
    (tmp_path / "notes.md").write_text("ignored")
    found = look(tmp_path)
    assert found.report.used == ["Z.PNG", "a.jpg", "b.png", "sub/c.webp", "sub/deep/d.JPEG"]
    assert found.report.dropped == []
    assert found.count == 5


def test_links_that_lead_in_circles_end(tmp_path):
    save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "again").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "up").symlink_to(tmp_path)
    found = look(tmp_path / "pictures")
    assert found.report.used == ["a.png"]
    assert any("links to folders" in w and "again" in w and "up" in w for w in found.report.warnings)
    (tmp_path / "door").symlink_to(tmp_path / "pictures")  # the folder itself may be a link
    assert look(tmp_path / "door").report.used == ["a.png"]


def test_names_that_cannot_be_printed_are_reported_readably(tmp_path):
    save(tmp_path / "good.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff\n.png")).write_text("no picture")
    ((name, _),) = look(tmp_path).report.dropped
    name.encode()
    assert name.isprintable()


def test_the_users_folder_is_never_written(tmp_path):
    folder = tmp_path / "user"
    save(folder / "a.png", noise((80, 60)))
    save(folder / "a.mask.png", noise((80, 60), mode="L"))
    save(folder / "sub" / "b.jpg")
    (folder / "a.txt").write_text("a zovuki")
    (folder / "metadata.csv").write_text("file_name,text\nsub/b.jpg,another zovuki\n")

    def state():
        return {
            str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "")
            for p in [folder, *folder.rglob("*")]
        }

    before = state()
    for picture in look(folder, masks=True, validation=1).pictures:
        load_pixels(picture)
        load_mask(picture, (8, 8))
    assert state() == before


# -- captions --------------------------------------------------------------------------------------------------


def test_captions_take_precedence_in_order(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa red zovuki\r\n  on a table\n".encode())
    rows = [("a.png", "from metadata"), ("b.png", "a zovuki, blue"), ("sub/d.png", "outer zovuki")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    (tmp_path / "sub" / "metadata.csv").write_text('file_name,caption\nd.png,"inner zovuki, ""quoted"""\n')
    found = look(tmp_path, caption="a photo of a {trigger} {class}")
    assert {p.name: p.caption for p in found.pictures} == {
        "a.png": "a red zovuki on a table",
        "b.png": "a zovuki, blue",
        "c.png": "a photo of a zovuki cup",
        "sub/d.png": 'inner zovuki, "quoted"',
        "sub/e.png": "a photo of a zovuki cup",
    }
    assert any("captions" in w and "'c.png', 'sub/e.png'" in w for w in found.report.warnings)


def test_an_empty_caption_is_none(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    assert only(tmp_path).caption == "zovuki"
    assert only(tmp_path, fill={"trigger": "zovuki", "class": ""}, caption="{trigger} {class}").caption == "zovuki"
    assert any("captions" in w for w in look(tmp_path).report.warnings)


def test_braces_in_files_are_plain_text(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a zovuki {with} braces {0}")
    assert only(tmp_path).caption == "a zovuki {with} braces {0}"


@pytest.mark.parametrize("template", ["{triger}", "{}", "{0}", "{trigger.__class__}", "{trigger!r}", "{class:>9}", "{"])
def test_templates_with_unknown_fields_are_refused(tmp_path, template):
    save(tmp_path / "a.png")
    with pytest.raises(PresetError, match=r"data\.caption") as caught:
        look(tmp_path, caption=template)
    assert caught.value.hint


def test_the_nearest_field_is_named(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(PresetError) as caught:
        look(tmp_path, caption="a {triger}")
    assert "{trigger}" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n\n{"file_name": "b.png"', 3),
        ("metadata.jsonl", '["a.png", "x"]', 1),
        ("metadata.jsonl", '{"text": "x"}', 1),
        ("metadata.jsonl", '{"file_name": "a.png"}', 1),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', 1),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}', 2),
        ("metadata.jsonl", "[" * 100_000, 1),
        ("metadata.csv", "file_name,text\na.png,x,y\n", 2),
        ("metadata.csv", "file_name,text\na.png\n", 2),
        ("metadata.csv", "name,text\na.png,x\n", 2),
        ("metadata.csv", "file_name,words\na.png,x\n", 2),
        ("metadata.csv", 'file_name,text\na.png,"x', 2),
        ("metadata.csv", f"file_name,text\na.png,{'x' * 200_000}\n", 2),
    ],
)
def test_malformed_metadata_is_an_error_with_its_line(tmp_path, file, content, line):
    save(tmp_path / "a.png")
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=rf"'{file}', line {line}: ") as caught:
        look(tmp_path)
    assert "\n" not in caught.value.message
    assert "file_name" in caught.value.hint


def test_metadata_of_absent_pictures_is_told(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a zovuki\ngone.png,b\n../outside.png,c\n")
    found = look(tmp_path)
    assert found.pictures[0].caption == "a zovuki"
    assert any("'gone.png', '../outside.png'" in w for w in found.report.warnings)


def test_an_empty_metadata_text_falls_back_to_the_template(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}\r\n')
    assert only(tmp_path).caption == "zovuki"


@pytest.mark.parametrize("content", ["caf\u00e9".encode("latin-1"), "a zovuki".encode("utf-16"), b"a\0b\0"])
@pytest.mark.parametrize("file", ["a.txt", "metadata.csv"])
def test_text_that_is_not_utf8_is_an_error_with_its_name(tmp_path, content, file):
    save(tmp_path / "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"'{file}' is not UTF-8"):
        look(tmp_path)


def test_a_caption_as_long_as_a_book_is_an_error(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("zovuki " * 20_000)
    with pytest.raises(DataError, match=r"'a\.txt' is over 64 KiB"):
        look(tmp_path)


def test_captions_without_the_trigger_are_told(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a Zovuki")
    (tmp_path / "b.txt").write_text("a cup")
    (told,) = [w for w in look(tmp_path).report.warnings if "the trigger" in w]
    assert "'b.png'" in told
    assert "'a.png'" not in told
    assert "'c.png'" not in told  # its caption is the template's


# -- masks -----------------------------------------------------------------------------------------------------


def test_masks_are_never_pictures(tmp_path):
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.mask.png", Image.new("L", (64, 64), 255))
    found = look(tmp_path)
    assert found.report.used == ["a.jpg"]
    assert found.pictures[0].mask is None
    assert any("data.masks is off" in w for w in found.report.warnings)
    assert only(tmp_path, masks=True).mask == tmp_path / "a.mask.png"


def test_masks_are_averaged_over_latents_and_flip_with_the_picture(tmp_path):
    save(tmp_path / "a.png", noise((64, 64)))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :20] = 255
    save(tmp_path / "a.mask.png", Image.fromarray(mask))
    picture = only(tmp_path, masks=True)
    got = load_mask(picture, (8, 8))
    assert got.shape == (1, 8, 8)
    wanted = torch.from_numpy(mask).float().view(8, 8, 8, 8).mean((1, 3)) / 255  # two and a half latents
    assert torch.allclose(got[0], wanted, atol=1 / 255)
    assert torch.equal(load_mask(picture, (8, 8), flip=True), got.flip(-1))


def test_a_mask_is_cut_as_its_picture_is(tmp_path):
    image = Image.new("RGB", (192, 64), "black")
    image.paste("white", (96, 0, 192, 64))
    save(tmp_path / "a.png", image)
    save(tmp_path / "a.mask.png", image)
    picture = only(tmp_path, masks=True, buckets=False)
    got = load_mask(picture, (8, 8))
    seen = load_pixels(picture).view(3, 8, 8, 8, 8).mean((0, 2, 4)) / 2 + 0.5
    assert torch.allclose(got[0], seen, atol=0.05)


def test_latent_sizes_are_width_and_height(tmp_path):
    save(tmp_path / "a.png", noise((128, 64)))
    save(tmp_path / "a.mask.png", noise((128, 64), mode="L"))
    assert load_mask(only(tmp_path, masks=True), (10, 6)).shape == (1, 6, 10)
    assert torch.equal(load_mask(only(tmp_path), (10, 6)), torch.ones(1, 6, 10))


def test_what_is_transparent_in_a_mask_does_not_count(tmp_path):
    save(tmp_path / "a.png", noise((64, 64)))
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    save(tmp_path / "a.mask.png", mask)
    assert load_mask(only(tmp_path, masks=True), (2, 1)).flatten().tolist() == [1.0, 0.0]


def test_a_mask_fits_the_upright_picture_or_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", noise((64, 32)), exif=exif.tobytes())
    save(tmp_path / "a.mask.png", Image.new("L", (64, 32), 255))
    with pytest.raises(DataError, match=r"a\.mask\.png' is 64 x 32 pixels, and its picture 'a\.jpg' 32 x 64"):
        look(tmp_path, masks=True)
    save(tmp_path / "a.mask.png", Image.new("L", (32, 64), 255))
    assert only(tmp_path, masks=True).mask is not None
    (tmp_path / "a.mask.png").write_text("no mask")
    with pytest.raises(DataError, match=r"a\.mask\.png' cannot be used"):
        look(tmp_path, masks=True)


def test_odd_masks_are_told(tmp_path):
    save(tmp_path / "a.png", noise((64, 64)))
    save(tmp_path / "a.mask.png", Image.new("L", (64, 64)))
    save(tmp_path / "b.png")
    save(tmp_path / "c.mask.png", Image.new("L", (64, 64)))
    text = "\n".join(look(tmp_path, masks=True).report.warnings)
    assert "without a mask, which count in full: 'b.png'" in text
    assert "all black, so that nothing is learned there: 'a.mask.png'" in text
    assert "belong to no picture (NAME.mask.png beside NAME.png): 'c.mask.png'" in text


# -- buckets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "multiple"), [(512, 64), (512, 8), (1024, 64), (768, 32), (128, 32), (96, 32), (128, 16), (500, 64)]
)
def test_buckets_keep_area_multiples_and_ratios(resolution, multiple):
    table = bucket_table(resolution, multiple)
    side = square(resolution, multiple)[0]
    assert (side, side) in table
    assert abs(side - resolution) <= multiple / 2
    assert len(table) > 2
    assert len(set(table)) == len(table)
    for w, h in table:
        assert w % multiple == h % multiple == 0
        assert 0.5 <= w / h <= 2
        assert abs(w * h / side**2 - 1) <= (0.25 if resolution < 8 * multiple else 0.1)
        assert (h, w) in table


def test_buckets_of_small_resolutions():
    assert bucket_table(128, 32) == [(96, 192), (96, 160), (128, 128), (160, 96), (192, 96)]
    assert bucket_table(64, 32) == [(64, 64)]
    assert bucket_table(32, 32) == bucket_table(16, 32) == [(32, 32)]


def test_the_nearest_bucket_loses_little(tmp_path):
    table = bucket_table(512, 64)
    for width in range(300, 1200, 7):
        size = (width, 600)
        bucket = nearest_bucket(size, table)
        kept = kept_fraction(size, bucket)
        assert kept >= 0.85
        assert kept == pytest.approx(max(kept_fraction(size, other) for other in table))
        left, top, right, bottom = crop_box(size, bucket)
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= 600
        assert (right - left) / (bottom - top) == pytest.approx(bucket[0] / bucket[1])


def test_buckets_follow_the_pictures_and_the_table_counts_them(tmp_path):
    save(tmp_path / "tall.png", noise((100, 200)))
    save(tmp_path / "wide.png", noise((300, 150)))
    save(tmp_path / "square.png", noise((200, 200)))
    save(tmp_path / "square2.png", noise((210, 200)))
    found = look(tmp_path, resolution=128, multiple=32)
    assert found.report.buckets == {"96x192": 1, "128x128": 2, "192x96": 1}
    json.dumps(found.report.to_dict())
    for picture in found.pictures:
        assert load_pixels(picture).shape == (3, picture.bucket[1], picture.bucket[0])
    assert look(tmp_path, resolution=128, multiple=32, buckets=False).report.buckets == {"128x128": 4}


def test_extreme_ratios_and_enlargements_are_told(tmp_path):
    save(tmp_path / "long.png", noise((640, 64)))
    save(tmp_path / "tiny.png", noise((30, 30)))
    save(tmp_path / "fine.png", noise((128, 64)))
    found = look(tmp_path, resolution=64)
    (cut,) = [w for w in found.report.warnings if "cut to fit" in w]
    (small,) = [w for w in found.report.warnings if "smaller than half" in w]
    assert "'long.png'" in cut
    assert "'tiny.png'" in small
    assert "fine" not in cut + small
    assert all(0.5 <= p.bucket[0] / p.bucket[1] <= 2 for p in found.pictures)
    for picture in found.pictures:
        load_pixels(picture)


# -- the set ---------------------------------------------------------------------------------------------------


def test_copies_are_told(tmp_path):
    save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "z.png")
    found = look(tmp_path)
    assert found.count == 2
    assert "the same picture 2 times: 'a.png', 'z.png'" in found.report.warnings


def test_held_out_pictures_are_chosen_by_content_and_never_trained_on(tmp_path):
    for i in range(6):
        save(tmp_path / "one" / f"{i}.png", noise(seed=i))
        save(tmp_path / "two" / f"{9 - i}.png", noise(seed=i))
    one, two = look(tmp_path / "one", validation=2), look(tmp_path / "two", validation=2)
    assert len(one.held_out) == 2
    assert {p.content for p in one.held_out} == {p.content for p in two.held_out}
    assert {p.content for p in one.held_out} | {p.content for p in one.pictures} == {
        hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "one").iterdir()
    }
    assert one.count == 4
    assert one.report.held_out == [p.name for p in one.held_out]
    shutil.copy(one.held_out[0].path, tmp_path / "one" / "copy.png")
    again = look(tmp_path / "one", validation=2)
    assert not {p.content for p in again.held_out} & {p.content for p in again.pictures}
    (first,) = (p.name for p in again.held_out if p.content == one.held_out[0].content)
    names = {first, "copy.png", one.held_out[0].name}
    ((name, reason),) = again.report.dropped
    assert {name, first} == names
    assert reason == f"is the same picture as the held-out '{first}'"


def test_holding_out_everything_is_an_error(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(DataError, match="holds out 2 of 2"):
        look(tmp_path, validation=2)


def test_the_fingerprint_tells_contents_and_captions_and_no_names(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    save(one / "a.png", noise(seed=1))
    save(one / "b.png", noise(seed=2))
    save(two / "x" / "z.png", noise(seed=1))
    save(two / "y.png", noise(seed=2))
    prints = [look(one).fingerprint, look(two).fingerprint]
    assert prints[0] == prints[1]
    (two / "y.txt").write_text("another zovuki")
    prints.append(look(two).fingerprint)
    save(one / "b.png", noise(seed=3))
    prints.append(look(one).fingerprint)
    save(one / "a.mask.png", Image.new("L", (64, 64), 255))
    assert look(one).fingerprint == prints[-1]
    prints.append(look(one, masks=True).fingerprint)
    assert all(a != b for a, b in pairwise(prints[1:]))
    assert len(set(prints)) == 4


def test_progress_is_told(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png")
    seen = []
    scan(tmp_path, Data(), FILL, 64, 16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_picture_that_changes_during_a_run_is_named(tmp_path):
    path = save(tmp_path / "a.png")
    picture = only(tmp_path)
    save(path, noise((32, 32)))
    with pytest.raises(DataError, match=r"a\.png' .*changed its size"):
        load_pixels(picture)
    path.unlink()
    with pytest.raises(DataError, match=r"'a\.png' cannot be read"):
        load_pixels(picture)
