"""The front as points to draw: what kind each is, where it goes, and what to say of it.

x is the workload's time in ms, measured where it was run, else predicted. y is the loss (`kl_nats`), or megabytes of
weights where no loss was measured (a bare config.json). Loss goes on a log axis whose lowest tick stands for zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autotune.report import palette, words
from autotune.report.words import Report

Kind = Literal["dense", "uniform", "chosen", "pareto", "other"]


@dataclass(frozen=True)
class Point:
    kind: Kind
    name: str
    scheme: str | None
    predicted_ms: float
    measured_ms: tuple[float, float, float] | None  # median, low, high
    on_front: bool
    y: float
    y_low: float
    y_high: float
    said: tuple[str, ...]  # lines for a hover label

    @property
    def x(self) -> float:
        return self.measured_ms[0] if self.measured_ms else self.predicted_ms

    @property
    def colour(self) -> str:
        if self.kind == "uniform" and self.scheme:
            return palette.colour(self.scheme)
        return {"dense": palette.MUTED, "chosen": palette.CHOSEN, "pareto": palette.INK}.get(self.kind, palette.OTHER)


def has_loss(report: Report) -> bool:
    return any(item["kl_nats"] for item in report["front"])


def points(report: Report) -> list[Point]:
    """Everything with a y, background first so that what matters is drawn on top."""
    with_loss = has_loss(report)
    items = [item for item in report["front"] if item["kl_nats"] or not with_loss]
    found = [_point(report, item, with_loss) for item in items]
    if not any(point.kind == "dense" for point in found):
        found.append(_dense(report, with_loss))
    order: tuple[Kind, ...] = ("other", "pareto", "uniform", "dense", "chosen")
    return sorted(found, key=lambda point: order.index(point.kind))


def loss_floor(shown: Sequence[Point]) -> float:
    """The decade that stands for zero, below every loss."""
    positive = [value for point in shown for value in (point.y, point.y_low) if value > 0]
    lowest = min(positive, default=1e-4)
    highest = max(positive, default=1e-4)
    return float(10.0 ** math.floor(math.log10(max(lowest, highest * 1e-5)) - 0.3))


def line(shown: Sequence[Point], floor: float) -> list[tuple[float, float]]:
    """The Pareto front as predicted, left to right."""
    return sorted((point.predicted_ms, max(point.y, floor)) for point in shown if point.on_front)


def y_axis(report: Report) -> str:
    return words.loss_axis(report) if has_loss(report) else "weights (MB); no loss was measured"


def _kind(report: Report, item: dict[str, Any]) -> Kind:
    if item["chosen"]:
        return "chosen"
    if item["uniform"] == report["model"]["dtype"] or item["name"] == "dense":
        return "dense"
    if item["uniform"]:
        return "uniform"
    return "pareto" if item["pareto"] else "other"


def _point(report: Report, item: dict[str, Any], with_loss: bool) -> Point:
    timed = item["measured_latency_ms"]
    loss = item["kl_nats"]
    megabytes = item["weight_bytes"] / 1e6
    y, low, high = (loss["mean"], loss["low"], loss["high"]) if with_loss else (megabytes, megabytes, megabytes)
    return Point(
        kind=_kind(report, item),
        name=str(item["name"]),
        scheme=item["uniform"],
        predicted_ms=item["predicted_latency_ms"],
        measured_ms=(timed["median"], timed["low"], timed["high"]) if timed else None,
        on_front=item["pareto"],
        y=y,
        y_low=low,
        y_high=high,
        said=_said(report, item),
    )


def _said(report: Report, item: dict[str, Any]) -> tuple[str, ...]:
    lines = [str(item["name"]) if item["name"] == item["source"] else f"{item['name']} ({item['source']})"]
    lines.append(f"predicted {words.ms(item['predicted_latency_ms'])}")
    if item["measured_latency_ms"]:
        lines.append(f"measured {words.interval_ms(item['measured_latency_ms'])}")
    if item["kl_nats"]:
        kl = item["kl_nats"]
        what = "squared error" if words.is_encoder(report) else "KL"
        lines.append(
            f"{what} {words.nats(kl['mean'])} ({words.between(words.nats(kl['low']), words.nats(kl['high']))})"
        )
    if item["loss"] is not None and not words.is_encoder(report):
        lines.append(f"perplexity {words.percent(item['loss'])} on the search documents")
    lines.append(f"weights {words.size(item['weight_bytes'])}")
    if item["certified"]:
        lines.append(words.STATES[item["certified"]].lower())
    return tuple(lines)


def _dense(report: Report, with_loss: bool) -> Point:
    """The dense model where the search did not list it."""
    latency, timed = words.dense_ms(report), report["dense"]["latency_ms"]
    y = 0.0 if with_loss else report["dense"]["weight_bytes"] / 1e6
    said = ("dense", f"{words.ms(latency)}", f"weights {words.size(report['dense']['weight_bytes'])}")
    interval = (timed["median"], timed["low"], timed["high"]) if timed else None
    return Point("dense", "dense", report["model"]["dtype"], latency, interval, False, y, y, y, said)
