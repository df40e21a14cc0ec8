"""How good is the search at an equal number of real evaluations? Measured KL at five latency targets, three seeds.

    python benchmarks/search.py --synthetic [--layers 16] [--evaluations 60] [--seeds 3] [--json FILE]

Every method is asked for the least KL at one target at a time. Latency is known unmeasured, so no method pays for
a configuration above the target.

ours          `autotune.search.run.search`; its seeds (what peers would choose) count as evaluations
fast          the same with `fast`: the uncorrected table near the target, a handful of evaluations
nsga2, tpe    Optuna on one categorical per layer group, latency as a constraint, the uniform schemes enqueued first
random        every configuration drawn with its own random mix of schemes
uniform       one scheme everywhere

Rows written by `--json` (a list of objects, one per method, seed and target):
    method, seed
    target_us         the latency target
    kl_nats           least measured KL of a configuration at or below the target; null if there is none
    hypervolume       of the seed's five results in (latency / dense latency, log10 KL), against (1, 0); KL below 1e-6
                      counts as 1e-6
    evaluations       real evaluations used at this target, in units of a full one
    seconds           wall time at this target, evaluations included

`compare` takes any problem and `evaluate`, so tables measured elsewhere are compared the same way.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune.search import baselines
from autotune.search.front import hypervolume
from autotune.search.problem import Budget, Evaluate, Evaluation, Genotype, Problem
from autotune.search.run import search
from autotune.search.synthetic import synthetic

TARGETS = 5
ASKS_PER_EVALUATION = 10  # a method may propose this many configurations for each that it measures
FLOOR_NATS = 1e-6


@dataclass(frozen=True)
class Task:
    problem: Problem
    evaluate: Evaluate
    looks: int
    target_us: float
    evaluations: int  # allowed to every method
    seed: int

    def meets(self, genotype: Genotype) -> bool:
        return self.problem.latency_us(genotype) <= self.target_us

    def kl_nats(self, genotype: Genotype) -> float:
        return self.evaluate(genotype, self.looks - 1).kl_nats


@dataclass(frozen=True)
class Row:
    method: str
    seed: int
    target_us: float
    kl_nats: float | None
    hypervolume: float
    evaluations: float
    seconds: float


class Counted:
    """Remembers every evaluation, and what it cost in tokens."""

    def __init__(self, evaluate: Evaluate, looks: int) -> None:
        self._evaluate = evaluate
        self._looks = looks
        self.seen: dict[tuple[Genotype, int], Evaluation] = {}

    def __call__(self, genotype: Genotype, look: int) -> Evaluation:
        if (genotype, look) not in self.seen:
            self.seen[genotype, look] = self._evaluate(genotype, look)
        return self.seen[genotype, look]

    @property
    def full(self) -> dict[Genotype, Evaluation]:
        return {genotype: evaluation for (genotype, look), evaluation in self.seen.items() if look == self._looks - 1}

    @property
    def spent(self) -> float:
        """A genotype costs its longest look: the shorter ones are prefixes of it."""
        tokens: dict[Genotype, float] = {}
        for (genotype, _), evaluation in self.seen.items():
            tokens[genotype] = max(tokens.get(genotype, 0.0), sum(evaluation.tokens))
        return sum(tokens.values()) / max(tokens.values(), default=1.0)


def ours(task: Task) -> None:
    seeds = baselines.seeds(task.problem, math.inf, ())
    trials = max(0, task.evaluations - len(seeds))
    budget = Budget(math.inf, max_latency_us=task.target_us)
    search(task.problem, budget, task.seed, trials, task.evaluate, looks=task.looks)


def fast(task: Task) -> None:
    budget = Budget(math.inf, max_latency_us=task.target_us)
    search(task.problem, budget, task.seed, 0, task.evaluate, looks=task.looks, fast=True)


def uniform(task: Task) -> None:
    for genotype in filter(task.meets, _uniform(task.problem)):
        task.kl_nats(genotype)


def random(task: Task) -> None:
    generator = np.random.default_rng(task.seed)
    schemes = sorted({option.scheme for group in task.problem.groups for option in group.options})
    found: set[Genotype] = set()
    for _ in range(ASKS_PER_EVALUATION * task.evaluations):
        mix = dict(zip(schemes, generator.dirichlet(np.full(len(schemes), 0.5)).tolist(), strict=True))
        genotype = []
        for group in task.problem.groups:
            weights = np.array([mix[option.scheme] + 1e-9 for option in group.options])
            genotype.append(int(generator.choice(len(weights), p=weights / weights.sum())))
        if task.meets(tuple(genotype)):
            task.kl_nats(tuple(genotype))
            found.add(tuple(genotype))
        if len(found) == task.evaluations:
            return


def nsga2(task: Task) -> None:
    import optuna

    _categoricals(task, optuna.samplers.NSGAIISampler(population_size=20, seed=task.seed))


def tpe(task: Task) -> None:
    import optuna

    _categoricals(task, optuna.samplers.TPESampler(multivariate=True, constant_liar=False, seed=task.seed))


METHODS: dict[str, Callable[[Task], None]] = {
    "ours": ours,
    "fast": fast,
    "nsga2": nsga2,
    "tpe": tpe,
    "random": random,
    "uniform": uniform,
}


def targets_us(problem: Problem) -> list[float]:
    fastest = problem.rest_us + sum(min(option.latency_us for option in group.options) for group in problem.groups)
    dense = problem.latency_us(problem.dense)
    return [fastest + (dense - fastest) * (index + 1) / (TARGETS + 1) for index in range(TARGETS)]


def compare(problem: Problem, evaluate: Evaluate, looks: int, evaluations: int, seeds: int) -> list[Row]:
    """Every method on one problem, each from the same number of evaluations."""
    rows = []
    for method, play in METHODS.items():
        for seed in range(seeds):
            found = []
            for target in targets_us(problem):
                counted = Counted(evaluate, looks)
                task = Task(problem, counted, looks, target, evaluations, seed)
                start = time.perf_counter()
                play(task)
                seconds = time.perf_counter() - start
                kl = min(
                    (value.kl_nats for genotype, value in counted.full.items() if task.meets(genotype)), default=None
                )
                found.append(Row(method, seed, target, kl, 0.0, counted.spent, seconds))
            area = _area(problem, found)
            rows += [replace(row, hypervolume=area) for row in found]
    return rows


def _area(problem: Problem, rows: list[Row]) -> float:
    dense = problem.latency_us(problem.dense)
    points = [
        (row.target_us / dense, math.log10(max(row.kl_nats, FLOOR_NATS))) for row in rows if row.kl_nats is not None
    ]
    return hypervolume(points, (1.0, 0.0))


def table(rows: list[Row]) -> str:
    """Geometric mean of KL over seeds, by method and target."""
    targets = sorted({row.target_us for row in rows})
    header = ["method", *(f"KL at {target:.0f} us" for target in targets), "hypervolume", "evaluations", "seconds"]
    lines = [header]
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        cells = [_mean_kl([row for row in mine if row.target_us == target]) for target in targets]
        others = [
            statistics.mean(getattr(row, name) for row in mine) for name in ("hypervolume", "evaluations", "seconds")
        ]
        lines.append([method, *cells, f"{others[0]:.3f}", f"{others[1]:.1f}", f"{others[2]:.2f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _mean_kl(rows: list[Row]) -> str:
    found = [max(row.kl_nats, FLOOR_NATS) for row in rows if row.kl_nats is not None]
    if len(found) < len(rows):
        return "none"
    return f"{math.exp(statistics.mean(math.log(value) for value in found)):.2e}"


def _uniform(problem: Problem) -> list[Genotype]:
    schemes = sorted({option.scheme for group in problem.groups for option in group.options})
    return list(dict.fromkeys([problem.dense, *(problem.uniform(scheme) for scheme in schemes)]))


def _categoricals(task: Task, sampler: Any) -> None:
    """One categorical per group: what a general-purpose optimizer is given when nothing is known."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [group.name for group in task.problem.groups]
    sizes = [list(range(len(group.options))) for group in task.problem.groups]
    measured: set[Genotype] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="minimize", sampler=sampler)
        for genotype in _uniform(task.problem):
            study.enqueue_trial(dict(zip(names, genotype, strict=True)))
        for _ in range(ASKS_PER_EVALUATION * task.evaluations):
            trial = study.ask()
            genotype = tuple(trial.suggest_categorical(name, size) for name, size in zip(names, sizes, strict=True))
            trial.set_constraint("latency", task.problem.latency_us(genotype) - task.target_us)
            if task.meets(genotype):
                measured.add(genotype)
            kl = task.kl_nats(genotype) if task.meets(genotype) else 1.0
            study.tell(trial, math.log10(max(kl, FLOOR_NATS)))
            if len(measured) == task.evaluations:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description="Search methods at an equal number of real evaluations.")
    parser.add_argument("--synthetic", action="store_true", required=True, help="a made-up problem with a known truth")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--problem-seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    made = synthetic(arguments.layers, arguments.problem_seed)
    rows = compare(made.problem, made.evaluate, made.looks, arguments.evaluations, arguments.seeds)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
