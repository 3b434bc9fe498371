"""A linear bottleneck in the stream of hidden states (the L adapter of Mehta et al. 2025, inside the network).

    f(y) = W_up gelu(W_down y + b_down) + b_up

It sees one step at a time, so it has no state. The study's own was put on the finished wave and never reached the
model; this is the adapter of Houlsby et al. 2019 at the place that the study's figures show.
"""

from __future__ import annotations

from typing import Literal

from studio.method import register
from studio.music.inserted import Inserted, MusicMethod
from studio.patch import LayerShape


@register
class MusicLinear(MusicMethod):
    """Music: a linear bottleneck after each layer; smallest and fastest, sees one moment at a time."""

    kind: Literal["music-linear"] = "music-linear"
    paper = "Mehta et al. 2025, Exploring Adapter Design Tradeoffs for Low Resource Music Generation, arXiv 2506.21298"

    def insert(self, shape: LayerShape, bottleneck: int, causal: bool) -> Inserted:
        return Inserted(shape, bottleneck, self.dropout, causal)

    def size(self, width: int, bottleneck: int, planar: bool = False) -> int:
        return 2 * width * bottleneck + bottleneck + width
