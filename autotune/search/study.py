"""The Optuna study: which correction of the loss table, which latency target and which outer choices to try next.

Each trial is a vector of at most 20 numbers and choices, decoded through the exact knapsack into one option per group,
so every trial meets its latency target. Two objectives, latency and log10 KL; the budget enters as constraints. Trials
are told in order and the sampler is built anew for each from (seed, number): trial N depends on the seed and trials
0..N-1 only. Nothing of Optuna's is stored; a resumed search replays from trial 0.

It does not measure anything and does not know the fitted correction; `run.py` joins the two.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from autotune.errors import InfeasibleError, UsageError
from autotune.search.correction import FLOOR_NATS, Features, byte_table, features, latency_table
from autotune.search.knapsack import Floats, hull_front, solve
from autotune.search.problem import Budget, Candidate, Genotype, Problem

Outer = Mapping[str, tuple[tuple[str, ...], ...]]
Params = dict[str, float | str]

MAX_PARAMETERS = 20
MAX_LOG_FACTOR = 1.2  # a multiplier lies within e^-1.2 .. e^1.2 of the table
POWER = (0.6, 1.6)
TARGET = "latency_target_us"
LATENCY_WINDOW = 0.1  # of the whole range, below a latency limit that comes without a loss limit
LARGEST_LOSS, SMALLEST_LOSS = 10.0, 0.03  # the latency targets searched, by predicted loss over the budget's


@dataclass(frozen=True)
class Decoder:
    """Turns a latency target and a corrected loss table into a genotype, within the budget's bytes where possible."""

    problem: Problem
    budget: Budget
    table: Features
    latency: Floats  # (groups, options)
    weight_bytes: Floats
    fastest_us: float
    slowest_us: float

    def genotype(self, losses: Floats, target_us: float, allowed: Floats | None = None) -> Genotype:
        """Least corrected loss at `target_us` or below; a target out of reach gives the fastest there is."""
        latency = self.latency if allowed is None else np.where(allowed > 0, self.latency, np.inf)
        limit = max(target_us - self.problem.rest_us, float(latency.min(axis=1).sum()))
        genotype = solve(losses, latency, limit)
        room = self.budget.max_bytes
        if room is None or self.problem.weight_bytes(genotype) <= room:
            return genotype
        try:
            return solve(losses, latency, limit, self.weight_bytes, room - self.problem.fixed_bytes, exact=False)
        except InfeasibleError:
            return solve(self.weight_bytes, latency, limit)

    def hull(self, losses: Floats) -> list[tuple[float, Genotype]]:
        """The Lagrangian front of a table: (latency of the model in microseconds, genotype), fastest first."""
        return [(self.problem.rest_us + total, genotype) for total, genotype in hull_front(losses, self.latency)]

    def allowed(self, schemes: set[str]) -> Floats:
        """1 for the options of these schemes and for the dense ones."""
        mask = np.zeros(self.latency.shape)
        for index, group in enumerate(self.problem.groups):
            for option, entry in enumerate(group.options):
                mask[index, option] = float(option == 0 or entry.scheme in schemes)
        return mask


def decoder(problem: Problem, budget: Budget) -> Decoder:
    latency = latency_table(problem)
    for group, option in problem.settled:
        latency[group, np.arange(latency.shape[1]) != option] = np.inf
    table = features(problem)
    sizes = byte_table(problem)
    fastest = problem.rest_us + float(latency.min(axis=1).sum())
    slowest = problem.latency_us(problem.dense)
    if budget.max_bytes is not None:
        fastest, slowest = _within_bytes(problem, table.loss, latency, sizes, budget.max_bytes, (fastest, slowest))
    if budget.max_latency_us is not None:
        slowest = min(slowest, budget.max_latency_us)
    return Decoder(problem, budget, table, latency, sizes, fastest, max(fastest, slowest))


def _within_bytes(
    problem: Problem, loss: Floats, latency: Floats, sizes: Floats, limit: int, ends_us: tuple[float, float]
) -> tuple[float, float]:
    """(fastest, slowest) worth aiming at: what is small enough may be slower than dense."""
    room = limit - problem.fixed_bytes
    try:
        fastest, safest = solve(latency, sizes, room), solve(loss, sizes, room)
    except InfeasibleError:  # nothing is small enough; the search says what is nearest
        return ends_us
    return problem.latency_us(fastest), max(ends_us[1], problem.latency_us(safest))


def target_at_loss(decode: Decoder, loss_nats: float) -> float:
    """The latency at which the uncorrected table predicts this loss, within the range searched."""
    fitting = [
        latency
        for latency, genotype in decode.hull(decode.table.loss)
        if decode.problem.loss_nats(genotype) <= loss_nats
    ]
    return min(max(fitting[0] if fitting else decode.slowest_us, decode.fastest_us), decode.slowest_us)


def target_grid(decode: Decoder, count: int) -> tuple[float, ...]:
    """Latency targets around the budget, most promising first; where loss is not limited, over the whole range."""
    limit = decode.budget.max_loss_nats
    if math.isfinite(limit):
        factors = (1.0, 0.6, 1.6, 0.35, 2.5, 0.2, 4.0)[:count]
        targets = [target_at_loss(decode, factor * max(limit, 0.0)) for factor in factors]
    else:
        width = decode.slowest_us - decode.fastest_us
        if decode.budget.max_latency_us is None:
            targets = [decode.slowest_us - width * (index + 0.5) / count for index in range(count)]
        else:  # the limit itself is the first target
            targets = [decode.slowest_us - LATENCY_WINDOW * width * index / count for index in range(count)]
    return tuple(dict.fromkeys(targets))


class Study:
    """Asks Optuna and tells it. `seconds` is the time spent inside Optuna."""

    def __init__(self, decode: Decoder, seed: int, outer: Outer | None, startup: int) -> None:
        import optuna

        self.decode = decode
        self.outer = dict(outer or {})
        self.seconds = 0.0
        self._optuna = optuna
        self._seed = seed
        self._startup = startup
        self._ranges = _ranges(decode)
        _check_outer(self.outer, decode, len(self._ranges))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._inside():
            self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=self._sampler(0))
        self._trial: Any = None

    def ask(self, fixed: Params | None = None) -> Params:
        """The next parameters; `fixed` ones are taken as they are."""
        with self._inside():
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self._sampler(number)
            if fixed is not None:
                self._study.enqueue_trial(fixed)
            trial = self._trial = self._study.ask()
            params: Params = {name: trial.suggest_float(name, *ends) for name, ends in self._ranges.items()}
            for name, subsets in self.outer.items():
                params[name] = trial.suggest_categorical(name, [_label(subset) for subset in subsets])
        return params

    def tell(self, candidate: Candidate, missed: Mapping[str, float]) -> None:
        with self._inside():
            if hasattr(self._trial, "set_constraint"):
                for name, value in missed.items():
                    self._trial.set_constraint(name, value)
            else:
                self._trial.set_user_attr("missed", list(missed.values()))
            kl = max(candidate.evaluation.kl_nats, FLOOR_NATS)
            self._study.tell(self._trial, [candidate.latency_us, math.log10(kl)])

    def neutral(self, target_us: float) -> Params:
        """The uncorrected table at one latency target, all schemes allowed as far as the outer choices let them."""
        params: Params = {name: 0.0 for name in self._ranges}
        params |= {name: _label(max(subsets, key=len)) for name, subsets in self.outer.items()}
        return params | {"power": 1.0, TARGET: target_us}

    def genotype(self, params: Params) -> Genotype:
        names = self.decode.table.names
        theta = np.array([params[name] for name in names], float)
        losses = self.decode.table.corrected(theta, float(params["power"]))
        return self.decode.genotype(losses, float(params[TARGET]), self.allowed(params))

    def allowed(self, params: Params) -> Floats | None:
        """What the outer choices leave: a scheme must be in every chosen subset."""
        if not self.outer:
            return None
        chosen = [
            set(subset) for name, subsets in self.outer.items() for subset in subsets if _label(subset) == params[name]
        ]
        return self.decode.allowed(set.intersection(*chosen))

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        older = not hasattr(self._optuna.trial.Trial, "set_constraint")
        extra: dict[str, Any] = {"constraints_func": lambda trial: trial.user_attrs.get("missed", [])} if older else {}
        return self._optuna.samplers.TPESampler(
            n_startup_trials=self._startup, multivariate=True, constant_liar=False, seed=seed, **extra
        )

    @contextmanager
    def _inside(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            self.seconds += time.perf_counter() - start


def _ranges(decode: Decoder) -> dict[str, tuple[float, float]]:
    ranges = {name: (-MAX_LOG_FACTOR, MAX_LOG_FACTOR) for name in decode.table.names}
    limit = decode.budget.max_loss_nats
    low, high = decode.fastest_us, decode.slowest_us
    if not math.isfinite(limit) and decode.budget.max_latency_us is not None:
        low = high - LATENCY_WINDOW * (high - low)
    elif math.isfinite(limit) and limit > 0:
        low, high = target_at_loss(decode, LARGEST_LOSS * limit), target_at_loss(decode, SMALLEST_LOSS * limit)
    return ranges | {"power": POWER, TARGET: (low, high)}


def _check_outer(outer: Outer, decode: Decoder, numbers: int) -> None:
    if numbers + len(outer) > MAX_PARAMETERS:
        hint = "Merge some of the outer choices."
        raise UsageError(
            "search.parameters", f"{numbers + len(outer)} parameters are more than {MAX_PARAMETERS}.", hint
        )
    known = {option.scheme for group in decode.problem.groups for option in group.options}
    for name, subsets in outer.items():
        labels = [_label(subset) for subset in subsets]
        unknown = sorted({scheme for subset in subsets for scheme in subset} - known)
        if not subsets or len(set(labels)) < len(labels) or unknown or name in decode.table.names:
            detail = f"unknown: {', '.join(unknown)}" if unknown else "each subset of schemes may appear once"
            raise UsageError("search.outer", f"the outer choice {name!r} cannot be used ({detail}).")


def _label(subset: tuple[str, ...]) -> str:
    return " | ".join(subset)
