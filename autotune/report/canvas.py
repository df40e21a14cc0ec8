"""A figure of the report's width, about 1400 pixels, and its PNG. Agg only: no display, no global matplotlib state."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from autotune.report import palette, words

WIDTH = 10.0  # inches
DPI = 140
LEFT = 0.085  # where titles start, as a share of the width


def figure(height: float) -> Figure:
    made = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(made)  # attaches itself; text can be measured before it is drawn
    return made


def title(drawn: Figure, y: float, text: str) -> None:
    """A headline that never runs over the edge: long ones get smaller, very long ones end in an ellipsis."""
    shown = words.line(text, 96)
    size = min(15.0, 15.0 * 66 / len(shown))
    drawn.text(LEFT, y, shown, fontsize=size, fontweight="bold", color=palette.INK)


def png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(buffer, metadata={"Software": "autotune"})
    return buffer.getvalue()
