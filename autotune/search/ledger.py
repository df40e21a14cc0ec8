"""Every genotype measured so far, once each: what the steps of a search share.

It is the only place that calls `evaluate`, so it is where evaluations are counted, progress is told and a stop is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from autotune.search.front import fits
from autotune.search.problem import Budget, Candidate, Evaluate, Evaluation, Genotype, Problem
from autotune.search.ratio import LossRatio, loss_ratio

HOPELESS = 10.0  # times the loss limit on the first documents: the others could not change that

Progress = Callable[[int, int, float | None], None]


class Stopped(Exception):
    """The caller asked to stop. Never leaves `search`."""


class Ledger:
    """`spent` counts evaluations in units of a full one; a look at a tenth of the tokens costs a tenth."""

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        evaluate: Evaluate,
        looks: int,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.looks = looks
        self.candidates: dict[Genotype, Candidate] = {}
        self.spent = 0.0
        self.planned = 0
        self._evaluate = evaluate
        self._seen: dict[tuple[Genotype, int], Evaluation] = {}
        self._progress = progress
        self._should_stop = should_stop
        self._best: float | None = None

    def measure(self, genotype: Genotype, source: str) -> Candidate:
        """The candidate with its loss on all search documents, or on the first of them where that is far beyond the
        limit. A genotype met before costs nothing; what is settled is put in."""
        genotype = self.problem.settle(genotype)
        if genotype in self.candidates:
            return self.candidates[genotype]
        evaluation = self._loss(genotype)
        candidate = Candidate(
            genotype,
            self.problem.latency_us(genotype),
            self.problem.weight_bytes(genotype),
            self.problem.loss_nats(genotype),
            evaluation,
            source,
        )
        self.candidates[genotype] = candidate
        if fits(candidate, self.budget) and (self._best is None or candidate.latency_us < self._best):
            self._best = candidate.latency_us
        if self._progress is not None:
            self._progress(len(self.candidates), max(self.planned, len(self.candidates)), self._best)
        return candidate

    def _loss(self, genotype: Genotype) -> Evaluation:
        limit = self.budget.max_loss_nats
        if self.looks > 1 and 0 < limit < math.inf:
            first = self.look(genotype, 0)
            if first.kl_nats > HOPELESS * limit:
                return first
        return self.look(genotype, self.looks - 1)

    def loss_ratio(self) -> LossRatio:
        """What everything measured so far says of dNLL over KL."""
        return loss_ratio([item.evaluation for item in self.candidates.values()], self.budget.max_loss_nats)

    def look(self, genotype: Genotype, look: int) -> Evaluation:
        """Loss on the prefix `look`. Documents already seen for this genotype are not charged again."""
        genotype = self.problem.settle(genotype)
        if (genotype, look) not in self._seen:
            if self._should_stop is not None and self._should_stop():
                raise Stopped
            evaluation = self._evaluate(genotype, look)
            before = max(
                (sum(self._seen[genotype, i].tokens) for i in range(look) if (genotype, i) in self._seen), default=0
            )
            self._seen[genotype, look] = evaluation
            fresh = sum(evaluation.tokens) - before
            self.spent += fresh / self._full_tokens(evaluation)
        return self._seen[genotype, look]

    def _full_tokens(self, evaluation: Evaluation) -> float:
        """Tokens of a full evaluation; the dense model, always measured first, tells it."""
        dense = self._seen.get((self.problem.dense, self.looks - 1))
        return sum((dense or evaluation).tokens)
