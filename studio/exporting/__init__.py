"""Writing adapters for other programs, each export proven by reading it back in a process that knows nothing of us.

    from studio.exporting import export_adapter
    report = export_adapter(adapter, base, to="diffusers", out=Path("lora"))

One file per target: `diffusers` and `kohya` (LoRA), `diff` (dense deltas), `checkpoint` (a merged pipeline).
"""

from studio.exporting.exporter import FORMATS, export_adapter
from studio.exporting.report import ExportReport, LayerRow

__all__ = ["FORMATS", "ExportReport", "LayerRow", "export_adapter"]
