"""How a run shows itself: lines on the screen, a file of figures, what a curve may mean."""

from fastdpo.progress.curves import CurveNotes
from fastdpo.progress.file import MetricsFile
from fastdpo.progress.lines import ProgressLines

__all__ = ["CurveNotes", "MetricsFile", "ProgressLines"]
