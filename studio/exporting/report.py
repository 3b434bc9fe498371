"""What an export holds, layer by layer, as it was read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXACT = 1e-5  # greatest relative error of a layer that is still called exact


@dataclass(frozen=True)
class LayerRow:
    """One layer. `norm` is the Frobenius norm of the adapter's own delta; `error` and `energy_kept` are fractions.

    `error` = |read back - own| / |own|, `energy_kept` = |read back|^2 / |own|^2. `rank` is None for dense formats.
    """

    site: str
    rank: int | None
    norm: float
    error: float
    energy_kept: float = 1.0


@dataclass
class ExportReport:
    """The outcome of one export. `path` is what another program is given to load, `files` is all that was written."""

    format: str
    path: Path
    files: list[Path]
    rows: list[LayerRow]
    dtype: str = "float32"
    rounding_only: bool = False  # the weights read back are the merged ones, bit for bit, in fp32
    warnings: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`exact` or `approximate`; what is refused has no report."""
        return "exact" if self.rounding_only or self.max_error <= EXACT else "approximate"

    @property
    def max_error(self) -> float:
        return max((row.error for row in self.rows), default=0.0)

    @property
    def total_error(self) -> float:
        """The relative error of all layers together."""
        lost = sum((row.error * row.norm) ** 2 for row in self.rows)
        return (lost / self._energy) ** 0.5 if self._energy else 0.0

    @property
    def energy_kept(self) -> float:
        kept = sum(row.energy_kept * row.norm**2 for row in self.rows)
        return kept / self._energy if self._energy else 1.0

    @property
    def _energy(self) -> float:
        return sum(row.norm**2 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": self.format,
            "status": self.status,
            "path": str(self.path),
            "files": [str(path) for path in self.files],
            "dtype": self.dtype,
            "max_error": self.max_error,
            "total_error": self.total_error,
            "energy_kept": self.energy_kept,
            "warnings": self.warnings,
            "layers": [asdict(row) for row in self.rows],
        }
