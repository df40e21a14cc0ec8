"""Every genotype measured so far, once each: what the steps of a search share.

It is the only place that calls `evaluate`, so it is where evaluations are counted, progress is told and a stop is seen.
"""

from __future__ import annotations

from collections.abc import Callable

from autotune.search.front import fits
from autotune.search.problem import Budget, Candidate, Evaluate, Evaluation, Genotype, Problem
from autotune.search.ratio import LossRatio, loss_ratio

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
        """The candidate with its loss on all search documents. A genotype met before costs nothing."""
        if genotype in self.candidates:
            return self.candidates[genotype]
        evaluation = self.look(genotype, self.looks - 1)
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

    def loss_ratio(self) -> LossRatio:
        """What everything measured so far says of dNLL over KL."""
        return loss_ratio([item.evaluation for item in self.candidates.values()], self.budget.max_loss_nats)

    def look(self, genotype: Genotype, look: int) -> Evaluation:
        """Loss on the prefix `look`. Documents already seen for this genotype are not charged again."""
        if (genotype, look) not in self._seen:
            if self._should_stop is not None and self._should_stop():
                raise Stopped
            evaluation = self._evaluate(genotype, look)
            before = self._seen.get((genotype, look - 1))
            self._seen[genotype, look] = evaluation
            fresh = sum(evaluation.tokens) - (sum(before.tokens) if before else 0)
            self.spent += fresh / self._full_tokens(evaluation)
        return self._seen[genotype, look]

    def _full_tokens(self, evaluation: Evaluation) -> float:
        """Tokens of a full evaluation; the dense model, always measured first, tells it."""
        dense = self._seen.get((self.problem.dense, self.looks - 1))
        return sum((dense or evaluation).tokens)
