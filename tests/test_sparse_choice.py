"""Given what 2:4 costs, the tuner uses it everywhere, somewhere or nowhere; latencies are shares measured on a CPU."""

from __future__ import annotations

import pytest

from autotune.search.front import fits
from autotune.search.problem import Budget, Evaluation, GroupOptions, Option, Problem
from autotune.search.run import search

# Decode of 4096 x 4096 out of cache, this project's kernels: share of the dense bf16 latency, and bits a weight.
SCHEMES = {
    "bf16": (1.0, 16.0),
    "w8a8-int8": (0.50, 8.0),
    "w4a8-int4-g128": (0.26, 4.125),
    "2:4": (0.63, 9.0),
    "2:4+w8a8-int8": (0.35, 5.0),
    "2:4+w4a8-int4-g128": (0.21, 3.125),
}
ROLES = {"qkv": 1.5, "o": 1.0, "gate_up": 5.0, "down": 2.5}
QUANTIZATION = {"w8a8-int8": 1e-6, "w4a8-int4-g128": 6e-5}
BUDGET = Budget(0.01)


def _problem(pruning) -> Problem:
    """`pruning(layer, role)`: nats that 2:4 adds to a group."""
    groups = []
    for layer in range(6):
        for role, size in ROLES.items():
            options = []
            for name, (share, bits) in SCHEMES.items():
                loss = QUANTIZATION.get(name.removeprefix("2:4+"), 0.0)
                loss += pruning(layer, role) if name.startswith("2:4") else 0.0
                options.append(Option(name, "kernel", 100.0 * size * share, loss, int(size * 1e5 * bits / 8)))
            groups.append(GroupOptions(f"layers.{layer}.{role}", role, layer, tuple(options)))
    return Problem(tuple(groups), 200.0, 0)


def _pruned(problem: Problem) -> int:
    """How many groups of the fastest plan within the budget are sparse."""

    def evaluate(genotype, look):
        loss = problem.loss_nats(genotype)
        return Evaluation((500.0,) * 8, (500.0 * loss,) * 8, (500.0 * loss,) * 8)

    front = search(problem, BUDGET, 0, 12, evaluate, looks=1)
    best = front.best([fits(candidate, BUDGET) for candidate in front.candidates])
    assert best is not None
    return sum(option.scheme.startswith("2:4") for option in problem.chosen(best.genotype))


GROUPS = 6 * len(ROLES)
CASES = {
    "free": (lambda layer, role: 0.0, range(GROUPS, GROUPS + 1)),
    "fairly priced": (lambda layer, role: 2e-4 * (1 + layer) / ROLES[role], range(1, GROUPS)),
    "dear": (lambda layer, role: 0.012, range(1)),  # one-shot 2:4 of one group of a small model
}


@pytest.mark.parametrize("price", CASES)
def test_sparsity_is_used_as_its_price_deserves(price):
    pruning, expected = CASES[price]
    assert _pruned(_problem(pruning)) in expected
