"""The base `sticker` from nothing: both stages through the one loop, a step each on small pictures."""

import pytest
import torch

from studio.base import Request
from studio.bases.registry import load_base
from studio.data import stickers
from studio.errors import PresetError
from studio.training import Order, plan

pytestmark = pytest.mark.skipif(stickers.font_path() is None, reason="the colour emoji font is not installed")

SMALL = ("data.resolution=32", "data.pool=2", "batch_size=2", "steps=1", "warmup_steps=0", "mixed_precision=no")
QUIET = ("sample_every=0", "validate_every=0")


STAGES = [("base-sticker-vae", "vae", "unet"), ("base-sticker", "unet", "vae")]


@pytest.mark.parametrize(("preset", "changed", "kept"), STAGES)
def test_a_stage_trains_its_own_networks_and_saves_a_base_that_draws(preset, changed, kept, tmp_path, home):
    settings = (
        *SMALL,
        *QUIET,
        "method.init_from=sticker",
        "data.refresh=0",
        *(("data.crop=16",) if changed == "vae" else ()),
    )
    events = list(plan(Order(preset, run=tmp_path / "run", settings=settings)).events(lambda: False))
    assert events[-1].kind == "finished"
    saved, bundled = load_base(str(tmp_path / "run" / "base")), load_base("sticker")

    def same(name):
        pairs = zip(saved.modules[name].parameters(), bundled.modules[name].parameters())
        return all(torch.equal(a, b) for a, b in pairs)

    assert same(kept)
    assert not same(changed)
    assert saved.generate(Request(["a fox"], [0], steps=1, width=32, height=32))[0].size == (32, 32)


def test_crops_that_are_larger_than_pictures_are_refused(tmp_path, home):
    order = Order("base-sticker-vae", run=tmp_path / "run", settings=(*SMALL, *QUIET, "method.init_from=sticker"))
    with pytest.raises(PresetError, match="does not fit into pictures of 32 px"):
        list(plan(order).events(lambda: False))
