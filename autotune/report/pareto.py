"""`pareto.png`: latency against loss. Hollow marks are predicted, filled ones measured, with 95% intervals.

Uniform baselines are squares in their scheme's colour, the front a dark line, everything else the search saw grey, the
chosen plan a star with what it gains. Dense sits at the tick "0".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

from autotune.report import canvas, front, labels, palette, words
from autotune.report.front import Point
from autotune.report.words import Report

SHAPES = {"dense": "D", "uniform": "s", "chosen": "*", "pareto": "o", "other": "o"}
SIZES = {"dense": 62, "uniform": 58, "chosen": 330, "pareto": 40, "other": 24}


def draw(report: Report) -> Figure:
    figure = canvas.figure(6.4)
    axes = figure.add_axes((canvas.LEFT, 0.1, 0.89, 0.72))
    shown = front.points(report)
    floor = front.loss_floor(shown) if front.has_loss(report) else 0.0
    _scales(axes, shown, floor)
    _title(figure, report)
    _marks(axes, shown, floor)
    _axis_names(axes, report)
    _legend(axes, shown)
    taken = [*_budget(axes, report, floor), *_stamp(axes, report)]
    figure.canvas.draw()
    others = [(point.x, max(point.y, floor)) for point in shown if point.kind == "other"]
    labels.place(axes, _labels(report, shown, floor), _inked(shown, floor), others, taken)
    return figure


def _scales(axes: Axes, shown: Sequence[Point], floor: float) -> None:
    xs = [value for point in shown for value in (point.predicted_ms, *(point.measured_ms or ()))]
    margin = 0.06 * ((max(xs) - min(xs)) or max(xs))
    axes.set_xlim(min(xs) - margin, max(xs) + 1.6 * margin)
    if floor:
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.6, max(floor * 100, *(max(point.y, point.y_high) * 2.5 for point in shown)))
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value <= floor * 1.01 else f"{value:g}"))
    else:
        ys = [point.y for point in shown]
        axes.set_ylim(0, max(ys) * 1.12)
    axes.grid(True, color=palette.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.OTHER)
    axes.tick_params(colors=palette.MUTED, labelsize=10, length=0)


def _title(figure: Figure, report: Report) -> None:
    canvas.title(figure, 0.94, f"{report['model']['name']} on {report['target']['name']}")
    figure.text(canvas.LEFT, 0.9, words.line(words.workload(report), 110), fontsize=10.5, color=palette.MUTED)


def _axis_names(axes: Axes, report: Report) -> None:
    how = "measured where filled, predicted where hollow" if words.measured(report) else words.timing(report)
    axes.set_xlabel(f"time of one workload (ms), {how}", fontsize=10.5, color=palette.INK, labelpad=7)
    axes.set_ylabel(front.y_axis(report), fontsize=10.5, color=palette.INK, labelpad=7)


def _marks(axes: Axes, shown: Sequence[Point], floor: float) -> None:
    line = front.line(shown, floor)
    axes.plot([x for x, _ in line], [y for _, y in line], color=palette.INK, linewidth=1.3, alpha=0.75, zorder=2)
    for point in shown:
        y = max(point.y, floor)
        if point.y_high > point.y_low and point.kind != "other":
            axes.vlines(point.x, max(point.y_low, floor), point.y_high, color=point.colour, linewidth=1.1, zorder=3)
        if point.measured_ms is None:
            _scatter(axes, point, point.predicted_ms, y, filled=False)
            continue
        _, low, high = point.measured_ms
        axes.hlines(y, low, high, color=point.colour, linewidth=1.6, zorder=3)
        axes.hlines(y, point.predicted_ms, point.x, color=point.colour, linewidth=0.9, linestyle=":", zorder=2)
        if point.kind != "chosen":
            _scatter(axes, point, point.predicted_ms, y, filled=False)
        _scatter(axes, point, point.x, y, filled=True)


def _inked(shown: Sequence[Point], floor: float) -> list[tuple[float, float]]:
    """Where marks, intervals and the front's line are, as points that labels keep clear of."""
    spots = []
    for point in (point for point in shown if point.kind != "other"):
        y = max(point.y, floor)
        _, low, high = point.measured_ms or (point.x, point.x, point.x)
        spots += [(x, y) for x in (point.predicted_ms, point.x, *(low + (high - low) * i / 8 for i in range(9)))]
        spots += [(point.x, max(point.y_low, floor)), (point.x, max(point.y_high, floor))]
    line = front.line(shown, floor)
    for (x0, y0), (x1, y1) in pairwise(line):
        for share in (0.2, 0.4, 0.6, 0.8):
            y = y0 ** (1 - share) * y1**share if floor else y0 + share * (y1 - y0)
            spots.append((x0 + share * (x1 - x0), y))
    return spots


def _scatter(axes: Axes, point: Point, x: float, y: float, filled: bool) -> None:
    axes.scatter(
        [x],
        [y],
        marker=SHAPES[point.kind],
        s=SIZES[point.kind],
        facecolor=point.colour if filled else "white",
        edgecolor=point.colour,
        linewidth=1.6 if point.kind != "other" else 1.0,
        zorder={"chosen": 8, "other": 2.5}.get(point.kind, 4 + filled),
        clip_on=False,
    )


def _budget(axes: Axes, report: Report, floor: float) -> list[Any]:
    """The line a plan must stay under, where a loss budget and a loss axis exist."""
    limit = report["budget"]["limit_nats"]
    if not floor or not limit:
        return []
    axes.axhline(limit, color=palette.CHOSEN, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, limit * 3))
    note = axes.annotate(
        f"budget: {words.loss_limit(report)}",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=palette.CHOSEN,
    )
    left, right = axes.get_xlim()
    (x0, y), (x1, _) = axes.transData.transform([(left, limit), (right, limit)])
    return [note.get_window_extent(), Bbox.from_extents(x0, y - 2, x1, y + 2)]


def _stamp(axes: Axes, report: Report) -> list[Any]:
    """Says across the picture that nothing in it was timed."""
    how = words.timing(report)
    if how == "measured":
        return []
    target = words.line(report["target"]["name"], 30)
    detail = f"no time was measured on {target}" if how == "estimated" else "not run end to end"
    box = {"boxstyle": "round,pad=0.45", "facecolor": "#fff4d6", "edgecolor": "#d9a400", "linewidth": 1}
    text = f"{how.upper()}: {detail}"
    note = axes.text(0.993, 1.14, text, transform=axes.transAxes, ha="right", fontsize=10, color="#7a5600", bbox=box)
    return [note.get_window_extent()]


def _labels(report: Report, shown: Sequence[Point], floor: float) -> list[labels.Label]:
    said = []
    for point in reversed(shown):
        y = max(point.y, floor)
        if point.kind == "chosen":
            gain = f"chosen: {words.ms(words.plan_ms(report))}, {words.speedup_text(report)}"
            text = f"{gain}\n{words.loss(report)}"
            said.append(labels.Label(point.x, y, text, palette.CHOSEN, 10.5, True))
        elif point.kind == "dense":
            said.append(labels.Label(point.x, y, f"dense: {words.ms(point.x)}", palette.INK, 10))
        elif point.kind == "uniform" and point.scheme:
            said.append(labels.Label(point.x, y, palette.short(point.scheme), _dark(point.colour)))
    return said


def _legend(axes: Axes, shown: Sequence[Point]) -> None:
    kinds = {point.kind for point in shown}
    rows = {
        "pareto": ("o", palette.INK, "Pareto front of the search"),
        "uniform": ("s", palette.MUTED, "one scheme everywhere"),
        "other": ("o", palette.OTHER, "other candidates"),
    }
    handles = [
        Line2D(
            [],
            [],
            marker=shape,
            color=colour,
            markerfacecolor="white",
            linestyle="-" if kind == "pareto" else "",
            label=text,
        )
        for kind, (shape, colour, text) in rows.items()
        if kind in kinds
    ]
    if not handles:
        return
    legend = axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        ncols=len(handles),
        fontsize=9.5,
        frameon=False,
        columnspacing=2.0,
    )
    for text in legend.get_texts():
        text.set_color(palette.INK)


def _dark(colour: str) -> str:
    """The colour, darkened until it is readable as text on white."""
    channels = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    while palette.luminance(colour) > 0.18:
        channels = [int(channel * 0.9) for channel in channels]
        colour = "#" + "".join(f"{channel:02x}" for channel in channels)
    return colour
