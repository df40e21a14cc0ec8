"""`layers.png`: what every layer group got (one colour per scheme) and the time it saves against dense.

Rows are blocks, columns projections; groups outside of blocks (lm_head) have a wide row of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from autotune.report import canvas, palette, words
from autotune.report.grid import Cell, Grid, grid
from autotune.report.words import Report

SAVED = LinearSegmentedColormap.from_list("saved", palette.SAVED)
Fill = Callable[[dict[str, Any]], tuple[str, str]]  # group -> (colour, text)


def draw(report: Report) -> Figure:
    shape = grid(report["groups"])
    row = 0.36 if len(shape.rows) <= 24 else 0.25 if len(shape.rows) <= 48 else 0.19
    body = max(1.1, row * len(shape.rows))
    legend_rows = math.ceil(len(report["schemes"]) / 5)
    top, bottom = 1.35, 0.22 + 0.3 * legend_rows
    height = top + body + bottom
    figure = canvas.figure(height)
    sides = [(canvas.LEFT, 0.442), (0.54, 0.445)]  # (left, width)
    fills = (_scheme, _saving(report))
    titles = ("scheme", f"time saved per workload ({words.saving_unit(report)[0]}, {words.kernel_timing(report)})")
    for (left, width), fill, title in zip(sides, fills, titles, strict=True):
        axes = figure.add_axes((left, bottom / height, width, body / height))
        _panel(axes, shape, fill, title, body / len(shape.rows))
        if axes is not figure.axes[0]:
            axes.set_yticks([])  # the rows are the same as on the left
    _title(figure, report, height)
    _legend(figure, report)
    return figure


def _panel(axes: Axes, shape: Grid, fill: Fill, title: str, row_inches: float) -> None:
    axes.set_xlim(0, len(shape.columns))
    gap = 0.25 if 0 < shape.blocks < len(shape.rows) else 0.0
    axes.set_ylim(len(shape.rows) + gap, 0)
    column_inches = axes.get_position().width * canvas.WIDTH / len(shape.columns)
    inner = [fill(cell.group)[1] for cell in shape.cells if cell.row < shape.blocks] or [""]
    size, broken = _text_size(inner, column_inches, row_inches)
    for cell in shape.cells:
        top = cell.row + (gap if cell.row >= shape.blocks else 0.0)
        _cell(axes, cell, top, fill, size, broken and cell.row < shape.blocks)
    centres = [row + 0.5 + (gap if row >= shape.blocks else 0.0) for row in range(len(shape.rows))]
    height = min(10.0, row_inches * 72 * 0.62)
    axes.set_yticks(centres, [words.line(name, 12) for name in shape.rows], fontsize=height)
    names = [words.line(name, 14) for name in shape.columns]
    width = min(10.0, column_inches * 72 / max(map(len, names)) / 0.66)
    axes.set_xticks([i + 0.5 for i in range(len(names))], names if width >= 5 else [""] * len(names), fontsize=width)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=palette.MUTED)
    axes.set_title(title, fontsize=11, color=palette.INK, loc="left", pad=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text_size(texts: Sequence[str], column_inches: float, row_inches: float) -> tuple[float, bool]:
    """One size for all cells, in points, and whether `int4-g128` is broken in two lines to fit; 0: no text fits."""
    for broken in (False, True):
        longest = max(len(line) for text in texts for line in _lines(text, broken).split("\n"))
        width, height = column_inches * 72 / max(1, longest) / 0.66, row_inches * 72 * 0.55 / (1.7 if broken else 1)
        size = min(9.5, width, height)
        if size >= 5.5:
            return size, broken
    return 0.0, False


def _lines(text: str, broken: bool) -> str:
    return text.replace("-", "\n", 1) if broken and not text.startswith("-") else text


def _cell(axes: Axes, cell: Cell, top: float, fill: Fill, size: float, broken: bool) -> None:
    background, text = fill(cell.group)
    box = Rectangle((cell.column, top), cell.span, 1, facecolor=background, edgecolor="white", linewidth=1.4)
    axes.add_patch(box)
    if size:
        middle = (cell.column + cell.span / 2, top + 0.52)
        look: dict[str, Any] = {
            "ha": "center",
            "va": "center_baseline",
            "fontsize": size,
            "color": palette.text_on(background),
        }
        axes.text(*middle, _lines(text, broken), linespacing=1.1, **look)


def _scheme(group: dict[str, Any]) -> tuple[str, str]:
    return palette.colour(group["scheme"]), palette.short(group["scheme"])


def _saving(report: Report) -> Fill:
    _, divisor = words.saving_unit(report)
    most = max(words.most_saved_us(report), 1e-9)

    def fill(group: dict[str, Any]) -> tuple[str, str]:
        saved_us = group["dense_latency_us"] - group["latency_us"]
        if saved_us < 0:
            return palette.SLOWER, f"{saved_us / divisor:.3g}"
        return to_hex(SAVED(saved_us / most)), f"{saved_us / divisor:.3g}" if saved_us else "0"

    return fill


def _title(figure: Figure, report: Report, height: float) -> None:
    head = f"{report['model']['name']} on {report['target']['name']}, layer by layer"
    canvas.title(figure, 1 - 0.38 / height, head)
    gains = f"{words.ms(words.dense_ms(report))} → {words.ms(words.plan_ms(report))} {words.timing(report)}"
    sizes = f"weights {words.size(report['dense']['weight_bytes'])} → {words.size(report['plan']['weight_bytes'])}"
    figure.text(canvas.LEFT, 1 - 0.66 / height, f"{gains};  {sizes}", fontsize=10.5, color=palette.MUTED)


def _legend(figure: Figure, report: Report) -> None:
    schemes = palette.ordered(set(report["schemes"]))
    handles = [
        Patch(facecolor=palette.colour(n), label=words.many(report["schemes"][n], words.line(n, 24))) for n in schemes
    ]
    if not handles:
        return
    legend = figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(canvas.LEFT - 0.007, 0.0),
        ncols=min(5, len(handles)),
        fontsize=9.5,
        frameon=False,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.8,
    )
    for text in legend.get_texts():
        text.set_color(palette.INK)
