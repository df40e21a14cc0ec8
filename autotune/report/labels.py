"""Puts text beside points without overlaps: each label takes the cheapest of some spots around its point.

Greedy in the order given, so the labels that matter come first. Works on drawn sizes in pixels, matplotlib only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

RINGS = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 110.0)  # distances from the point, in points
HARD, SOFT, FAR = 20.0, 1.0, 8.0  # cost of a pixel covered, of one of the background, of a point of distance
ANGLES = (0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 245, 295)  # right, left, above, below, then between


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    colour: str
    size: float = 9.5
    bold: bool = False


def place(
    axes: Axes,
    labels: Sequence[Label],
    points: Sequence[tuple[float, float]],
    background: Sequence[tuple[float, float]],
    taken: Sequence[Bbox],
) -> None:
    """Annotate every label clear of `points` (data units), `taken` (pixels) and the other labels.

    `background` points are avoided too, but a label that would have to go far may cover them.
    """
    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    busy = [(box, HARD) for box in taken]
    for spots, cost in ((points, HARD), (background, SOFT)):
        busy += [(_around(axes.transData.transform(spot), 5 * scale), cost) for spot in spots]
    frame = axes.get_window_extent(renderer)
    for label in labels:
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            color=label.colour,
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            linespacing=1.25,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            zorder=3.5,
        )
        box = note.get_window_extent(renderer)
        anchor = axes.transData.transform((label.x, label.y))
        spot, angle, ring = _best(anchor, box.width, box.height, busy, frame, scale)
        busy.append((spot, HARD))
        note.set_position(((spot.x0 - anchor[0]) / scale, (spot.y0 - anchor[1]) / scale))
        if ring > RINGS[1]:
            _leader(axes, label, angle, ring)


def _best(
    anchor: Any, width: float, height: float, busy: Sequence[tuple[Bbox, float]], frame: Bbox, scale: float
) -> tuple[Bbox, int, float]:
    """The cheapest spot: covered pixels cost what they cost, distance a little, the outside of the axes a lot."""
    cheapest, found = math.inf, (Bbox.null(), 0, 0.0)
    for ring in RINGS:
        for angle in ANGLES:
            box = _beside(anchor, width, height, math.radians(angle), ring * scale)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            cost = sum(price * _overlap(box, other) for other, price in busy) + FAR * ring
            cost += 0.0 if inside else HARD * width * height
            if cost < cheapest:
                cheapest, found = cost, (box, angle, ring)
    return found


def _beside(anchor: Any, width: float, height: float, angle: float, distance: float) -> Bbox:
    """A box whose side that faces the anchor is `distance` away in the direction `angle`."""
    x = anchor[0] + distance * math.cos(angle) + (math.cos(angle) - 1) / 2 * width
    y = anchor[1] + distance * math.sin(angle) + (math.sin(angle) - 1) / 2 * height
    return Bbox.from_bounds(x, y, width, height)


def _leader(axes: Axes, label: Label, angle: int, ring: float) -> None:
    """A hairline from the point to a label that had to go far."""
    direction = math.radians(angle)
    axes.annotate(
        "",
        (label.x, label.y),
        xytext=(ring * math.cos(direction), ring * math.sin(direction)),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
        zorder=2,
    )


def _around(centre: Any, reach: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - reach, centre[1] - reach, 2 * reach, 2 * reach)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0.0, width) * max(0.0, height))
