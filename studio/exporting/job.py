"""One export while it is being made, and what the formats share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from studio.adapter import Adapter
from studio.base import Base
from studio.errors import ExportRefused
from studio.exporting.approximation import Factors, low_rank_factors
from studio.exporting.site_delta import SiteDelta, site_deltas


@dataclass
class Job:
    """What is exported and how. `name` is for files and titles; `warnings` reach the user."""

    adapter: Adapter
    base: Base
    name: str
    rank: int | None = None
    allow_approximate: bool = False
    dtype: torch.dtype = torch.float32
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def deltas(self) -> dict[str, SiteDelta]:
        return site_deltas(self.adapter, self.base)

    def factors(self) -> dict[str, Factors]:
        return low_rank_factors(self.deltas, self.rank, self.allow_approximate)

    def stored(self, value: Tensor, where: str) -> Tensor:
        """A tensor as it is written: contiguous, its own memory. Raises ExportRefused if the dtype cannot hold it."""
        cast = value.detach().cpu().to(self.dtype).contiguous().clone()
        if not cast.isfinite().all():
            raise ExportRefused(f"{str(self.dtype)[6:]} cannot hold the numbers at '{where}'", "export in float32")
        return cast
