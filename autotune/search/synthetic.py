"""A made-up problem whose true loss is known: for tests, and for comparing search methods in seconds.

The loss table differs from the truth by a factor per role, per scheme class and per entry, all log-normal, and the true
loss of a genotype adds what no table says: damage in adjacent layers compounds, and the sum grows faster than linearly.
Documents differ in length and difficulty, and every (genotype, document) has its own reproducible noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from autotune.search.correction import scheme_class
from autotune.search.knapsack import Floats
from autotune.search.problem import Evaluation, Genotype, GroupOptions, Option, Problem

ROLES = {"qkv": 1.5, "o": 1.0, "gate_up": 5.0, "down": 2.5}  # relative size
SCHEMES = {  # relative latency, typical loss in nats, bits per weight
    "bf16": (1.0, 0.0, 16.0),
    "w8a16-int8": (0.62, 1e-5, 8.0),
    "w8a8-int8": (0.55, 6e-5, 8.0),
    "w4a16-int4-g128": (0.36, 6e-4, 4.125),
    "2:4": (0.64, 4e-3, 9.0),
    "2:4+w8a8-int8": (0.38, 4.5e-3, 5.0),
}
COMPOUND, CONVEX = 0.5, 6.0  # strength of neighbours' interaction, and of growth with the total (per nat)
ROLE_SPREAD, CLASS_SPREAD, ENTRY_SPREAD = 0.6, 0.4, 0.25  # of the table's error, logs of factors
DOCUMENTS, NOISE = 32, 0.1


@dataclass(frozen=True)
class Synthetic:
    """`evaluate` has three looks, at a quarter, half and all documents."""

    problem: Problem
    truth: Floats  # (groups, options), nats
    tokens: tuple[int, ...]
    difficulty: tuple[float, ...]
    looks: int = 3

    def true_kl_nats(self, genotype: Genotype) -> float:
        own = self.truth[np.arange(len(genotype)), genotype]
        neighbours = float(np.sqrt(own[:-1] * own[1:]).sum())
        total = float(own.sum()) + COMPOUND * neighbours
        return total * (1 + CONVEX * total)

    def evaluate(self, genotype: Genotype, look: int) -> Evaluation:
        count = max(2, len(self.tokens) >> (self.looks - 1 - look))
        seed = hashlib.sha256(repr(genotype).encode()).digest()[:8]
        noise = np.random.default_rng(int.from_bytes(seed, "big")).normal(size=(2, len(self.tokens)))
        tokens, hardness = np.array(self.tokens[:count]), np.array(self.difficulty[:count])
        kl = self.true_kl_nats(genotype) * hardness * np.exp(NOISE * noise[0, :count] - NOISE**2 / 2) * tokens
        dnll = 0.9 * kl + np.sqrt(kl) * noise[1, :count] * 0.3
        return Evaluation(tuple(tokens.tolist()), tuple(kl.tolist()), tuple(dnll.tolist()))


def synthetic(layers: int, seed: int, schemes: tuple[str, ...] = tuple(SCHEMES)) -> Synthetic:
    """Four groups a layer; the same seed gives the same problem."""
    random = np.random.default_rng([seed, layers])
    role_error = {role: float(np.exp(random.normal() * ROLE_SPREAD)) for role in ROLES}
    classes = sorted({scheme_class(name) for name in SCHEMES})
    class_error = {name: float(np.exp(random.normal() * CLASS_SPREAD)) for name in classes}
    groups, truth = [], []
    for layer in range(layers):
        for role, size in ROLES.items():
            sensitivity = float(np.exp(random.normal() * 0.7)) * (1 + 2 * (layer in (0, layers - 1)))
            losses = [sensitivity * SCHEMES[name][1] * float(np.exp(random.normal() * 0.3)) for name in schemes]
            error = [np.exp(random.normal() * ENTRY_SPREAD) * role_error[role] for _ in schemes]
            options = []
            for name, loss, wrong in zip(schemes, losses, error, strict=True):
                speed, _, bits = SCHEMES[name]
                table = loss * float(wrong) * class_error[scheme_class(name)]
                latency = 100.0 * size * (speed + (0.04 if name != schemes[0] else 0.0) / size)
                options.append(Option(name, f"synthetic/{name}", latency, table, int(size * 1e5 * bits / 8)))
            groups.append(GroupOptions(f"layers.{layer}.{role}", role, layer, tuple(options)))
            truth.append(losses)
    difficulty = np.exp(random.normal(size=DOCUMENTS) * 0.4)
    tokens = random.integers(200, 1000, size=DOCUMENTS)
    difficulty /= float((difficulty * tokens).sum() / tokens.sum())
    problem = Problem(tuple(groups), rest_us=200.0 * layers, fixed_bytes=1_000_000)
    return Synthetic(problem, np.array(truth), tuple(tokens.tolist()), tuple(difficulty.tolist()))
