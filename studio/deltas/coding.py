"""Low-rank changes in few bits: factors as int8, or as signs with a number per rank (after Yadav et al. 2023, ComPEFT).

Both factors are coded along the rank, so that every direction keeps its own size:
int8: 8 bits a number, scale = largest / 127;  ternary: 1.6 bits, the share `density` of largest entries is kept.
R rank, N columns, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.deltas.lazy_sum import total
from studio.deltas.low_rank import LowRank
from studio.deltas.ternary import Ternary, unpack
from studio.errors import RequestError

INT8_NAMES = ("down_codes", "down_scales", "up_codes", "up_scales")
TERNARY_NAMES = ("down_scales", "down_signs", "up_scales", "up_signs")


@dataclass(frozen=True)
class Code:
    """`density` 0 stands for int8."""

    density: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Code:
        """`int8`, `ternary` or `ternary:DENSITY`. Raises RequestError."""
        kind, _, number = text.partition(":")
        try:
            density = float(number or 0.2)
        except ValueError:
            density = 0.0
        if text == "int8":
            return cls()
        if kind != "ternary" or not 0 < density <= 1:
            raise RequestError(f"'{text}' is no compression", "take int8, or ternary:0.2 with a density up to 1")
        return cls(density)

    def encode(self, low: LowRank) -> dict[str, Tensor]:
        """The tensors of both factors; `up` is coded transposed, so that its rows too are the ranks."""
        tensors: dict[str, Tensor] = {}
        for name, rows in (("down", low.down), ("up", low.up.T)):
            if self.density:
                coded = Ternary.of(rows.float(), self.density)
                tensors |= {f"{name}_signs": coded.packed, f"{name}_scales": coded.scales}
            else:
                scales = (rows.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
                tensors |= {f"{name}_codes": (rows / scales[:, None]).round().to(torch.int8), f"{name}_scales": scales}
        return tensors


def decode(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> LowRank:
    """The inverse of `encode`, for a weight of this shape: a plain low-rank change in fp32."""
    width = torch.Size(shape[1:]).numel()
    rows = [_rows(tensors, name, size) for name, size in (("down", width), ("up", shape[0]))]
    return LowRank(rows[0], rows[1].T.contiguous(), shape)


def _rows(tensors: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    codes = tensors.get(f"{name}_codes")
    if codes is None:
        codes = unpack(tensors[f"{name}_signs"], width)
    return codes.float() * tensors[f"{name}_scales"].float()[:, None]


def coding_error(low: LowRank, tensors: Mapping[str, Tensor]) -> float:
    """|decoded - change| / |change| in the Frobenius norm."""
    norm = low.norm()
    return total([low, decode(tensors, low.shape).scaled(-1.0)]).norm() / norm if norm else 0.0
