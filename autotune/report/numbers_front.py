"""The report's rows on the front: every point predicted, some measured, and how well prediction held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from autotune.decide import configuration
from autotune.finalists import Point
from autotune.search.problem import Candidate

if TYPE_CHECKING:
    from autotune.result import Result


def front_rows(result: Result) -> list[dict[str, Any]]:
    assert result.front is not None
    points = {point.candidate.genotype: point for point in result.points}
    front = result.front
    kept = [front.candidates[index] for index in front.pareto]
    kept += [point.candidate for point in result.points]
    kept += [c for c in front.candidates if not c.source.startswith(("study", "refine"))]
    unique = {candidate.genotype: candidate for candidate in kept}
    pareto = {front.candidates[index].genotype for index in front.pareto}
    rows = [_front_row(result, c, points.get(c.genotype), c.genotype in pareto) for c in unique.values()]
    return sorted(rows, key=lambda row: row["predicted_latency_ms"])


def _front_row(result: Result, candidate: Candidate, point: Point | None, pareto: bool) -> dict[str, Any]:
    assert result.problem and result.chosen
    kl = _mean_interval(candidate.evaluation.kl, candidate.evaluation.tokens) if result.losses else None
    dnll = candidate.evaluation.dnll_nats
    certificate = (result.certificates or {}).get(point.name) if point else None
    run = result.end_to_end.of(point.name) if point and result.end_to_end else None
    dense = candidate.genotype == result.problem.dense
    name = point.name if point else "dense" if dense else candidate.source
    if dense and result.end_to_end:
        run = result.end_to_end.of("dense")
    return {
        "name": name,
        "source": candidate.source,
        "uniform": _uniform(result, candidate),
        "predicted_latency_ms": candidate.latency_us / 1e3,
        "measured_latency_ms": asdict(run.latency_ms) if run else None,
        "kl_nats": kl,
        "loss": None if result.losses is None else dnll if result.session.spec.task == "encoder" else math.expm1(dnll),
        "weight_bytes": candidate.weight_bytes,
        "pareto": pareto,
        "chosen": candidate.genotype == result.chosen.candidate.genotype,
        "finalist": bool(point and point.finalist),
        "certified": certificate.state if certificate else None,
    }


def _uniform(result: Result, candidate: Candidate) -> str | None:
    """The scheme's name when this is "that scheme wherever a group offers it"."""
    assert result.problem is not None
    names = {option.scheme for option in result.problem.chosen(candidate.genotype)} - {result.session.spec.dtype}
    if not names:
        return result.session.spec.dtype
    name = next(iter(names))
    return name if len(names) == 1 and result.problem.uniform(name) == candidate.genotype else None


def _mean_interval(sums: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Ratio estimate with a 95% interval over documents."""
    values, weights = np.asarray(sums, float), np.asarray(tokens, float)
    mean = values.sum() / weights.sum()
    residual = values - mean * weights
    error = math.sqrt((residual**2).sum() * len(values) / max(1, len(values) - 1)) / weights.sum()
    return {"mean": float(mean), "low": float(max(0.0, mean - 1.96 * error)), "high": float(mean + 1.96 * error)}


def prediction(result: Result) -> dict[str, Any] | None:
    """Predicted against measured saving over dense, the only fair test: a constant makes totals easy.

    The latency model is fitted to the uniform configurations of the very run that measured the points, so that drift of
    the machine between two runs is not taken for its error; uniform points are left out, as they were fitted.
    """
    if result.end_to_end is None or result.refit is None or result.problem is None:
        return None
    session = result.session
    points = []
    for point in result.points:
        if point.name == "dense" or _uniform(result, point.candidate):
            continue
        chosen = configuration(result.problem, point.candidate.genotype)
        saving_us = result.refit.saving_us(result.table, session.spec, chosen, session.workload)
        measured = asdict(result.end_to_end.saving_ms(point.name))
        points.append({"name": point.name, "predicted_saving_ms": saving_us / 1e3, "measured_saving_ms": measured})
    return {"points": points, **judge_prediction(points, result.end_to_end.noisy)}


def judge_prediction(points: Sequence[Mapping[str, Any]], noisy: str) -> dict[str, Any]:
    """Median relative error of the saving, rank correlation, and a verdict in words.

    Ranks are compared among points that the measurement can tell apart: many good configurations lie closer together
    than its own interval, and their order would be the order of noise.
    """
    if len(points) < 3:
        return {"median_error": None, "spearman": None, "verdict": "too few points to judge"}
    errors = [
        abs(p["predicted_saving_ms"] - p["measured_saving_ms"]["median"])
        / max(abs(p["measured_saving_ms"]["median"]), 1e-9)
        for p in points
    ]
    error = float(np.median(errors))
    apart = _apart(points)
    predicted = [point["predicted_saving_ms"] for point in apart]
    measured = [point["measured_saving_ms"]["median"] for point in apart]
    distinct = len(apart) > 2 and len(set(measured)) > 1
    spearman = float(stats.spearmanr(predicted, measured).statistic) if distinct else None
    if error <= 0.15 and spearman is None:
        verdict = "predicted savings hold; the points lie too close together to rank"
    elif error <= 0.15 and spearman is not None and spearman >= 0.9:
        verdict = "predicted savings hold"
    else:
        verdict = noisy or "predicted savings are off: trust the measured ones"
    return {"median_error": error, "spearman": spearman, "verdict": verdict}


def _apart(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Points whose predicted savings differ by at least the median half-width of the measured intervals."""
    intervals = [point["measured_saving_ms"] for point in points]
    resolution = float(np.median([(item["high"] - item["low"]) / 2 for item in intervals]))
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda item: float(item["predicted_saving_ms"])):
        if not kept or point["predicted_saving_ms"] - kept[-1]["predicted_saving_ms"] >= resolution:
            kept.append(point)
    return kept
