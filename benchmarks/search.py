"""How good is the search at an equal number of real evaluations? Measured KL at latency targets, several seeds.

    autotune tune MODEL --out runs/here                   # latencies measured on this machine
    autotune tune MODEL --target h100 --out runs/h100     # latencies estimated from the profile, 2:4 in the space
    python benchmarks/search.py --run RUN [--json FILE] [--evaluations 40] [--seeds 0,1,2] [--targets 5] [--tokens 2048]
    python benchmarks/search.py --synthetic [--layers 16] [--evaluations 60]

`--run` takes the tables of a finished run and measures the loss of every proposal on its search documents; every
measurement is remembered in the run folder, so a benchmark that was stopped goes on where it was. With the defaults it
measures about 450 configurations, 40 for each method and seed: under 20 minutes on 2 cores for a model of 14M
parameters. `--synthetic` is a made-up problem with a known truth and needs no model.

The targets are spread evenly between the fastest and the dense configuration. On a made-up problem every method is
asked for one target at a time, and pays for nothing above it. On a run, where evaluations are dear, a method searches
the whole front once per seed and every target is read off it: the least measured KL at or below that latency.

ours          `autotune.search.run.search`; its seeds (what peers would choose) count as evaluations
fast          the same with `fast`: the uncorrected table near each target, a handful of evaluations a target
nsga2, tpe    Optuna on one categorical per layer group, the uniform schemes enqueued first; for the front two
              objectives, for one target latency as a constraint
random        every configuration drawn with its own random mix of schemes
uniform       one scheme everywhere

A configuration counts as an evaluation for every method that asks for it, measured before or not. `--json` writes the
setting (target, whether latencies are measured or estimated, documents, tokens, ...) and `rows`, one per method, seed
and target:
    method, seed
    target_us         the latency target
    speedup           dense latency / target
    kl_nats           least measured KL of a configuration at or below the target; null if there is none. For encoders
                      the relative squared error
    hypervolume       of all that the seed measured: the mean of -log10 KL over the latencies from the fastest
                      configuration to dense; KL below 1e-6 counts as 1e-6, above 1 as 1
    evaluations       real evaluations, in units of a full one: at this target, or for the whole front
    seconds           wall time of them; less where the losses were known

`compare` takes any problem and `evaluate`, so tables measured elsewhere are compared the same way.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from finished_run import finished_run

from autotune.errors import AutotuneError
from autotune.search.front import hypervolume
from autotune.search.problem import Budget, Evaluate, Evaluation, Front, Genotype, Problem
from autotune.search.run import GRID, search
from autotune.search.study import Outer
from autotune.search.synthetic import synthetic
from autotune.store import write_json

ASKS_PER_EVALUATION = 10  # a method may propose this many configurations for each that it measures
GENERATIONS = 4  # of NSGA-II
FLOOR_NATS = 1e-6
SAY_EVERY = 15.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Task:
    problem: Problem
    evaluate: Evaluate
    looks: int
    target_us: float  # infinite: the whole front is wanted
    evaluations: int  # allowed to every method
    seed: int
    outer: Outer | None = None

    @property
    def budget(self) -> Budget:
        return Budget(math.inf, max_latency_us=None if math.isinf(self.target_us) else self.target_us)

    def meets(self, genotype: Genotype) -> bool:
        return self.problem.latency_us(genotype) <= self.target_us

    def kl_nats(self, genotype: Genotype) -> float:
        return self.evaluate(genotype, self.looks - 1).kl_nats


@dataclass(frozen=True)
class Row:
    method: str
    seed: int
    target_us: float
    speedup: float
    kl_nats: float | None
    hypervolume: float
    evaluations: float
    seconds: float


Watch = Callable[[str, float, float], None]  # (what is running, evaluations made, out of about so many)


class Counted:
    """Remembers every evaluation, and what it cost in tokens."""

    def __init__(self, evaluate: Evaluate, looks: int, watch: Callable[[int], None] = lambda _: None) -> None:
        self._evaluate = evaluate
        self._looks = looks
        self._watch = watch
        self.seen: dict[tuple[Genotype, int], Evaluation] = {}

    def __call__(self, genotype: Genotype, look: int) -> Evaluation:
        if (genotype, look) not in self.seen:
            self.seen[genotype, look] = self._evaluate(genotype, look)
            self._watch(len(self.full))
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
    def play(trials: int) -> Front:
        return search(task.problem, task.budget, task.seed, trials, task.evaluate, looks=task.looks, outer=task.outer)

    before_trials = len(play(0).candidates)  # counted once: the second call finds them measured
    play(max(0, task.evaluations - before_trials))


def fast(task: Task) -> None:
    search(task.problem, task.budget, task.seed, 0, task.evaluate, looks=task.looks, fast=True)


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

    population = max(4, task.evaluations // GENERATIONS)
    _categoricals(task, optuna.samplers.NSGAIISampler(population_size=population, seed=task.seed))


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
ONE_TARGET = ("fast",)  # made for one target; for the front it is asked for each


def targets_us(problem: Problem, count: int) -> list[float]:
    fastest, dense = _range_us(problem)
    return [fastest + (dense - fastest) * (index + 1) / (count + 1) for index in range(count)]


def compare(
    problem: Problem,
    evaluate: Evaluate,
    looks: int,
    evaluations: int,
    seeds: Sequence[int],
    targets: int,
    *,
    whole_front: bool = False,
    outer: Outer | None = None,
    watch: Watch = lambda label, done, planned: None,
) -> list[Row]:
    """Every method on one problem, each from the same number of evaluations: at each target, or for the whole front."""
    limits = targets_us(problem, targets)
    dense = problem.latency_us(problem.dense)
    planned = {method: evaluations * (1 if whole_front else targets) for method in METHODS}
    planned |= {"fast": (1 + GRID) * targets, "uniform": len(_uniform(problem)) * (1 if whole_front else targets)}
    total, done = float(sum(planned.values()) * len(seeds)), 0.0
    rows: list[Row] = []
    for method in METHODS:
        for seed in seeds:
            played: list[tuple[float, Counted, float]] = []

            def say(count: int, label: str = f"{method}, seed {seed}", before: float = done) -> None:
                watch(label, before + count, total)

            task = Task(problem, evaluate, looks, math.inf, evaluations, seed, outer)
            if whole_front:
                counted, seconds = _play(method, task, limits if method in ONE_TARGET else [math.inf], say)
                played = [(limit, counted, seconds) for limit in limits]
            else:
                played = [(limit, *_play(method, task, [limit], say)) for limit in limits]
            done += planned[method]
            area = _area(problem, [counted for _, counted, _ in played])
            for limit, counted, seconds in played:
                kl = _least_kl(problem, counted, limit)
                rows.append(Row(method, seed, limit, dense / limit, kl, area, counted.spent, seconds))
    return rows


def _play(method: str, task: Task, limits: list[float], say: Callable[[int], None]) -> tuple[Counted, float]:
    """What a method measured for these targets together, and the seconds it took."""
    counted = Counted(task.evaluate, task.looks, say)
    start = time.perf_counter()
    for limit in limits:
        METHODS[method](replace(task, evaluate=counted, target_us=limit))
    return counted, time.perf_counter() - start


def _least_kl(problem: Problem, counted: Counted, limit_us: float) -> float | None:
    fitting = (value.kl_nats for genotype, value in counted.full.items() if problem.latency_us(genotype) <= limit_us)
    return min(fitting, default=None)


def _range_us(problem: Problem) -> tuple[float, float]:
    """Latency of the fastest configuration and of dense."""
    fastest = problem.rest_us + sum(min(option.latency_us for option in group.options) for group in problem.groups)
    return fastest, problem.latency_us(problem.dense)


def _area(problem: Problem, measured: list[Counted]) -> float:
    fastest, dense = _range_us(problem)
    points = []
    for counted in measured:
        for genotype, value in counted.full.items():
            share = (problem.latency_us(genotype) - fastest) / (dense - fastest)
            points.append((share, math.log10(max(value.kl_nats, FLOOR_NATS))))
    return hypervolume(points, (1.0, 0.0))


def table(rows: list[Row]) -> str:
    """By method and target: geometric mean of KL over seeds, (least..largest) where they differ."""
    targets = sorted({row.target_us: row.speedup for row in rows}.items())
    titles = [f"KL at {target:.4g} us, {speedup:.4g}x" for target, speedup in targets]
    header = ["method", *titles, "hypervolume", "evaluations", "seconds"]
    lines = [header]
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        cells = [_kl_cell([row for row in mine if row.target_us == target]) for target, _ in targets]
        others = [
            statistics.mean(getattr(row, name) for row in mine) for name in ("hypervolume", "evaluations", "seconds")
        ]
        lines.append([method, *cells, f"{others[0]:.3f}", f"{others[1]:.1f}", f"{others[2]:.2f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _kl_cell(rows: list[Row]) -> str:
    """ "1.23 (0.98..1.60)e-04", or "none" where a seed has no configuration that fast."""
    found = [max(row.kl_nats, FLOOR_NATS) for row in rows if row.kl_nats is not None]
    if len(found) < len(rows):
        return "none"
    mean = math.exp(statistics.mean(math.log(value) for value in found))
    digits, _, exponent = f"{mean:.2e}".partition("e")
    low, high = (f"{value / 10 ** int(exponent):.2f}" for value in (min(found), max(found)))
    return f"{digits}e{exponent}" if low == high else f"{digits} ({low}..{high})e{exponent}"


def _uniform(problem: Problem) -> list[Genotype]:
    schemes = sorted({option.scheme for group in problem.groups for option in group.options})
    return list(dict.fromkeys([problem.dense, *(problem.uniform(scheme) for scheme in schemes)]))


def _categoricals(task: Task, sampler: Any) -> None:
    """One categorical per group: what a general-purpose optimizer is given when nothing is known."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [group.name for group in task.problem.groups]
    sizes = [list(range(len(group.options))) for group in task.problem.groups]
    whole_front = math.isinf(task.target_us)
    measured: set[Genotype] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(directions=["minimize"] * (1 + whole_front), sampler=sampler)
        for genotype in _uniform(task.problem):
            study.enqueue_trial(dict(zip(names, genotype, strict=True)))
        for _ in range(ASKS_PER_EVALUATION * task.evaluations):
            trial = study.ask()
            genotype = tuple(trial.suggest_categorical(name, size) for name, size in zip(names, sizes, strict=True))
            latency_us = task.problem.latency_us(genotype)
            if not whole_front:
                trial.set_constraint("latency", latency_us - task.target_us)
            if task.meets(genotype):
                measured.add(genotype)
            kl = task.kl_nats(genotype) if task.meets(genotype) else 1.0
            loss = math.log10(max(kl, FLOOR_NATS))
            study.tell(trial, [latency_us, loss] if whole_front else loss)
            if len(measured) == task.evaluations:
                return


class Clock:
    """Says on stderr, every few seconds, what is running and about how long is left."""

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()

    def __call__(self, label: str, done: float, planned: float) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_EVERY and done > 0:
            self._said = now
            left = (now - self._start) / done * max(0.0, planned - done)
            line = f"{label}: {done:.0f} of about {planned:.0f} evaluations, about {left / 60:.0f} min left"
            print(line, file=sys.stderr, flush=True)


def on_run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    with finished_run(arguments.run, arguments.tokens) as run:
        rows = compare(
            run.problem,
            run.evaluate,
            run.looks,
            arguments.evaluations or 40,
            arguments.seeds,
            arguments.targets,
            whole_front=True,
            outer=run.outer,
            watch=Clock(),
        )
        fastest, dense = _range_us(run.problem)
        return run.about | {"fastest_us": fastest, "dense_us": dense}, rows


def on_synthetic(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    made = synthetic(arguments.layers, arguments.problem_seed)
    evaluations = arguments.evaluations or 60
    rows = compare(
        made.problem, made.evaluate, made.looks, evaluations, arguments.seeds, arguments.targets, watch=Clock()
    )
    return {"synthetic": arguments.problem_seed, "layers": arguments.layers}, rows


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Search methods at an equal number of real evaluations.")
    problem = parser.add_mutually_exclusive_group(required=True)
    problem.add_argument("--run", type=Path, help="a finished run's folder")
    problem.add_argument("--synthetic", action="store_true", help="a made-up problem with a known truth")
    parser.add_argument("--layers", type=int, default=16, help="of the made-up problem")
    parser.add_argument("--problem-seed", type=int, default=0, help="of the made-up problem")
    parser.add_argument("--tokens", type=int, default=2048, help="search tokens that a loss is measured on")
    parser.add_argument("--evaluations", type=int, help="for each method and seed; default 40, made-up 60")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma-separated")
    parser.add_argument("--targets", type=int, default=5, help="how many latency targets")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    try:
        about, rows = on_run(arguments) if arguments.run else on_synthetic(arguments)
        print(", ".join(f"{name} {value}" for name, value in about.items() if not isinstance(value, list)))
        print(table(rows))
        if arguments.json:
            write_json(arguments.json, about | {"rows": [asdict(row) for row in rows]})
    except AutotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
