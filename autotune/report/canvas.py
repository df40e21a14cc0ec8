"""A figure of the report's width, about 1400 pixels, and its PNG. Agg only: no display, no global matplotlib state."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 10.0  # inches
DPI = 140


def figure(height: float) -> Figure:
    made = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(made)  # attaches itself; text can be measured before it is drawn
    return made


def png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(buffer, metadata={"Software": "autotune"})
    return buffer.getvalue()
