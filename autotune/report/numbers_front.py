"""The report's rows on the front: every point predicted, some measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.decide import weight_bytes
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
        "uniform": uniform_scheme(result, candidate),
        "predicted_latency_ms": candidate.latency_us / 1e3,
        "measured_latency_ms": asdict(run.latency_ms) if run else None,
        "kl_nats": kl,
        "loss": None if result.losses is None else dnll if result.session.spec.task == "encoder" else math.expm1(dnll),
        "weight_bytes": weight_bytes(result.problem, candidate.genotype),
        "pareto": pareto,
        "chosen": candidate.genotype == result.chosen.candidate.genotype,
        "finalist": bool(point and point.finalist),
        "certified": certificate.state if certificate else None,
    }


def uniform_scheme(result: Result, candidate: Candidate) -> str | None:
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
