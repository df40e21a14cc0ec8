"""How well predictions held: predicted against measured saving over dense, the only fair test (a constant makes totals
easy).

Two predictions of the same points. The *fitted* one has its factors from the uniform configurations of the very run
that measured the points: it tells whether the latency model is right. The *search's* was made before, by the run's
calibration: what it misses beyond that, the machine changed in between, and the uniform configurations, which ran both
times, say by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from autotune.decide import configuration
from autotune.kernels.kv_formats import format_of
from autotune.report.numbers_front import uniform_scheme

if TYPE_CHECKING:
    from autotune.result import Result
    from autotune.verify import EndToEnd

MOST_ERROR, LEAST_RANK = 0.15, 0.9


def prediction(result: Result) -> dict[str, Any] | None:
    """Points that no fit has seen (uniform ones are left out), errors and rank correlations, drift, and a verdict."""
    if not (result.end_to_end and result.refit and result.calibration and result.problem):
        return None
    session, problem = result.session, result.problem
    points = []
    for point in result.points:
        if point.name == "dense" or uniform_scheme(result, point.candidate):
            continue
        chosen = configuration(problem, point.candidate.genotype)
        fitted_us = result.refit.saving_us(result.table, session.spec, chosen, session.workload)
        fitted_us += result.cache.saving_us(format_of(chosen)) if result.cache else 0.0
        searched_us = problem.latency_us(problem.dense) - point.candidate.latency_us
        savings = {"predicted_saving_ms": fitted_us / 1e3, "search_saving_ms": searched_us / 1e3}
        points.append(
            {"name": point.name, **savings, "measured_saving_ms": asdict(result.end_to_end.saving_ms(point.name))}
        )
    fitted = compare(points, "predicted_saving_ms")
    search = compare(points, "search_saving_ms")
    moved = drift(result.calibration.end_to_end, result.end_to_end)
    return {
        "points": points,
        **fitted,
        "search": search,
        "drift": moved,
        **judge(fitted, search, moved, result.end_to_end.noisy),
    }


def compare(points: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Median relative error of the saving under `key`, and rank correlation; None where there are too few points.

    Ranks are compared among points that the measurement can tell apart: many good configurations lie closer together
    than its own interval, and their order would be the order of noise.
    """
    if len(points) < 3:
        return {"median_error": None, "spearman": None}
    measured = [point["measured_saving_ms"]["median"] for point in points]
    errors = [abs(point[key] - saving) / max(abs(saving), 1e-9) for point, saving in zip(points, measured, strict=True)]
    apart = _apart(points, key)
    ranked = [point["measured_saving_ms"]["median"] for point in apart]
    distinct = len(apart) > 2 and len(set(ranked)) > 1
    spearman = float(stats.spearmanr([point[key] for point in apart], ranked).statistic) if distinct else None
    return {"median_error": float(np.median(errors)), "spearman": spearman}


def _apart(points: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Points whose predicted savings differ by at least the median half-width of the measured intervals."""
    intervals = [point["measured_saving_ms"] for point in points]
    resolution = float(np.median([(item["high"] - item["low"]) / 2 for item in intervals]))
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda item: float(item[key])):
        if not kept or point[key] - kept[-1][key] >= resolution:
            kept.append(point)
    return kept


def drift(before: EndToEnd | None, after: EndToEnd) -> dict[str, Any] | None:
    """The same configurations run twice: dense's time then and now, and by what the uniform schemes' savings changed
    (median of now / then; 1 is no change). None where nothing was run before."""
    if before is None:
        return None
    names = {run.name for run in after.runs}
    both = [run.name for run in before.runs if run.name.startswith("uniform ") and run.name in names]
    then_ms = [before.saving_ms(name).median for name in both]
    ratios = [after.saving_ms(name).median / saved for name, saved in zip(both, then_ms, strict=True) if saved > 0]
    dense = {when: run.of("dense").latency_ms.median for when, run in (("then", before), ("now", after))}
    return {"dense_ms": dense, "savings": float(np.median(ratios)) if ratios else None}


def judge(
    fitted: Mapping[str, Any], search: Mapping[str, Any], moved: Mapping[str, Any] | None, noisy: str
) -> dict[str, Any]:
    """`holds` (None: cannot be judged) and a verdict in words."""
    if fitted["median_error"] is None:
        changed = moved is not None and moved["savings"] is not None and abs(moved["savings"] - 1) > MOST_ERROR
        if changed:
            return {"holds": False, "verdict": f"too noisy: {_changed(moved)}"}
        return {"holds": None, "verdict": "too few points to judge"}
    if not _good(fitted):
        return {"holds": False, "verdict": noisy or "predicted savings are off: trust the measured ones"}
    if not _good(search):
        return {"holds": False, "verdict": _drifted(search, moved)}
    if fitted["spearman"] is None:
        return {"holds": True, "verdict": "predicted savings hold; the points lie too close together to rank"}
    return {"holds": True, "verdict": "predicted savings hold"}


def _good(found: Mapping[str, Any]) -> bool:
    error, rank = found["median_error"], found["spearman"]
    return bool(error <= MOST_ERROR and (rank is None or rank >= LEAST_RANK))


def _drifted(search: Mapping[str, Any], moved: Mapping[str, Any] | None) -> str:
    said = f"too noisy: the savings that the search believed in are off by {search['median_error']:.0%} at the median"
    if search["spearman"] is not None:
        said += f" (rank correlation {search['spearman']:.2f})"
    return f"{said}, those fitted to this run are not: {_changed(moved)}"


def _changed(moved: Mapping[str, Any] | None) -> str:
    said = "the machine changed since calibration"
    if moved is not None:
        said += f" (dense {moved['dense_ms']['then']:.1f} ms then, {moved['dense_ms']['now']:.1f} ms now"
        if moved["savings"] is not None:
            said += f"; the same uniform schemes save {moved['savings']:.2f} times as much"
        said += ")"
    return f"{said}; trust the measured savings, and on a quiet machine run it again"
