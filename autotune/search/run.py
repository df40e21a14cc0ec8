"""The whole search: what peers would choose, then the study, then refinement. A pure function of its arguments.

    seeds     the dense model, every uniform scheme, greedy, bits and scored knapsacks
    study     the loss table decoded at latency targets around the budget, then Optuna's corrections of the table; every
              few trials one decoded from the correction fitted so far, aimed at the budget
    refine    moves around the front, raced

Seeds are measured like any trial and stay in the front, so on the search documents the result is never worse than
they are. Without a loss limit (infinite) it wants the least loss at `max_latency_us`, or without that the whole
front. Losses come from `evaluate` alone; the caller memoises it, and a search that was killed replays over that memo to
the same result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import numpy as np

from autotune.errors import UsageError
from autotune.search import baselines
from autotune.search.correction import Fit, fit
from autotune.search.front import excess, pareto
from autotune.search.knapsack import Table
from autotune.search.ledger import Ledger, Progress, Stopped
from autotune.search.problem import Budget, Candidate, Evaluate, Front, Genotype, Problem, Trial
from autotune.search.race import refine
from autotune.search.ratio import dnll_upper_nats
from autotune.search.study import TARGET, Decoder, Outer, Params, Study, decoder, target_grid

ALONG = 4  # points between dense and the fastest, whatever the budget
GRID = 5  # latency targets at which the uncorrected table is decoded
STARTUP = 8  # trials before TPE models anything, the grid included
STUDY_SHARE = 0.75  # of the evaluations; the rest refine
FITTED_EVERY = 3  # one trial in so many is decoded from the fitted correction
DRAWS = 4  # posterior draws tried when the fitted decode was measured before
NEIGHBOURS = 3  # measured candidates nearest the budget that calibrate the aim
ASKS_PER_EVALUATION = 3  # trials that decode to something already measured are free; this bounds how many


def search(
    problem: Problem,
    budget: Budget,
    seed: int,
    trials: int,
    evaluate: Evaluate,
    *,
    looks: int,
    outer: Outer | None = None,
    scores: Mapping[str, Table] | None = None,
    progress: Progress | None = None,
    fast: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Front:
    """Everything measured, and which of it is on the front.

    `trials` are real evaluations after the seeds. `looks`: how many prefixes `evaluate` knows; the last is everything.
    `fast` decodes the uncorrected table at a few latency targets and measures only those. Ctrl-C and `should_stop` end
    the search with what there is. Nothing feasible is not an error here: the caller looks at the front.

    Raises:
        UsageError: `search.trials`, `search.looks`, `search.outer`, `search.parameters`, `search.scores`.
    """
    if trials < 0:
        raise UsageError("search.trials", f"{trials} trials cannot be run.", "Give zero or more.")
    if looks < 1:
        raise UsageError("search.looks", f"{looks} looks cannot be taken.", "Give one or more.")
    ledger = Ledger(problem, budget, evaluate, looks, progress, should_stop)
    decode = decoder(problem, budget)
    grid = target_grid(decode, GRID)
    study = None if fast else Study(decode, seed, outer, STARTUP)
    record: list[Trial] = []
    try:
        if study is None:
            _measure_targets(ledger, decode, grid)
        else:
            _measure_seeds(ledger, decode, grid, scores, trials)
            _measure_along(ledger, decode)
            _run_study(ledger, study, grid, round(trials * STUDY_SHARE), seed, record)
            refine(ledger, decode, trials - round(trials * STUDY_SHARE), seed)
    except (Stopped, KeyboardInterrupt):
        pass
    return _front(ledger, record, 0.0 if study is None else study.seconds)


def trials_for_minutes(minutes: float, seconds_per_evaluation: float, seeds: int = 0) -> int:
    """How many trials fit after the seeds. At least one, so that a short budget still searches."""
    return max(1, int(minutes * 60 / max(seconds_per_evaluation, 1e-6)) - seeds)


def _measure_targets(ledger: Ledger, decode: Decoder, grid: tuple[float, ...]) -> None:
    ledger.planned = 1 + len(grid)
    ledger.measure(decode.problem.dense, "dense")
    for number, target in enumerate(grid):
        ledger.measure(decode.genotype(decode.table.loss, target), f"fast {number}")


def _measure_along(ledger: Ledger, decode: Decoder) -> None:
    """A few points of the uncorrected front between dense and the fastest: what smaller budgets would get."""
    width = decode.slowest_us - decode.fastest_us
    for number in range(1, ALONG + 1):
        target = decode.slowest_us - width * number / (ALONG + 1)
        ledger.measure(decode.genotype(decode.table.loss, target), f"along {number}")


def _measure_seeds(
    ledger: Ledger, decode: Decoder, grid: tuple[float, ...], scores: Mapping[str, Table] | None, trials: int
) -> None:
    named = baselines.seeds(decode.problem, decode.budget.max_loss_nats, grid[:1], scores)
    ledger.planned = len(named) + ALONG + trials
    for name, genotype in named.items():
        ledger.measure(genotype, name)


def _run_study(
    ledger: Ledger, study: Study, grid: tuple[float, ...], evaluations: int, seed: int, record: list[Trial]
) -> None:
    """Trials until the evaluations are spent: the grid, then Optuna's, every few one from the fitted correction."""
    end = ledger.spent + evaluations
    for number in range(evaluations * ASKS_PER_EVALUATION):
        if ledger.spent > end - 0.5:
            return
        if number >= len(grid) and number % FITTED_EVERY == 0:
            candidate, params = _fitted_trial(ledger, study.decode, number, seed)
        else:
            params = study.ask(study.neutral(grid[number]) if number < len(grid) else None)
            candidate = ledger.measure(study.genotype(params), f"study {number}")
            study.tell(candidate, excess(candidate, ledger.budget))
        evaluation = candidate.evaluation
        record.append(
            Trial(number, params, candidate.genotype, candidate.latency_us, evaluation.kl_nats, evaluation.dnll_nats)
        )


def _fitted_trial(ledger: Ledger, decode: Decoder, number: int, seed: int) -> tuple[Candidate, Params]:
    """Decode what the measurements say so far. It stays outside the study: no theta decodes to it."""
    measured = list(ledger.candidates.values())
    fitted = fit(decode.table, [item.genotype for item in measured], [item.evaluation.kl_nats for item in measured])
    target = _aim(ledger, decode, fitted, number)
    genotype = decode.genotype(fitted.losses, target)
    random = np.random.default_rng([seed, 1, number])
    for _ in range(DRAWS):  # already measured: try what the posterior holds possible instead
        if genotype not in ledger.candidates:
            break
        genotype = decode.genotype(fitted.draw(random), target)
    return ledger.measure(genotype, f"fitted {number}"), {TARGET: target}


def _aim(ledger: Ledger, decode: Decoder, fitted: Fit, number: int) -> float:
    """The fastest latency at which the fitted table predicts a loss bound within the budget."""
    limit = ledger.budget.max_loss_nats
    if not math.isfinite(limit) and ledger.budget.max_latency_us is not None:
        return decode.slowest_us
    if not math.isfinite(limit):
        spread = ((number // FITTED_EVERY + 0.5) * 0.6180339887) % 1.0  # even, and never the same target twice
        return decode.fastest_us + spread * (decode.slowest_us - decode.fastest_us)
    factor = _calibration(ledger, fitted, limit)
    hull = decode.hull(fitted.losses)
    low, high = 0, len(hull) - 1
    while low < high:
        middle = (low + high) // 2
        if factor * fitted.kl_nats(hull[middle][1]) <= limit:
            high = middle
        else:
            low = middle + 1
    return min(hull[low][0], decode.slowest_us)


def _calibration(ledger: Ledger, fitted: Fit, limit: float) -> float:
    """Measured loss bound over predicted KL, for the candidates nearest the budget."""
    ratio = ledger.loss_ratio()
    bounds = [(item.genotype, dnll_upper_nats(item.evaluation, ratio)) for item in ledger.candidates.values()]
    usable = [(genotype, bound) for genotype, bound in bounds if bound > 0 and fitted.kl_nats(genotype) > 0]
    usable.sort(key=lambda pair: abs(math.log(pair[1] / limit)) if limit > 0 else pair[1])
    ratios = [bound / fitted.kl_nats(genotype) for genotype, bound in usable[:NEIGHBOURS]]
    return statistics.median(ratios) if ratios else 1.0


def _front(ledger: Ledger, record: list[Trial], seconds: float) -> Front:
    def place(candidate: Candidate) -> tuple[float, Genotype]:
        return candidate.latency_us, candidate.genotype

    candidates = tuple(sorted(ledger.candidates.values(), key=place))
    points = [(candidate.latency_us, candidate.evaluation.kl_nats) for candidate in candidates]
    return Front(candidates, pareto(points), tuple(record), seconds)
