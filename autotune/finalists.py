"""Which points of a front are worth running, which of them are to be certified, and which one is taken in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autotune.certify import Certificate
from autotune.compress.database import WeightDatabase, own_name
from autotune.compress.sequential import Files, with_files
from autotune.errors import InfeasibleError
from autotune.search.front import excess, fits, pareto_candidates
from autotune.search.problem import Budget, Candidate, Evaluation, Front, Problem
from autotune.search.ratio import LossRatio, dnll_upper_nats, loss_ratio
from autotune.session import Session
from autotune.verify import EndToEnd

ALIKE = 0.01  # finalists whose medians are further apart are never taken to be as fast, however noisy the run


@dataclass(frozen=True)
class OwnWeights:
    """Weights made for one configuration's own inputs, and its loss on the search documents without and with them."""

    files: Files
    before: Evaluation
    after: Evaluation

    @property
    def better(self) -> bool:
        return self.after.kl_nats < self.before.kl_nats


@dataclass(frozen=True)
class Point:
    """One configuration worth measuring. `finalist`: within the search's limits, to be certified. `own`: weights of its
    own, where such were made; they are what runs if they are better, and `candidate` then has their loss."""

    name: str
    candidate: Candidate
    finalist: bool
    own: OwnWeights | None = None

    @property
    def files(self) -> Files:
        """Of the groups that do not run the database's weights."""
        return self.own.files if self.own is not None and self.own.better else {}

    def entries(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """Group -> entry that runs, for its configuration (group -> scheme)."""
        return {g: own_name(name, self.files[g]) if g in self.files else name for g, name in chosen.items()}

    def weights(self, database: WeightDatabase, chosen: Mapping[str, str]) -> WeightDatabase:
        """The database with what runs, under the schemes' names."""
        return with_files(database, self.files, chosen)


def search_budget(session: Session, problem: Problem) -> Budget:
    """What the search aims at: its own, lower loss limit, and the limits on bytes and latency as they were given."""
    config = session.config
    limit_us = None if config.min_speedup is None else problem.latency_us(problem.dense) / config.min_speedup
    return Budget(session.search_limit, config.max_memory_bytes, limit_us)


def front_ratio(front: Front, limit_nats: float) -> LossRatio:
    """dNLL over KL from everything that the search measured: what its candidates are judged by in the end."""
    return loss_ratio([candidate.evaluation for candidate in front.candidates], limit_nats)


def pick_points(session: Session, problem: Problem, front: Front) -> list[Point]:
    """Finalists (the fastest few within the limits) and other points along the front, fastest first.

    Raises:
        InfeasibleError: `search.infeasible` with the nearest feasible point.
    """
    config = session.config
    budget = search_budget(session, problem)
    ratio = front_ratio(front, session.search_limit)
    feasible = [candidate for candidate in front.candidates if fits(candidate, budget, ratio)]
    if not feasible:
        raise _infeasible(session, front, problem, budget, ratio)
    best = feasible if config.latency_only else pareto_candidates(feasible)
    compressed = [c for c in best if c.genotype != problem.dense] or feasible[:1]
    fastest_first = sorted(compressed, key=lambda c: c.latency_us)
    finalists = _finalists(fastest_first, config.finalists, session.search_limit, ratio)
    others = [c for c in _along(front, session) if c not in finalists and c.genotype != problem.dense]
    others = _evenly(others, config.measured_points - len(finalists))
    chosen = sorted([*finalists, *others], key=lambda c: c.latency_us)
    return [Point(_point_name(problem, c, n), c, c in finalists) for n, c in enumerate(chosen)]


def _point_name(problem: Problem, candidate: Candidate, number: int) -> str:
    """ "dense" and "uniform SCHEME" where that is what it is, else "point N"."""
    if candidate.genotype == problem.dense:
        return "dense"
    names = {option.scheme for option in problem.chosen(candidate.genotype)}
    uniform = next((name for name in sorted(names) if problem.uniform(name) == candidate.genotype), None)
    return f"uniform {uniform}" if uniform else f"point {number}"


def _along(front: Front, session: Session) -> list[Candidate]:
    if session.config.latency_only:
        return list(front.candidates)
    uniform = [c for c in front.candidates if c.source.startswith("uniform")]
    pareto = [front.candidates[index] for index in front.pareto]
    return list(dict.fromkeys([*uniform, *pareto]))


def _finalists(candidates: Sequence[Candidate], count: int, limit: float, ratio: LossRatio) -> list[Candidate]:
    """The fastest few, and as the safest one the fastest that uses a third of the budget.

    Certification goes from safest to fastest and stops at the first failure: without a safe start, bad luck on the
    first would leave nothing certified.
    """
    fastest = spread(candidates, count)
    safe = [c for c in candidates if dnll_upper_nats(c.evaluation, ratio) <= limit / 3]
    if count > 1 and safe and not any(c in fastest for c in safe):
        return [*fastest[: count - 1], safe[0]]
    return fastest


def spread(candidates: Sequence[Candidate], count: int, apart: float = 0.005) -> list[Candidate]:
    """The fastest `count`, skipping any that is within 0.5% of one already taken: they could not be told apart."""
    taken: list[Candidate] = []
    for candidate in candidates:
        if all(abs(candidate.latency_us / other.latency_us - 1) > apart for other in taken):
            taken.append(candidate)
        if len(taken) == count:
            break
    return taken


def _evenly(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Every uniform baseline (the latency model's fit runs them anyway), and `count` points spread over the range."""
    first = [c for c in candidates if c.source.startswith("uniform")]
    rest = [c for c in candidates if c not in first]
    room = min(count, len(rest))
    if room <= 0:
        return first
    slowest, fastest = max(c.latency_us for c in rest), min(c.latency_us for c in rest)
    for step in range(room):
        target = slowest - (slowest - fastest) * step / max(1, room - 1)
        nearest = min(rest, key=lambda c: abs(c.latency_us - target))
        rest.remove(nearest)
        first.append(nearest)
    return first


def nearest_candidate(session: Session, problem: Problem, front: Front) -> Candidate:
    """The evaluated configuration that misses the budget by the least, in shares of its limits."""
    budget = search_budget(session, problem)
    ratio = front_ratio(front, session.search_limit)

    def distance(candidate: Candidate) -> float:
        scale = {"loss": budget.max_loss_nats, "bytes": budget.max_bytes or 1, "latency": budget.max_latency_us or 1}
        return max(value / scale[name] for name, value in excess(candidate, budget, ratio).items())

    return min(front.candidates, key=distance)


def _infeasible(session: Session, front: Front, problem: Problem, budget: Budget, ratio: LossRatio) -> InfeasibleError:
    nearest = nearest_candidate(session, problem, front)
    speedup = problem.latency_us(problem.dense) / nearest.latency_us
    loss = math.expm1(nearest.evaluation.dnll_nats)
    what = f"{speedup:.2f}x dense, {nearest.weight_bytes / 2**20:.1f} MiB, loss {loss:.2%} on the search documents"
    missed = ", ".join(name for name, value in excess(nearest, budget, ratio).items() if value > 0)
    return InfeasibleError(
        "search.infeasible",
        f"no configuration meets the budget ({missed}); the nearest is {what}.",
        "Relax the budget to that point, or allow more schemes.",
    )


def choose(
    points: Sequence[Point],
    certificates: Mapping[str, Certificate],
    end_to_end: EndToEnd | None,
    needs_certificate: bool,
) -> tuple[Point, str]:
    """The finalist to take, and why in one sentence.

    Of those that passed certification the fastest, or the safest of those that the run cannot tell from it. If none
    passed, the safest one tested (its state says so).
    """

    def latency(point: Point) -> float:
        return end_to_end.of(point.name).latency_ms.median if end_to_end else point.candidate.latency_us

    finalists = [point for point in points if point.finalist]
    how = "measured" if end_to_end else "predicted"
    if not needs_certificate:
        fastest = min(finalists, key=latency)
        return fastest, f"{fastest.name} is the fastest {how}"
    passing = [p for p in finalists if p.name in certificates and certificates[p.name].state == "certified"]
    if not passing:
        safest = min(finalists, key=lambda point: point.candidate.evaluation.kl_nats)
        return safest, f"{safest.name} is the safest; none of the finalists was certified"
    fastest = min(passing, key=latency)
    alike = [point for point in passing if end_to_end and _as_fast(point, fastest, end_to_end)]
    # Certification holds for all that passed together, so choosing among them by what it saw breaks no claim.
    safest = min(alike, key=lambda point: (certificates[point.name].loss.upper, latency(point)), default=fastest)
    if safest is fastest:
        return fastest, f"{fastest.name} is the fastest {how} of {len(passing)} certified"
    return safest, f"{safest.name} is as fast as {fastest.name} within what the run can tell, and safer"


def _as_fast(point: Point, fastest: Point, end_to_end: EndToEnd) -> bool:
    """The 95% interval of the difference, paired by round, holds 0, or says that the point is faster."""
    saving_ms = end_to_end.saving_ms(point.name, fastest.name)
    medians_ms = [end_to_end.of(item.name).latency_ms.median for item in (point, fastest)]
    return saving_ms.high >= 0 and medians_ms[0] <= (1 + ALIKE) * medians_ms[1]
