"""Another point of a finished search: a new plan from the run's own tables, nothing measured again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from autotune import finalists, planning, recompress
from autotune.cache_choice import cache_bytes
from autotune.certify import Certificate
from autotune.config import RunConfig
from autotune.decide import configuration, decode_certificate
from autotune.errors import InfeasibleError, InputError, UsageError
from autotune.finalists import Point, front_ratio
from autotune.finished import reload
from autotune.kernels.kv_formats import format_of
from autotune.result import Result
from autotune.search.front import fits
from autotune.search.problem import Budget, Candidate
from autotune.session import Session
from autotune.store import locked, read_json


def choose_point(
    run: Path, max_loss: float | None, point: int | str | None, max_memory_bytes: int | None
) -> tuple[Path, str]:
    """Write the plan of another point beside the first one.

    Args:
        point: a point of the report's front: its number ("7" for "point 7") or name ("uniform w8a16-int8").

    Returns:
        The new plan's path, and what is known of it.

    Raises:
        UsageError: `plan.choose` when no criterion is given.
        InputError: `config.missing`, `plan.point`.
        InfeasibleError: `search.infeasible` with the nearest point.
    """
    if max_loss is None and point is None and max_memory_bytes is None:
        raise UsageError("plan.choose", "no criterion was given.", "Give --max-loss, --point or --max-memory.")
    RunConfig.load(run / "config.yaml")  # before the lock, which would make the folder
    with locked(run):
        result = reload(run)
        assert result.problem is not None and result.front is not None
        result.points = tuple(finalists.pick_points(result.session, result.problem, result.front))
        if result.database is not None:
            result.points = recompress.found(result.session, result.problem, result.points, result.database)
        chosen = _point(result, point) if point is not None else _fastest(result, max_loss, max_memory_bytes)
        asked = {"max_loss": max_loss, "max_memory_bytes": max_memory_bytes}
        limits = {key: value for key, value in asked.items() if value is not None}
        config = result.session.config.model_copy(update=limits)  # the plan states its budget
        result.session = replace(result.session, config=config)
        plan = planning.build_plan(result, chosen)
        name = _file_name(max_loss, point, max_memory_bytes)
        path = run / f"plan-{name}.json"
        plan.save(path)
    return path, _statement(result, chosen)


def _file_name(max_loss: float | None, point: int | str | None, max_memory_bytes: int | None) -> str:
    parts = {"point": point, "loss": max_loss, "memory": max_memory_bytes}
    return "-".join(f"{key}-{value}" for key, value in parts.items() if value is not None).replace(" ", "-")


def _point(result: Result, wanted: int | str) -> Point:
    for point in result.points:
        if point.name in (f"point {wanted}", str(wanted)):
            return point
    known = ", ".join(point.name.removeprefix("point ") for point in result.points)
    raise InputError("plan.point", f"the front has no point {wanted}.", f"It has {known}.")


def _fastest(result: Result, max_loss: float | None, max_memory_bytes: int | None) -> Point:
    session, problem, front = result.session, result.problem, result.front
    assert problem is not None and front is not None
    limit = session.search_limit if max_loss is None else _limit(session, max_loss)
    memory = max_memory_bytes if max_memory_bytes is not None else session.config.max_memory_bytes
    ratio = front_ratio(front, limit)
    rooms = [None if memory is None else memory - _uncounted(result, c) for c in front.candidates]
    feasible = [c for c, room in zip(front.candidates, rooms, strict=True) if fits(c, Budget(limit, room), ratio)]
    if not feasible:
        sizes = [c.weight_bytes + _uncounted(result, c) for c in front.candidates]
        size, number = min((size, number) for number, size in enumerate(sizes))
        nearest = front.candidates[number]
        cache = cache_bytes(session).get(format_of(configuration(problem, nearest.genotype)), 0)
        what = f"the smallest has {size:,} bytes ({cache:,} of them the KV cache)"
        what += f", loss {nearest.evaluation.dnll_nats:.2e} nats"
        raise InfeasibleError("search.infeasible", f"no point of this search fits; {what}.", "Search again.")
    best = min(feasible, key=lambda candidate: candidate.latency_us)
    named = {point.candidate.genotype: point for point in result.points}
    return named.get(best.genotype, Point(best.source, best, False))


def _uncounted(result: Result, candidate: Candidate) -> int:
    """Bytes of the cache where the run was searched without a bound on memory: there its candidates' bytes lack it."""
    if result.session.config.max_memory_bytes is not None:
        return 0
    assert result.problem is not None
    return cache_bytes(result.session).get(format_of(configuration(result.problem, candidate.genotype)), 0)


def _limit(session: Session, max_loss: float) -> float:
    """The search limit another budget would have: the same margin for certification."""
    return replace(session, config=session.config.model_copy(update={"max_loss": max_loss})).search_limit


def _statement(result: Result, point: Point) -> str:
    assert result.problem is not None
    speedup = result.problem.latency_us(result.problem.dense) / point.candidate.latency_us
    text = f"{point.name}, predicted {speedup:.2f}x dense"
    if result.losses is not None:
        text += f", loss {math.expm1(point.candidate.evaluation.dnll_nats):.2%} on the search documents"
    certificate = _certificate(result, point)
    return f"{text}; {certificate.statement if certificate else 'not certified: tune with this budget to certify it'}"


def _certificate(result: Result, point: Point) -> Certificate | None:
    """A certificate the finished run has for this very configuration, if it also holds for the budget asked for."""
    assert result.problem is not None
    file = result.session.folder.path / "certificates.json"
    if not file.is_file() or not point.finalist:
        return None
    order = sorted((p for p in result.points if p.finalist), key=lambda p: p.candidate.evaluation.kl_nats)
    wanted = configuration(result.problem, point.candidate.genotype)
    for tested, value in zip(order, read_json(file, "run"), strict=False):
        if configuration(result.problem, tested.candidate.genotype) == wanted:
            found = decode_certificate(value)
            return found if found.state != "certified" or found.loss.upper <= result.session.limit else None
    return None
