"""The page's interactive charts as plotly JSON: a dict of `data` and `layout`, ready to be themed by the page.

Colours written "@ink", "@muted" and so on are filled in by the page for light or dark. Every text from the
report passes `plain`, because plotly reads a little HTML in labels; hovers use `hovertext`, never templates of it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from autotune.report import front, palette, words
from autotune.report.front import Point
from autotune.report.grid import grid
from autotune.report.words import Report

Chart = dict[str, Any]
SYMBOLS = {"dense": "diamond", "uniform": "square", "chosen": "star", "pareto": "circle", "other": "circle"}
MARKS = {"dense": 13, "uniform": 11, "chosen": 20, "pareto": 9, "other": 7}
NAMES = {
    "dense": "dense",
    "uniform": "one scheme everywhere",
    "chosen": "chosen plan",
    "pareto": "Pareto front of the search",
    "other": "other candidates",
}


def plain(text: object) -> str:
    return html.escape(str(text), quote=False)


def hover(*lines: object) -> str:
    return "<br>".join(plain(line) for line in lines)


def axis(title: str, **more: Any) -> dict[str, Any]:
    base = {
        "title": {"text": title, "font": {"size": 13}},
        "gridcolor": "@grid",
        "linecolor": "@grid",
        "zeroline": False,
    }
    return base | {"automargin": True, "ticks": ""} | more


def layout(height: int, **more: Any) -> dict[str, Any]:
    base = {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 40, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12.5, "color": "@ink"},
        "hoverlabel": {"align": "left", "bgcolor": "@page", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@ink"},
    }
    return base | more


def front_chart(report: Report) -> Chart:
    """Hollow marks are predicted, filled ones measured."""
    shown = front.points(report)
    floor = front.loss_floor(shown) if front.has_loss(report) else 0.0
    line = front.line(shown, floor)
    data: list[Chart] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _ in line],
            "y": [y for _, y in line],
            "line": {"color": "@muted", "width": 1.5},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    for kind in ("other", "pareto", "uniform", "dense", "chosen"):
        members = [point for point in shown if point.kind == kind]
        data += [_front_trace(members, floor)] if members else []
    how = "filled: measured, hollow: predicted" if words.measured(report) else words.timing(report)
    x_axis = axis(f"time of one workload, ms ({how})")
    y_axis = axis(front.y_axis(report), **(_log_axis(shown, floor) if floor else {"rangemode": "tozero"}))
    return {"data": data, "layout": layout(540, xaxis=x_axis, yaxis=y_axis, **_notes(report, shown, floor))}


def _front_trace(members: Sequence[Point], floor: float) -> Chart:
    kind = members[0].kind
    themed = {"pareto": "@ink", "other": "@faint", "chosen": "@chosen", "dense": "@muted"}
    colours = [themed.get(kind, point.colour) for point in members]
    symbols = [SYMBOLS[kind] + ("" if point.measured_ms else "-open") for point in members]
    ys = [max(point.y, floor) for point in members]
    trace: Chart = {
        "type": "scatter",
        "name": NAMES[kind],
        "mode": "markers+text" if kind in ("uniform", "dense") else "markers",
        "x": [point.x for point in members],
        "y": ys,
        "marker": {"color": colours, "symbol": symbols, "size": MARKS[kind], "line": {"width": 1.6, "color": colours}},
        "text": [
            "dense" if kind == "dense" else f" {plain(palette.short(point.scheme or point.name))}" for point in members
        ],
        "textposition": "top center" if kind == "dense" else "top right",
        "cliponaxis": False,
        "hovertext": [hover(*point.said) for point in members],
        "hoverinfo": "text",
    }
    if kind != "other":
        quiet = {"type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": "@muted"}
        up = [max(point.y_high, y) - y for point, y in zip(members, ys, strict=True)]
        down = [y - max(min(point.y_low, y), floor) for point, y in zip(members, ys, strict=True)]
        timed = [point.measured_ms or (point.x, point.x, point.x) for point in members]
        trace["error_y"] = quiet | {"array": up, "arrayminus": down}
        trace["error_x"] = quiet | {"array": [t[2] - t[0] for t in timed], "arrayminus": [t[0] - t[1] for t in timed]}
    return trace


def _log_axis(shown: Sequence[Point], floor: float) -> dict[str, Any]:
    """Decades as ticks, the lowest one written 0."""
    highest = max(max(point.y, point.y_high) for point in shown)
    ticks, tick = [floor], floor * 10
    while tick <= max(highest, floor * 10):
        ticks.append(tick)
        tick *= 10
    return {"type": "log", "tickvals": ticks, "ticktext": ["0", *(f"{value:.3g}" for value in ticks[1:])]}


def _notes(report: Report, shown: Sequence[Point], floor: float) -> dict[str, Any]:
    """What the chosen plan gains, and the budget's line. Annotations on a log axis are placed by exponent."""
    notes = []
    for point in (point for point in shown if point.kind == "chosen"):
        y = math.log10(max(point.y, floor)) if floor else point.y
        text = hover(f"{words.ms(words.plan_ms(report))}, {words.speedup_text(report)}", words.loss(report))
        place = {"x": point.x, "y": y, "ax": 24, "ay": -64, "xanchor": "left", "arrowcolor": "@chosen", "arrowhead": 0}
        look = {"font": {"color": "@chosen", "size": 13.5}, "bgcolor": "@page", "align": "left", "opacity": 0.92}
        notes.append(place | look | {"text": text, "standoff": 10, "arrowwidth": 1})
    limit = report["budget"]["limit_nats"]
    if not floor or not limit:
        return {"annotations": notes}
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": math.log10(limit), "yanchor": "bottom"}
    text = plain(f"budget: {words.loss_limit(report)}")
    notes.append(place | {"text": text, "showarrow": False, "font": {"color": "@chosen"}})
    look = {"line": {"color": "@chosen", "width": 1.5, "dash": "dash"}}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit}
    return {"shapes": [line | look], "annotations": notes}


def sensitivity_reference(report: Report) -> str | None:
    """The scheme the sensitivity bars compare groups under: known for most groups, then the most damaging."""
    known: dict[str, list[float]] = {}
    for group in report["groups"]:
        for option in group["options"]:
            if option["loss_nats"] is not None and option["scheme"] != report["model"]["dtype"]:
                known.setdefault(option["scheme"], []).append(option["loss_nats"])
    return max(known, key=lambda name: (len(known[name]), sum(known[name])), default=None)


def sensitivity_chart(report: Report) -> Chart | None:
    """Loss if only this group were compressed by the reference scheme; the colour is what the plan gave it."""
    reference = sensitivity_reference(report)
    if reference is None:
        return None
    rows = [
        (option["loss_nats"], cell, option)
        for cell in grid(report["groups"]).cells
        for option in cell.group["options"]
        if option["scheme"] == reference and option["loss_nats"] is not None
    ]
    rows.sort(key=lambda row: -row[0])
    positive = [loss for loss, _, _ in rows if loss > 0]
    floor = min(positive, default=1e-9) / 3
    data = []
    for scheme in palette.ordered({cell.group["scheme"] for _, cell, _ in rows}):
        mine = [row for row in rows if row[1].group["scheme"] == scheme]
        data.append(_bars(scheme, mine, floor, whiskers=len(rows) <= 120))
    order = [plain(cell.label) for _, cell, _ in rows]
    x_axis = axis(
        "", type="category", categoryorder="array", categoryarray=order, showticklabels=len(rows) <= 60, showgrid=False
    )
    y_axis = axis(f"loss under {plain(reference)} alone (nats, log)", type="log", exponentformat="power", dtick=1)
    return {"data": data, "layout": layout(400, xaxis=x_axis, yaxis=y_axis, bargap=0.25)}


def _bars(scheme: str, rows: Sequence[tuple[float, Any, dict[str, Any]]], floor: float, whiskers: bool) -> Chart:
    heights = [max(loss, floor) for loss, _, _ in rows]
    high = [max((option["high_nats"] or loss) - y, 0) for (loss, _, option), y in zip(rows, heights, strict=True)]
    low = [y - max(option["low_nats"] or y, floor) for (_, _, option), y in zip(rows, heights, strict=True)]
    said = [
        hover(cell.group["name"], f"{option['scheme']} alone: {words.nats(loss)} nats", f"given: {scheme}")
        for loss, cell, option in rows
    ]
    return {
        "type": "bar",
        "name": plain(f"given {scheme}"),
        "x": [plain(cell.label) for _, cell, _ in rows],
        "y": heights,
        "marker": {"color": palette.colour(scheme)},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": high,
            "arrayminus": low,
            "color": "@muted",
            "width": 0,
            "visible": whiskers,
        },
        "hovertext": said,
        "hoverinfo": "text",
    }


def saving_chart(report: Report) -> Chart | None:
    """Predicted against measured time saved; on the line the prediction is right."""
    if not report["prediction"] or not report["prediction"]["points"]:
        return None
    points = report["prediction"]["points"]
    middle = [point["measured_saving_ms"]["median"] for point in points]
    high = [point["measured_saving_ms"]["high"] - y for point, y in zip(points, middle, strict=True)]
    low = [y - point["measured_saving_ms"]["low"] for point, y in zip(points, middle, strict=True)]
    ends = [*middle, *(point[key] for point in points for key in ("predicted_saving_ms", "search_saving_ms")), 0.0]
    pad = 0.06 * ((max(ends) - min(ends)) or 1.0)
    span = [min(ends) - pad, max(ends) + pad]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": span,
        "y": span,
        "name": "measured = predicted",
        "hoverinfo": "skip",
    }
    dots = {
        "type": "scatter",
        "mode": "markers+text",
        "name": "configurations run end to end",
        "x": [point["predicted_saving_ms"] for point in points],
        "y": middle,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": high,
            "arrayminus": low,
            "color": "@muted",
            "width": 0,
        },
        "marker": {"color": [_named_colour(point["name"]) for point in points], "size": 11},
        "text": [plain(words.line(point["name"].removeprefix("uniform "), 22)) for point in points],
        "textposition": ["top left" if p["predicted_saving_ms"] > sum(span) / 2 else "bottom right" for p in points],
        "hovertext": [
            hover(p["name"], f"predicted {words.ms(p['predicted_saving_ms'])}", f"measured {words.ms(y)}")
            for p, y in zip(points, middle, strict=True)
        ],
        "hoverinfo": "text",
    }
    before = {
        "type": "scatter",
        "mode": "markers",
        "name": "as the search believed before",
        "x": [point["search_saving_ms"] for point in points],
        "y": middle,
        "marker": {"color": "@muted", "size": 9, "symbol": "circle-open"},
        "hovertext": [hover(p["name"], f"the search believed {words.ms(p['search_saving_ms'])}") for p in points],
        "hoverinfo": "text",
    }
    axes = {"xaxis": axis("predicted saving, ms", range=span), "yaxis": axis("measured saving, ms", range=span)}
    return {"data": [line | {"line": {"color": "@muted", "dash": "dash"}}, before, dots], "layout": layout(440, **axes)}


def _named_colour(name: str) -> str:
    scheme = name.removeprefix("uniform ")
    return palette.colour(scheme) if scheme in palette.COLOURS else "@chosen" if name == "plan" else "@ink"
