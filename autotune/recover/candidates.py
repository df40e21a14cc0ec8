"""Which configuration of a finished run is recovered: the plan's, a point of its front, or one scheme everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autotune import finalists, recompress
from autotune.compress.database import WeightDatabase
from autotune.decide import configuration
from autotune.errors import InfeasibleError, InputError
from autotune.finalists import Point, nearest_candidate
from autotune.finished import with_lossy
from autotune.kernels.kv_formats import GROUP
from autotune.plan import Plan
from autotune.result import Result
from autotune.search.problem import Candidate, Evaluation, Genotype, Problem


def find(result: Result, run: Path, wanted: str | None) -> tuple[str, dict[str, str], WeightDatabase]:
    """(the configuration's name, group -> scheme, the codes to start from).

    Those are the configuration's own where the run compressed it again, else the database's.

    Args:
        wanted: a point's number or name, "nearest" (to a budget that nothing met), "uniform SCHEME" for a scheme
            wherever it runs, or None for the run's plan, or where it has none the nearest.

    Raises:
        InputError: `plan.point`, `recover.nothing` where nothing of it is compressed.
    """
    problem, database = result.problem, result.database
    assert problem is not None and database is not None
    file = run / "plan.json"
    points = _points(result)
    if wanted is None and file.is_file():
        name, chosen = "the plan", Plan.load(file).configuration
    elif wanted is None or wanted == "nearest":
        name, chosen = "the nearest", configuration(problem, _nearest(result))
    elif wanted.startswith("uniform "):
        wide = with_lossy(result).problem
        assert wide is not None
        name, chosen = wanted, configuration(wide, wide.uniform(wanted.removeprefix("uniform ")))
    else:
        name, chosen = _point(problem, points, wanted)
    chosen.pop(GROUP, None)  # training sees the cache as the model is run
    dense = result.session.spec.dtype
    if all(scheme == dense for scheme in chosen.values()):
        what = f"{name} has no compressed layer group to recover."
        raise InputError("recover.nothing", what, "Name another with --point, such as --point 'uniform w8a8-int8'.")
    return name, chosen, own_codes(problem, points, chosen, database)


def own_codes(
    problem: Problem, points: Sequence[Point], chosen: dict[str, str], database: WeightDatabase
) -> WeightDatabase:
    """The database, with the codes of its own in the place of others where this configuration has some."""
    for point in points:
        known = configuration(problem, point.candidate.genotype)
        known.pop(GROUP, None)
        if point.files and known == chosen:
            return point.weights(database, chosen)
    return database


def candidate_of(problem: Problem, chosen: dict[str, str], evaluation: Evaluation, source: str) -> Candidate:
    """A configuration as the search would have it, its loss as measured."""
    genotype = genotype_of(problem, chosen)
    sums = problem.latency_us(genotype), problem.weight_bytes(genotype), problem.loss_nats(genotype)
    return Candidate(genotype, *sums, evaluation, source)


def genotype_of(problem: Problem, chosen: dict[str, str]) -> Genotype:
    """Raises InputError `recover.nothing` where the run no longer has a scheme of the configuration."""
    genotype = []
    for group in problem.groups:
        names = [option.scheme for option in group.options]
        wanted = chosen.get(group.name, names[0])
        if wanted not in names:
            what = f"{group.name} has no {wanted} in this run"
            raise InputError("recover.nothing", f"{what}: it has {', '.join(names)}.", "Search again.")
        genotype.append(names.index(wanted))
    return tuple(genotype)


def _nearest(result: Result) -> Genotype:
    assert result.problem is not None and result.front is not None
    return nearest_candidate(result.session, result.problem, result.front).genotype


def _points(result: Result) -> tuple[Point, ...]:
    """Of the finished search, finalists with what was made for them; none where nothing met the budget."""
    assert result.problem is not None and result.front is not None and result.database is not None
    try:
        points = finalists.pick_points(result.session, result.problem, result.front)
    except InfeasibleError:
        return ()
    return recompress.found(result.session, result.problem, points, result.database)


def _point(problem: Problem, points: Sequence[Point], wanted: str) -> tuple[str, dict[str, str]]:
    for point in points:
        if point.name in (f"point {wanted}", wanted):
            return point.name, configuration(problem, point.candidate.genotype)
    known = ", ".join([point.name.removeprefix("point ") for point in points] + ["nearest", "uniform SCHEME"])
    raise InputError("plan.point", f"the front has no point {wanted}.", f"It has {known}.")
