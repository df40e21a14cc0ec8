"""What others would choose, decoded on our tables: the configurations our result must not lose to.

    uniform       one scheme everywhere it can run
    greedy        the layer-wise rule: compress the group that saves most time per estimated loss, up to the budget
    bits          the knapsack of ModelOpt's auto_quantize and AutoRound's AutoScheme: least additive loss at so many
                  effective bits per weight, blind to latency
    latency       the same knapsack on measured latency, for the scores of others

`BASELINES` takes any loss table, so a peer's score (ModelOpt's elementwise one, HIGGS, delta loss) is one more table.
Only the allocation is theirs: weights, kernels and measurements are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autotune.errors import InfeasibleError, UsageError
from autotune.search.correction import byte_table, latency_table, loss_table
from autotune.search.knapsack import Floats, Table, solve
from autotune.search.problem import Genotype, Problem

EFFECTIVE_BITS = (4.5, 6.0, 8.0)  # per weight of the layer groups, where the dense model has 16


@dataclass(frozen=True)
class Setting:
    """A problem as a peer sees it: its own scores, and the latency targets at which it is asked."""

    problem: Problem
    scores: Floats  # (groups, options), any unit
    max_loss_nats: float
    targets_us: tuple[float, ...]


def uniform(setting: Setting) -> dict[str, Genotype]:
    problem = setting.problem
    schemes = sorted({option.scheme for group in problem.groups for option in group.options[1:]})
    return {scheme: problem.uniform(scheme) for scheme in schemes}


def greedy(setting: Setting) -> dict[str, Genotype]:
    """Changes one group at a time, most microseconds per nat first, and never takes a change back."""
    latency, losses = latency_table(setting.problem), setting.scores
    choice = np.zeros(len(losses), np.int64)
    rows = np.arange(len(losses))
    total = float(losses[rows, choice].sum())
    while True:
        saved = latency[rows, choice][:, None] - latency
        added = losses - losses[rows, choice][:, None]
        fitting = (saved > 0) & (total + added <= setting.max_loss_nats)
        if not fitting.any():
            return {"to the budget": tuple(choice.tolist())}
        rate = np.where(fitting, np.where(saved > 0, saved, 0) / np.maximum(added, 1e-12), -np.inf)
        group, option = divmod(int(np.argmax(rate)), losses.shape[1])
        total += float(added[group, option])
        choice[group] = option


def bits(setting: Setting) -> dict[str, Genotype]:
    sizes = byte_table(setting.problem)
    found = {}
    for target in EFFECTIVE_BITS:
        limit = float(sizes[:, 0].sum()) * target / 16
        try:
            found[f"{target:g}"] = solve(setting.scores, sizes, limit)
        except InfeasibleError:  # no choice is that small
            continue
    return found


def latency(setting: Setting) -> dict[str, Genotype]:
    table = latency_table(setting.problem)
    limits = {target: target - setting.problem.rest_us for target in setting.targets_us}
    return {f"{target:.0f} us": solve(setting.scores, table, limit) for target, limit in limits.items()}


Baseline = Callable[[Setting], dict[str, Genotype]]
BASELINES: dict[str, Baseline] = {"uniform": uniform, "greedy": greedy, "bits": bits}
SCORED: dict[str, Baseline] = {"bits": bits, "latency": latency}


def seeds(
    problem: Problem,
    max_loss_nats: float,
    targets_us: tuple[float, ...],
    scores: Mapping[str, Table] | None = None,
) -> dict[str, Genotype]:
    """Every baseline by name, `dense` first; equal configurations appear once, under their first name.

    Raises:
        UsageError: `search.scores` when a table does not have one number per option.
    """
    own = Setting(problem, loss_table(problem), max_loss_nats, targets_us)
    named = {"dense": problem.dense}
    for name, baseline in BASELINES.items():
        named |= {f"{name} {label}": genotype for label, genotype in baseline(own).items()}
    for score, table in (scores or {}).items():
        theirs = Setting(problem, _scores(problem, score, table), max_loss_nats, targets_us)
        for name, baseline in SCORED.items():
            named |= {f"{score} {name} {label}": genotype for label, genotype in baseline(theirs).items()}
    first: dict[Genotype, str] = {}
    for name, genotype in named.items():
        first.setdefault(genotype, name)
    return {name: genotype for genotype, name in first.items()}


def _scores(problem: Problem, name: str, table: Table) -> Floats:
    padded = np.full(latency_table(problem).shape, np.inf)
    if len(table) != len(problem.groups):
        raise UsageError("search.scores", f"the table {name!r} has {len(table)} rows for {len(problem.groups)} groups.")
    for index, (row, group) in enumerate(zip(table, problem.groups, strict=True)):
        if len(row) < len(group.options) or not np.all(np.isfinite(row[: len(group.options)])):
            raise UsageError("search.scores", f"the table {name!r} lacks a finite score for an option of {group.name}.")
        padded[index, : len(group.options)] = row[: len(group.options)]
    return padded
