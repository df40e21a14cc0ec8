"""The report's pictures as PNG bytes: text is drawn as it is, never read as TeX."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context

from autotune.report import canvas, layers, pareto
from autotune.report.words import Report

STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "text.parse_math": False}


def pareto_png(report: Report) -> bytes:
    """Latency against loss."""
    with rc_context(STYLE):
        return canvas.png(pareto.draw(report))


def layers_png(report: Report) -> bytes:
    """Layer x projection: the scheme chosen, and the time it saves."""
    with rc_context(STYLE):
        return canvas.png(layers.draw(report))
