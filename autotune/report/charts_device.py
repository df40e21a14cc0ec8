"""The charts that say how the plan uses the device: layer x projection, roofline, bytes. Conventions as in `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.report import palette, words
from autotune.report.charts import Chart, axis, hover, layout, plain
from autotune.report.grid import Cell, Grid, grid
from autotune.report.words import Report

PHASES = {"prefill": "triangle-up", "decode": "circle"}


def heat_chart(report: Report) -> Chart:
    """Left: the scheme of every group. Right: the time it saves against dense."""
    shape = grid(report["groups"])
    unit, divisor = words.saving_unit(report)
    schemes = palette.ordered({cell.group["scheme"] for cell in shape.cells})
    most = max(words.most_saved_us(report), 1e-9)

    def saved(cell: Cell) -> float:
        return float(cell.group["dense_latency_us"] - cell.group["latency_us"])

    data = []
    for outer in (False, True):
        cells = [cell for cell in shape.cells if (cell.row >= shape.blocks) == outer]
        if not cells:
            continue
        left = [(cell, schemes.index(cell.group["scheme"]), palette.short(cell.group["scheme"])) for cell in cells]
        right = [(cell, saved(cell) / most, f"{saved(cell) / divisor:.3g}") for cell in cells]
        steps = {"zmin": -0.5, "zmax": len(schemes) - 0.5, "colorscale": _steps(schemes)}
        ramp = {
            "zmin": -1e-6,
            "zmax": 1,
            "colorscale": [[0, palette.SLOWER], *([max(s, 1e-6), c] for s, c in palette.SAVED)],
        }
        data += [_heat(shape, left, outer) | steps, _heat(shape, right, outer) | ramp | {"xaxis": "x2"}]
    ticks = {"tickvals": list(range(len(shape.columns))), "ticktext": [plain(name) for name in shape.columns]}
    shared = ticks | {"side": "top", "showgrid": False}
    rows = {"tickvals": list(range(len(shape.rows))), "ticktext": [plain(name) for name in shape.rows]}
    return {
        "data": data,
        "layout": layout(
            90 + 24 * max(4, len(shape.rows)),
            xaxis=axis("scheme", domain=[0, 0.49], **shared),
            xaxis2=axis(f"time saved, {unit} ({words.kernel_timing(report)})", domain=[0.51, 1], **shared),
            yaxis=axis("", range=[len(shape.rows) - 0.5, -0.5], showgrid=False, **rows),
        ),
    }


def _heat(shape: Grid, cells: Sequence[tuple[Cell, float, str]], outer: bool) -> Chart:
    """One panel's blocks, or its wide rows; edges, not centres, so that a single row or column has a size."""
    width = 1 if outer else len(shape.columns)
    first, last = (shape.blocks, len(shape.rows)) if outer else (0, shape.blocks)
    values: list[list[float | None]] = [[None] * width for _ in range(first, last)]
    texts = [[""] * width for _ in range(first, last)]
    said = [[""] * width for _ in range(first, last)]
    for cell, value, text in cells:
        group, row = cell.group, cell.row - first
        values[row][cell.column], texts[row][cell.column] = value, plain(text)
        times = f"{words.us(group['dense_latency_us'])} → {words.us(group['latency_us'])}"
        said[row][cell.column] = hover(group["name"], group["scheme"], times, words.line(group["why"], 90))
    columns = [-0.5, len(shape.columns) - 0.5] if outer else [i - 0.5 for i in range(width + 1)]
    return {
        "type": "heatmap",
        "x": columns,
        "y": [row - 0.5 for row in range(first, last + 1)],
        "z": values,
        "text": texts,
        "texttemplate": "%{text}",
        "hovertext": said,
        "hoverinfo": "text",
        "hoverongaps": False,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }


def _steps(schemes: Sequence[str]) -> list[list[Any]]:
    """A colour scale with one flat step a scheme."""
    count = len(schemes)
    return [[(i + end) / count, palette.colour(name)] for i, name in enumerate(schemes) for end in (0, 1)]


def roofline_chart(report: Report) -> Chart | None:
    """Arithmetic intensity against achieved rate, dense and chosen, with the device's ceilings."""
    rows = [(group, row) for group in report["groups"] for row in group["roofline"] if _shown(report, group, row)]
    if not rows:
        return None
    data = _ceilings(report, [row["ops"] / row["bytes"] for _, row in rows])
    for phase, symbol in PHASES.items():
        for scheme in palette.ordered({row["scheme"] for _, row in rows if row["phase"] == phase}):
            mine = [(group, row) for group, row in rows if row["phase"] == phase and row["scheme"] == scheme]
            data.append(_cloud(f"{phase}, {scheme}", symbol, scheme, mine, report["target"]["local"]))
    x_axis = axis("arithmetic intensity, operations per byte", type="log", dtick=1)
    y_axis = axis("achieved, GOP/s", type="log", dtick=1)
    legend = {"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"}
    return {"data": data, "layout": layout(500, xaxis=x_axis, yaxis=y_axis, legend=legend)}


def _shown(report: Report, group: dict[str, Any], row: dict[str, Any]) -> bool:
    wanted = row["scheme"] in (report["model"]["dtype"], group["scheme"])
    return bool(wanted and row["phase"] in PHASES and row["ops"] > 0 and row["bytes"] > 0 and _time_us(row) > 0)


def _time_us(row: dict[str, Any]) -> float:
    """Measured, or the ceiling's own time where the device is not at hand."""
    return float(row["measured_us"] or row["floor_us"] or 0.0)


def _cloud(
    name: str, symbol: str, scheme: str, rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], local: bool
) -> Chart:
    said = []
    for group, row in rows:
        timed = f"{'measured' if local and row['measured_us'] else 'estimated'} {words.us(_time_us(row))}"
        limit = f"floor {words.us(row['floor_us'])}, bound by {row['bound']}"
        speed = words.rate(row["ops"] / _time_us(row) / 1e3)
        head = f"{row['phase']} of {row['rows']} rows, {row['scheme']}"
        said.append(hover(group["name"], head, row["kernel"], timed, limit, speed))
    symbols = [symbol if local and row["measured_us"] else f"{symbol}-open" for _, row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name),
        "x": [row["ops"] / row["bytes"] for _, row in rows],
        "y": [row["ops"] / _time_us(row) / 1e3 for _, row in rows],
        "marker": {
            "color": palette.colour(scheme),
            "symbol": symbols,
            "size": 8,
            "line": {"width": 0.6, "color": "@page"},
        },
        "hovertext": said,
        "hoverinfo": "text",
    }


def _ceilings(report: Report, intensities: Sequence[float]) -> list[Chart]:
    """Slanted: read bandwidth from memory and from the fastest cache. Flat: multiply rates, one a number format."""
    ceilings = report["target"]["ceilings"]
    low, high = min(intensities) / 2, max(intensities) * 2
    curve = ceilings["read_gb_per_s"]
    slants = []
    if curve:
        slants.append((f"memory, {curve[-1][1]:,.0f} GB/s", curve[-1][1], "solid"))
        fastest = max(curve, key=lambda point: point[1])
        if fastest[1] > 1.2 * curve[-1][1]:
            slants.append((f"cache, {fastest[1]:,.0f} GB/s ({words.size(fastest[0])})", fastest[1], "dot"))
    peak = max(ceilings["tera_ops"].values(), default=0.0) * 1e3
    best = max((rate for _, rate, _ in slants), default=0.0)
    data = []
    for name, rate, dash in slants:
        end = min(high, peak / rate) if peak else high
        data.append(_line(name, [low, end], [low * rate, end * rate], dash))
    for name, tera in ceilings["tera_ops"].items():
        start = min(high / 2, tera * 1e3 / best) if best else low
        data.append(_line(f"{name}, {words.rate(tera * 1e3)}", [start, high], [tera * 1e3] * 2, "dash"))
    return data


def _line(name: str, xs: list[float], ys: list[float], dash: str) -> Chart:
    line = {"color": "@muted", "width": 1.5, "dash": dash}
    look = {"text": ["", plain(name)], "textposition": "top left", "textfont": {"color": "@muted", "size": 11.5}}
    base = {"type": "scatter", "mode": "lines+text", "hoverinfo": "skip", "showlegend": False}
    return base | look | {"x": xs, "y": ys, "line": line}


def bytes_chart(report: Report) -> Chart:
    """Where the weights' bytes are, dense and in the plan: one segment a role and scheme, the rest untouched."""
    dtype = report["model"]["dtype"]
    before = _parts(report, "dense_bytes", lambda group: dtype)
    after = _parts(report, "weight_bytes", lambda group: str(group["scheme"]))
    data = []
    for bar, parts, total in (("dense", before, report["dense"]), ("plan", after, report["plan"])):
        rest = total["weight_bytes"] - sum(parts.values())
        for (role, scheme), size in parts.items():
            data.append(_segment(bar, f"{role}, {palette.short(scheme)}", size, palette.colour(scheme)))
        if rest > 0:
            data.append(_segment(bar, "not in any group", rest, palette.KEPT))
    x_axis = axis("weights, MB")
    thin = {"l": 60, "r": 16, "t": 8, "b": 50}
    hide = {"mode": "hide", "minsize": 10}  # a segment too thin for its text says it on hover
    y_axis = axis("", categoryorder="array", categoryarray=["plan", "dense"], showgrid=False)
    return {
        "data": data,
        "layout": layout(
            200, barmode="stack", xaxis=x_axis, yaxis=y_axis, showlegend=False, uniformtext=hide, margin=thin
        ),
    }


def _parts(report: Report, key: str, scheme_of: Any) -> dict[tuple[str, str], int]:
    """Bytes by (role, scheme). A tied head that stays dense is the embedding, counted with the rest."""
    tied = report["model"]["tied_embeddings"]
    parts: dict[tuple[str, str], int] = {}
    for group in report["groups"]:
        if (
            tied
            and group["role"] == "lm_head"
            and (key == "dense_bytes" or group["scheme"] == report["model"]["dtype"])
        ):
            continue
        place = (str(group["role"]), scheme_of(group))
        parts[place] = parts.get(place, 0) + group[key]
    roles = list(dict.fromkeys(role for role, _ in parts))
    order = palette.ordered({scheme for _, scheme in parts})
    places = sorted(parts, key=lambda place: (roles.index(place[0]), order.index(place[1])))
    return {place: parts[place] for place in places}


def _segment(bar: str, text: str, size: float, colour: str) -> Chart:
    return {
        "type": "bar",
        "orientation": "h",
        "x": [size / 1e6],
        "y": [bar],
        "text": [plain(text)],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "marker": {"color": colour, "line": {"width": 1.5, "color": "@page"}},
        "textfont": {"color": palette.text_on(colour)},
        "hovertext": [hover(bar, text, words.size(size))],
        "hoverinfo": "text",
    }
