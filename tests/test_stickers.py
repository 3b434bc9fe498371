"""The sticker world: captions tell what is drawn, held-out glyphs stay out, a pool is a function of seed and step."""

import numpy as np
import pytest
import torch

from studio.bases.sticker import TEXT_LENGTH, build_sticker
from studio.data import stickers
from studio.data.sticker_pool import StickerPool, draw, draw_crop, to_pixels

needs_font = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")


def scenes(count, choices=None, seed=0):
    rng = np.random.default_rng(seed)
    return [stickers.draw_scene(rng, choices or stickers.glyphs("train")) for _ in range(count)]


def test_the_table_has_what_the_card_promises():
    trained, held_out = stickers.glyphs("train"), stickers.glyphs("held-out")
    assert 300 <= len(trained) <= 400
    assert len(held_out) == 60
    assert {"dog", "cat", "apple", "cup", "fox", "rocket"} <= {glyph.name for glyph in trained}
    characters = [glyph.character for glyph in stickers.all_glyphs()]
    assert len(set(characters)) == len(characters)


def test_every_caption_is_made_of_words_that_the_tokenizer_has_whole():
    tokenizer = build_sticker().pipe.tokenizer
    rng = np.random.default_rng(1)
    for scene in scenes(300, stickers.glyphs("train", "held-out")):
        caption = scene.caption(rng)
        ids = tokenizer(caption).input_ids
        words = caption.replace(",", " ,").replace("yo-yo", "yo - yo").split()
        assert len(ids) == len(words) + 2, caption
        assert len(ids) <= TEXT_LENGTH


def test_captions_name_things_tints_sizes_places_and_grounds():
    rng = np.random.default_rng(2)
    for scene in scenes(200):
        caption = f" {scene.caption(rng)} "
        for thing in scene.things:
            assert thing.glyph.name in caption
            assert not thing.tint or f" {thing.tint} " in caption
            assert not thing.size or f" {thing.size} " in caption
        assert scene.relation in caption
        assert scene.position in caption
        assert scene.ground == stickers.Ground() or scene.ground.phrase() in caption


@needs_font
def test_what_is_drawn_stands_where_the_caption_says():
    fox = next(glyph for glyph in stickers.glyphs("train") if glyph.name == "fox")
    rng = np.random.default_rng(3)
    for position, (x, y) in stickers.POSITIONS.items():
        scene = stickers.Scene((stickers.Thing(fox),), stickers.Ground("blue"), position)
        pixels = np.asarray(stickers.render(scene, 128, rng)).astype(int)
        differs = np.abs(pixels - np.array(stickers.COLOURS["blue"])).sum(-1) > 30
        rows, columns = np.nonzero(differs)
        assert abs(columns.mean() / 128 - x) < 0.06, position
        assert abs(rows.mean() / 128 - y) < 0.06, position


@needs_font
def test_a_key_always_draws_the_same_picture_and_others_differ():
    one, again, other = (draw(key, 64, "train") for key in ((1, 2), (1, 2), (1, 3)))
    assert one[0].tobytes() == again[0].tobytes()
    assert one[1] == again[1]
    assert one[0].tobytes() != other[0].tobytes()
    assert draw_crop((1, 2), 128, "train", 32).size == (32, 32)


@needs_font
def test_a_pool_is_a_function_of_seed_and_step():
    def pool():
        return StickerPool(lambda pixels: pixels[:, :, ::8, ::8], lambda key: draw(key, 32, "train"), 10, 3, seed=5)

    walked, jumped = pool(), pool()
    for step in range(8):
        latents, captions = walked.batch(step, 0, range(4))
    fresh, fresh_captions = jumped.batch(7, 0, range(4))
    assert torch.equal(latents, fresh)
    assert captions == fresh_captions
    before = walked.latents.clone()
    walked.batch(8, 0, range(4))
    assert (walked.latents != before).flatten(1).any(1).sum() == 3


@needs_font
def test_pixels_of_pictures_lie_between_minus_one_and_one():
    pixels = to_pixels([draw((i,), 32, "train")[0] for i in range(4)])
    assert pixels.shape == (4, 3, 32, 32)
    assert -1 <= pixels.min() < pixels.max() <= 1
