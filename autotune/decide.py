"""The stages that decide: the problem, its search, the finalists' run and their certification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from autotune import cache_choice, verify
from autotune.cache_choice import CacheChoice
from autotune.certify import Bound, Certificate, certify
from autotune.finalists import Point, search_budget
from autotune.kernels.kv_formats import GROUP
from autotune.kernels.spec import kernel as kernel_named
from autotune.latency_model import Calibration, uniform_configurations
from autotune.models import LOOK_SHARES, Models
from autotune.profilers.latency import LatencyTable
from autotune.score import LossTable
from autotune.search.codec import decode_evaluation, decode_front, encode_evaluation, encode_front
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
    session: Session,
    space: SearchSpace,
    table: LatencyTable,
    losses: LossTable | None,
    calibration: Calibration,
    cache: CacheChoice | None = None,
) -> Problem:
    """The tables joined into what the search sees; the KV cache is the last group, where it is a choice."""
    groups = []
    for group in session.spec.groups:
        names = [entry.scheme for entry in space.schemes(group.name)]
        options = tuple(_option(session, group, name, table, losses, calibration) for name in names)
        groups.append(GroupOptions(group.name, group.role, group.layer, options))
    rest_us, settled = calibration.total_rest_us, False
    if cache is not None:
        item, rest_us = cache_choice.options(session, cache, rest_us)
        settled = cache.named
        groups.append(item)
    return Problem(tuple(groups), rest_us, session.spec.kept_bytes, ((len(groups) - 1, 1),) if settled else ())


def of_layers(problem: Problem, genotype: Genotype) -> list[tuple[GroupOptions, Option]]:
    """Layer groups and what they got."""
    pairs = zip(problem.groups, problem.chosen(genotype), strict=True)
    return [(group, option) for group, option in pairs if group.name != GROUP]


def weight_bytes(problem: Problem, genotype: Genotype) -> int:
    """Without the cache's, which are counted where memory is budgeted."""
    return problem.fixed_bytes + sum(option.weight_bytes for _, option in of_layers(problem, genotype))


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


def run_search(
    session: Session,
    problem: Problem,
    models: Models,
    stop: Callable[[], bool],
    promised: Problem | None = None,
    stage: str = "front",
) -> Front:
    """Study over corrections and outer choices; without losses, the fastest configuration within memory.

    Args:
        promised: the same problem with the losses that training promises: then that is searched, and a measured loss is
            taken times the share that training promises to leave of it.
    """
    config = session.config
    budget = search_budget(session, problem)
    if config.latency_only:
        return _latency_only_front(problem, budget)
    memo = session.folder.memo()
    assert models.database is not None
    key: list[Any] = [session.documents.digest, config.search_tokens, config.search_length, session.spec.model_hash]
    key.append(sorted(models.database.entries.values()))
    searched = promised or problem

    def evaluate(genotype: Genotype, look: int) -> Evaluation:
        chosen = configuration(problem, genotype)
        name = digest([key, chosen, look])
        value = memo.get(name)
        if value is None:
            value = encode_evaluation(models.teacher.measure(chosen, look))
            memo.put(name, value)
        found = decode_evaluation(value)
        return found if promised is None else found.scaled(promised_share(problem, promised, genotype))

    try:
        trials = _trials(session, searched, evaluate, "trials" if promised is None else f"{stage}_trials")
        inputs = [_problem_key(searched), asdict(budget), config.seed, trials, config.fast, key]
        inputs += [] if promised is None else [_problem_key(problem)]

        def step(done: int, total: int, best_us: float | None) -> None:
            note = f"best so far {best_us / 1e3:.2f} ms" if best_us else "nothing within the budget yet"
            session.report("search", done, total, note)

        def compute() -> Front:
            return search(
                searched,
                budget,
                config.seed,
                trials,
                evaluate,
                looks=len(LOOK_SHARES),
                outer=outer_choices(searched),
                progress=step,
                fast=config.fast,
                should_stop=stop,
            )

        return session.folder.json_stage(stage, inputs, compute, encode_front, decode_front, lambda _: not stop())
    finally:
        memo.close()


def promised_share(problem: Problem, promised: Problem, genotype: Genotype) -> float:
    """What training promises to leave of a configuration's loss: the sums of its rows in both tables, divided."""
    before = problem.loss_nats(genotype)
    return promised.loss_nats(genotype) / before if before > 0 else 1.0


def outer_choices(problem: Problem) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Choices that are not one group's own: name -> the sets of compressed schemes it may allow everywhere."""
    layers = [group for group in problem.groups if group.name != GROUP]
    names = sorted({option.scheme for group in layers for option in group.options[1:]})
    formats = tuple(o.scheme for group in problem.groups if group.name == GROUP for o in group.options[1:])
    sizes = {name: scheme(name).weight.group_size for name in names}
    quantizing = {name for name in names if scheme(name).activation is not None}
    choices: dict[str, tuple[tuple[str, ...], ...]] = {}
    grouped = sorted({size for size in sizes.values() if size})
    if len(grouped) > 1:
        single = tuple(tuple(n for n in names if sizes[n] in (None, size)) for size in grouped)
        choices["scale_group"] = (tuple(names), *single)
    if quantizing and len(quantizing) < len(names):
        choices["activations"] = (tuple(names), tuple(n for n in names if n not in quantizing))
    if formats:
        choices = {name: tuple((*subset, *formats) for subset in subsets) for name, subsets in choices.items()}
    if formats and not problem.settled:
        choices[GROUP] = ((*names, *formats), tuple(names))
    return choices


def _trials(session: Session, problem: Problem, evaluate: Any, stage: str) -> int:
    """`--minutes` becomes a number of trials, written down before it is acted on: a resumed run does the same."""
    import time

    config = session.config
    if config.minutes is None:
        return config.trials

    def compute() -> int:
        start = time.monotonic()
        evaluate(tuple(len(group.options) - 1 for group in problem.groups), len(LOOK_SHARES) - 1)
        return trials_for_minutes(config.minutes or 0.0, time.monotonic() - start)

    return session.folder.json_stage(stage, [config.minutes, _problem_key(problem)], compute, int, int)


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
    genotypes = {name: problem.settle(genotype) for name, genotype in genotypes.items()}
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


def measure_points(session: Session, problem: Problem, points: Sequence[Point], models: Models) -> EndToEnd | None:
    """End-to-end latency of every point, and of what a fit needs, in one run; None where nothing can be run."""
    if not models.runs:
        return None
    layers = [group for group in problem.groups if group.name != GROUP]
    available = {group.name: [option.scheme for option in group.options] for group in layers}
    configurations = uniform_configurations(session.spec, available)
    configurations |= {point.name: configuration(problem, point.candidate.genotype) for point in points}
    progress = session.progress("verify")
    return session.folder.json_stage(
        "endtoend",
        [verify.FORMAT, list(map(list, configurations.items())), _kernels_key(problem), str(session.workload)],
        lambda: verify.measure(
            cast(SwitchableModel, models.runnable), configurations, session.workload, 30.0, progress
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
    configurations = [point.entries(configuration(problem, point.candidate.genotype)) for point in order]
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
