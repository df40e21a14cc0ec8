"""What a search with training found: candidates with what was promised for them and measured, and the one taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.recover.gains import STEEPEST, Factor, Share
from autotune.recover.job import Job
from autotune.recover.prices import Promise
from autotune.search.problem import Candidate, Evaluation


@dataclass(frozen=True)
class Tried:
    """A candidate of the second search. Its loss on the search documents: measured one-shot, promised for the short
    training and for the whole budget before it was trained, and measured after the short training."""

    job: Job
    candidate: Candidate  # its evaluation is promised
    one_shot: Evaluation
    short_promised: Promise
    promised: Promise
    short: Evaluation
    steps: int
    short_steps: int
    latency_us: float  # measured end to end, or predicted where nothing can be run

    @property
    def expected(self) -> Evaluation:
        """At the end, from what was measured."""
        return self.short.scaled(self.promised.nats / self.short_promised.nats if self.short_promised.nats else 1.0)

    @property
    def expectation(self) -> Promise:
        """The same with its interval: from a fall as steep as was ever seen to none."""
        steepest = (self.short_steps / self.steps) ** STEEPEST
        return Promise(self.expected.kl_nats, steepest * self.short.kl_nats, self.short.kl_nats)


@dataclass(frozen=True)
class Correction:
    """How many times what factors promised candidates were left with after the short training: geometric mean, least
    and most."""

    ratio: float
    low: float
    high: float

    def of(self, factors: Sequence[Factor]) -> tuple[Factor, ...]:
        return tuple(factor.scaled(self.ratio, self.low, self.high) for factor in factors)


def correction(measured: Sequence[float], promised: Sequence[float]) -> Correction:
    """From candidates' losses, in nats."""
    ratios = [found / wanted for found, wanted in zip(measured, promised, strict=True) if found > 0 and wanted > 0]
    if not ratios:
        return Correction(1.0, 1.0, 1.0)
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return Correction(mean, min(ratios), max(ratios))


@dataclass(frozen=True)
class Outcome:
    """What was searched and tried; `chosen` is the one to train in full."""

    steps: int
    short_steps: int
    factors: tuple[Factor, ...]  # as measured; `correction` is what candidates said of them
    correction: Correction
    tried: tuple[Tried, ...]
    chosen: Tried
    plan_us: float  # of the run's plan, or of the dense model where it has none; as `Tried.latency_us`
    noisy: str  # why those latencies say little; empty where they do

    def to_json(self) -> dict[str, Any]:
        """As recovery.json has it: docs/report.md."""
        ratio = self.correction
        return {
            "steps": self.steps,
            "short_steps": self.short_steps,
            "sequence_length": self.chosen.job.sequences.train.shape[1],
            "factors": [_factor(item, ratio.of([item])[0], self.steps) for item in self.factors],
            "correction": {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high},
            "plan_latency_ms": self.plan_us / 1e3,
            "noisy": self.noisy,
            "candidates": [_row(item) | {"chosen": item is self.chosen} for item in self.tried],
        }


def _factor(item: Factor, corrected: Factor, steps: int) -> dict[str, Any]:
    value = {"kind": item.kind, "sets": [_set(one) for one in item.sets], "steps": item.steps, "power": item.power}
    return value | _ends(item, item.steps) | {"at_budget": _ends(item, steps), "corrected": _ends(corrected, steps)}


def _ends(item: Factor, steps: int) -> dict[str, float]:
    return dict(zip(("left", "low", "high"), item.at(steps), strict=True))


def _set(item: Share) -> dict[str, Any]:
    about = {"groups": dict(item.probe.chosen), "kl_nats_before": item.before_nats}
    return about | {"left": item.left, "low": item.low, "high": item.high}


def _row(item: Tried) -> dict[str, Any]:
    return {
        "name": item.job.name,
        "schemes": item.job.chosen,
        "latency_ms": item.latency_us / 1e3,
        "predicted_latency_ms": item.candidate.latency_us / 1e3,
        "one_shot_nats": item.one_shot.kl_nats,
        "short_promised": item.short_promised.to_json(),
        "short_nats": item.short.kl_nats,
        "promised": item.promised.to_json(),
        "expected": item.expectation.to_json(),
    }
