"""What came of a merge, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXACT = 1e-6  # greatest relative error of a layer that is still called exact: fp32 rounding


@dataclass(frozen=True)
class Row:
    """One layer. `form` is how it is stored, `norm` the size of the change, `error` what a lower rank cost of it."""

    site: str
    adapters: int
    form: str
    rank: int | None
    norm: float
    error: float


@dataclass
class MergeReport:
    """The outcome. `error` is relative to what the strategy itself gave: it measures the loss of a lower rank."""

    strategy: str
    options: dict[str, Any]
    reason: str
    rows: list[Row]
    parents: list[dict[str, Any]]
    path: Path | None = None
    bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The relative error of all layers together."""
        whole = sum(row.norm**2 for row in self.rows)
        return (sum((row.error * row.norm) ** 2 for row in self.rows) / whole) ** 0.5 if whole else 0.0

    @property
    def label(self) -> str:
        """In words: whether the result is the sum, and how near."""
        exact = max((row.error for row in self.rows), default=0.0) <= EXACT
        if self.strategy in ("sum", "svd"):
            return "exact sum" if exact else f"approximate sum, relative error {self.error:.2g}"
        return self.strategy if exact else f"{self.strategy}, kept at relative error {self.error:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "strategy": self.strategy,
            "options": self.options,
            "reason": self.reason,
            "result": self.label,
            "error": self.error,
            "path": str(self.path) if self.path else None,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "parents": self.parents,
            "warnings": self.warnings,
            "layers": [asdict(row) for row in self.rows],
        }
