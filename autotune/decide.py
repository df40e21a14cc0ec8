"""The stages that decide: problem, search, finalists, certification and the chosen point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from autotune import verify
from autotune.certify import Bound, Certificate, certify
from autotune.errors import InfeasibleError
from autotune.kernels.spec import kernel as kernel_named
from autotune.latency_model import Calibration, uniform_configurations
from autotune.models import LOOK_SHARES, Models
from autotune.profilers.latency import LatencyTable
from autotune.score import LossTable
from autotune.search.codec import decode_evaluation, decode_front, encode_evaluation, encode_front
from autotune.search.front import dnll_upper_nats, excess, pareto_candidates
from autotune.search.problem import (
    Budget,
    Candidate,
    Evaluation,
    Front,
    Genotype,
    GroupOptions,
    Option,
    Problem,
)
from autotune.search.run import search, trials_for_minutes
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.session import Session
from autotune.store import digest
from autotune.switchable import SwitchableModel
from autotune.verify import EndToEnd


def build_problem(
    session: Session, space: SearchSpace, table: LatencyTable, losses: LossTable | None, calibration: Calibration
) -> Problem:
    """The tables joined into what the search sees."""
    groups = []
    for group in session.spec.groups:
        names = [entry.scheme for entry in space.schemes(group.name)]
        options = tuple(_option(session, group, name, table, losses, calibration) for name in names)
        groups.append(GroupOptions(group.name, group.role, group.layer, options))
    return Problem(tuple(groups), calibration.rest_us, session.spec.kept_bytes)


def _option(
    session: Session,
    group: LayerGroup,
    name: str,
    table: LatencyTable,
    losses: LossTable | None,
    calibration: Calibration,
) -> Option:
    choice = table.best(group, name, session.workload)
    assert choice is not None, (group.name, name)  # `prune` dropped what has no time
    dense = name == session.spec.dtype
    loss = 0.0 if dense or losses is None else losses.of(group.name, name)
    # A tied head run by a kernel that reads plain weights shares the embedding's memory.
    shared = dense and group.role == "lm_head" and session.spec.tied_embeddings and reads_plain(choice.kernel)
    latency_us = calibration.group_us(table, group, name, session.workload)
    return Option(
        name, choice.kernel, latency_us, loss, 0 if shared else choice.packed_bytes, choice.status == "estimated"
    )


def reads_plain(name: str) -> bool:
    """True for kernels that use the model's own weight tensor, not a copy."""
    return kernel_named(name).module.endswith(".dense")


def configuration(problem: Problem, genotype: Genotype) -> dict[str, str]:
    """Group -> scheme."""
    return {g.name: o.scheme for g, o in zip(problem.groups, problem.chosen(genotype), strict=True)}


def latency_limit_us(session: Session, problem: Problem) -> float | None:
    if session.config.min_speedup is None:
        return None
    return problem.latency_us(problem.dense) / session.config.min_speedup


def run_search(session: Session, problem: Problem, models: Models, stop: Callable[[], bool]) -> Front:
    """Study over corrections and outer choices; without losses, the fastest configuration within memory."""
    config = session.config
    budget = Budget(session.search_limit, config.max_memory_bytes, latency_limit_us(session, problem))
    if config.latency_only:
        return _latency_only_front(problem, budget)
    memo = session.folder.memo()
    assert models.database is not None
    key: list[Any] = [session.documents.digest, config.search_tokens, config.search_length, session.spec.model_hash]
    key.append(sorted(models.database.entries.values()))

    def evaluate(genotype: Genotype, look: int) -> Evaluation:
        chosen = configuration(problem, genotype)
        name = digest([key, chosen, look])
        value = memo.get(name)
        if value is None:
            value = encode_evaluation(models.teacher.measure(chosen, look))
            memo.put(name, value)
        return decode_evaluation(value)

    try:
        trials = _trials(session, problem, evaluate)
        inputs = [_problem_key(problem), asdict(budget), config.seed, trials, config.fast, key]

        def step(done: int, total: int, best_us: float | None) -> None:
            note = f"best so far {best_us / 1e3:.2f} ms" if best_us else "nothing within the budget yet"
            session.report("search", done, total, note)

        def compute() -> Front:
            return search(
                problem,
                budget,
                config.seed,
                trials,
                evaluate,
                looks=len(LOOK_SHARES),
                outer=outer_choices(problem),
                progress=step,
                fast=config.fast,
                should_stop=stop,
            )

        return session.folder.json_stage("front", inputs, compute, encode_front, decode_front, lambda _: not stop())
    finally:
        memo.close()


def outer_choices(problem: Problem) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Choices that are not one group's own: name -> the sets of compressed schemes it may allow everywhere."""
    names = sorted({option.scheme for group in problem.groups for option in group.options[1:]})
    sizes = {name: scheme(name).weight.group_size for name in names}
    quantizing = {name for name in names if scheme(name).activation is not None}
    choices: dict[str, tuple[tuple[str, ...], ...]] = {}
    grouped = sorted({size for size in sizes.values() if size})
    if len(grouped) > 1:
        single = tuple(tuple(n for n in names if sizes[n] in (None, size)) for size in grouped)
        choices["scale_group"] = (tuple(names), *single)
    if quantizing and len(quantizing) < len(names):
        choices["activations"] = (tuple(names), tuple(n for n in names if n not in quantizing))
    return choices


def _trials(session: Session, problem: Problem, evaluate: Any) -> int:
    """`--minutes` becomes a number of trials, written down before it is acted on: a resumed run does the same."""
    import time

    config = session.config
    if config.minutes is None:
        return config.trials

    def compute() -> int:
        start = time.monotonic()
        evaluate(tuple(len(group.options) - 1 for group in problem.groups), len(LOOK_SHARES) - 1)
        return trials_for_minutes(config.minutes or 0.0, time.monotonic() - start)

    return session.folder.json_stage("trials", [config.minutes, _problem_key(problem)], compute, int, int)


def _problem_key(problem: Problem) -> str:
    return digest(asdict(problem))


def _latency_only_front(problem: Problem, budget: Budget) -> Front:
    """Dense, every uniform scheme and the fastest mix, without losses."""
    from autotune.search.knapsack import solve

    latencies = [[option.latency_us for option in group.options] for group in problem.groups]
    sizes = [[option.weight_bytes for option in group.options] for group in problem.groups]
    limit = None if budget.max_bytes is None else budget.max_bytes - problem.fixed_bytes
    genotypes = {"dense": problem.dense}
    names = sorted({o.scheme for g in problem.groups for o in g.options} - {problem.groups[0].options[0].scheme})
    genotypes |= {f"uniform {name}": problem.uniform(name) for name in names}
    genotypes["fastest"] = solve(latencies, latencies, math.inf, sizes if limit is not None else None, limit)
    empty = Evaluation((1.0,), (0.0,), (0.0,))
    unique = {genotype: source for source, genotype in reversed(genotypes.items())}
    candidates = sorted(
        (
            Candidate(g, problem.latency_us(g), problem.weight_bytes(g), 0.0, empty, source)
            for g, source in unique.items()
        ),
        key=lambda candidate: candidate.latency_us,
    )
    return Front(tuple(candidates), (0,), (), 0.0)


@dataclass(frozen=True)
class Point:
    """One configuration worth measuring. `finalist`: within the search's limits, to be certified."""

    name: str
    candidate: Candidate
    finalist: bool


def pick_points(session: Session, problem: Problem, front: Front) -> list[Point]:
    """Finalists (the fastest few within the limits) and other points along the front, fastest first.

    Raises:
        InfeasibleError: `search.infeasible` with the nearest feasible point.
    """
    config = session.config
    budget = Budget(session.search_limit, config.max_memory_bytes, latency_limit_us(session, problem))
    feasible = [candidate for candidate in front.candidates if _fits(candidate, budget)]
    if not feasible:
        raise _infeasible(front, problem, budget)
    best = feasible if config.latency_only else pareto_candidates(feasible)
    compressed = [c for c in best if c.genotype != problem.dense] or feasible[:1]
    finalists = _finalists(sorted(compressed, key=lambda c: c.latency_us), config.finalists, session.search_limit)
    others = [c for c in _along(front, session) if c not in finalists and c.genotype != problem.dense]
    others = _evenly(others, max(0, config.measured_points - len(finalists)))
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


def _fits(candidate: Candidate, budget: Budget) -> bool:
    return all(value <= 0 for value in excess(candidate, budget).values())


def _finalists(candidates: Sequence[Candidate], count: int, limit: float) -> list[Candidate]:
    """The fastest few, and as the safest one the fastest that uses a third of the budget.

    Certification goes from safest to fastest and stops at the first failure: without a safe start, bad luck on the
    first would leave nothing certified.
    """
    fastest = _spread(candidates, count)
    safe = [c for c in candidates if dnll_upper_nats(c.evaluation) <= limit / 3]
    if count > 1 and safe and not any(c in fastest for c in safe):
        return [*fastest[: count - 1], safe[0]]
    return fastest


def _spread(candidates: Sequence[Candidate], count: int, apart: float = 0.005) -> list[Candidate]:
    """The fastest `count`, skipping any that is within 0.5% of one already taken: they could not be told apart."""
    taken: list[Candidate] = []
    for candidate in candidates:
        if all(abs(candidate.latency_us / other.latency_us - 1) > apart for other in taken):
            taken.append(candidate)
        if len(taken) == count:
            break
    return taken


def _evenly(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Uniform baselines first, then the points nearest to latencies spread evenly over the range."""
    first = [c for c in candidates if c.source.startswith("uniform")][:count]
    rest = [c for c in candidates if c not in first]
    room = min(count - len(first), len(rest))
    if room <= 0:
        return first
    slowest, fastest = max(c.latency_us for c in rest), min(c.latency_us for c in rest)
    for step in range(room):
        target = slowest - (slowest - fastest) * step / max(1, room - 1)
        nearest = min(rest, key=lambda c: abs(c.latency_us - target))
        rest.remove(nearest)
        first.append(nearest)
    return first


def _infeasible(front: Front, problem: Problem, budget: Budget) -> InfeasibleError:
    def distance(candidate: Candidate) -> float:
        scale = {"loss": budget.max_loss_nats, "bytes": budget.max_bytes or 1, "latency": budget.max_latency_us or 1}
        return max(value / scale[name] for name, value in excess(candidate, budget).items())

    nearest = min(front.candidates, key=distance)
    speedup = problem.latency_us(problem.dense) / nearest.latency_us
    loss = math.expm1(nearest.evaluation.dnll_nats)
    what = f"{speedup:.2f}x dense, {nearest.weight_bytes / 2**20:.1f} MiB, loss {loss:.2%} on the search documents"
    missed = ", ".join(name for name, value in excess(nearest, budget).items() if value > 0)
    return InfeasibleError(
        "search.infeasible",
        f"no configuration meets the budget ({missed}); the nearest is {what}.",
        "Relax the budget to that point, or allow more schemes.",
    )


def measure_points(session: Session, problem: Problem, points: Sequence[Point], models: Models) -> EndToEnd | None:
    """End-to-end latency of every point, and of what a fit needs, in one run; None where nothing can be run."""
    if not session.local:
        return None
    available = {group.name: [option.scheme for option in group.options] for group in problem.groups}
    configurations = uniform_configurations(session.spec, available)
    configurations |= {point.name: configuration(problem, point.candidate.genotype) for point in points}
    progress = session.progress("verify")
    return session.folder.json_stage(
        "endtoend",
        [list(map(list, configurations.items())), _kernels_key(problem), str(session.workload)],
        lambda: verify.measure(
            cast(SwitchableModel, models.runnable), configurations, session.workload, 40.0, progress
        ),
        EndToEnd.to_json,
        EndToEnd.from_json,
    )


def _kernels_key(problem: Problem) -> list[list[list[str]]]:
    return [[[option.scheme, option.kernel] for option in group.options] for group in problem.groups]


def certify_points(
    session: Session, problem: Problem, points: Sequence[Point], models: Models
) -> dict[str, Certificate]:
    """Certificates of the finalists, tested from safest to fastest up to the first failure."""
    if session.config.latency_only:
        return {}
    order = sorted((p for p in points if p.finalist), key=lambda p: p.candidate.evaluation.kl_nats)
    configurations = [configuration(problem, point.candidate.genotype) for point in order]
    documents = session.certification_documents
    name = session.documents.name
    progress = session.progress("certify")
    certificates = session.folder.json_stage(
        "certificates",
        [configurations, _kernels_key(problem), session.documents.digest, len(documents), session.limit],
        lambda: certify(models.runnable or models.reference, configurations, documents, session.limit, name, progress),
        lambda value: [asdict(item) for item in value],
        lambda value: [decode_certificate(item) for item in value],
    )
    return {point.name: certificate for point, certificate in zip(order, certificates, strict=False)}


def decode_certificate(value: Mapping[str, Any]) -> Certificate:
    return Certificate(**{**value, "loss": Bound(**value["loss"]), "kl": Bound(**value["kl"])})


def choose(
    points: Sequence[Point],
    certificates: Mapping[str, Certificate],
    end_to_end: EndToEnd | None,
    needs_certificate: bool,
) -> Point:
    """The fastest finalist that passes; if none passes, the safest one tested (its state says so)."""

    def latency(point: Point) -> float:
        return end_to_end.of(point.name).latency_ms.median if end_to_end else point.candidate.latency_us

    finalists = [point for point in points if point.finalist]
    if not needs_certificate:
        return min(finalists, key=latency)
    passing = [p for p in finalists if p.name in certificates and certificates[p.name].state == "certified"]
    if passing:
        return min(passing, key=latency)
    return min(finalists, key=lambda point: point.candidate.evaluation.kl_nats)
