"""What adapters would do to each other, known before they are merged: measured from their factors, said in words."""

from studio.interference.report import Report
from studio.interference.survey import survey

__all__ = ["Report", "survey"]
