"""Which configuration of a finished run is recovered: the plan's, a point of its front, or one scheme everywhere."""

from __future__ import annotations

from pathlib import Path

from autotune import finalists
from autotune.decide import configuration
from autotune.errors import InfeasibleError, InputError
from autotune.finalists import nearest_candidate
from autotune.finished import with_lossy
from autotune.kernels.kv_formats import GROUP
from autotune.plan import Plan
from autotune.result import Result
from autotune.search.problem import Candidate, Evaluation, Genotype, Problem


def find(result: Result, run: Path, wanted: str | None) -> tuple[Result, str, dict[str, str]]:
    """(the run with every scheme that has weights, the configuration's name, group -> scheme).

    Args:
        wanted: a point's number or name, "nearest" (to a budget that nothing met), "uniform SCHEME" for a scheme
            wherever it runs, or None for the run's plan, or where it has none the nearest.

    Raises:
        InputError: `plan.point`, `recover.nothing` where nothing of it is compressed.
    """
    problem = result.problem
    assert problem is not None
    wide = with_lossy(result)
    assert wide.problem is not None
    file = run / "plan.json"
    if wanted is None and file.is_file():
        name, chosen = "the plan", Plan.load(file).configuration
    elif wanted is None or wanted == "nearest":
        name, chosen = "the nearest", configuration(problem, _nearest(result))
    elif wanted.startswith("uniform "):
        name, chosen = wanted, configuration(wide.problem, wide.problem.uniform(wanted.removeprefix("uniform ")))
    else:
        name, chosen = _point(result, wanted)
    chosen.pop(GROUP, None)  # training sees the cache as the model is run
    dense = result.session.spec.dtype
    if all(scheme == dense for scheme in chosen.values()):
        what = f"{name} has no compressed layer group to recover."
        raise InputError("recover.nothing", what, "Name another with --point, such as --point 'uniform w8a8-int8'.")
    return wide, name, chosen


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


def _point(result: Result, wanted: str) -> tuple[str, dict[str, str]]:
    assert result.problem is not None and result.front is not None
    try:
        points = finalists.pick_points(result.session, result.problem, result.front)
    except InfeasibleError:
        points = []
    for point in points:
        if point.name in (f"point {wanted}", wanted):
            return point.name, configuration(result.problem, point.candidate.genotype)
    known = ", ".join([point.name.removeprefix("point ") for point in points] + ["nearest", "uniform SCHEME"])
    raise InputError("plan.point", f"the front has no point {wanted}.", f"It has {known}.")
