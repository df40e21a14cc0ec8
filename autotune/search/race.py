"""Refinement: small changes to candidates on the front, raced against them on growing parts of the search documents.

A move flips one group, or two at once, and is never slower than what it starts from. Moves are proposed by the fitted
loss table and by draws from its posterior (so that what is uncertain gets tried), then compared with the incumbent
document by document: a move whose paired difference is clearly positive leaves the race, the rest are measured in full.
The test prunes; it is no claim, so a wrongly dropped move costs an opportunity and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Set

import numpy as np
from scipy.special import stdtrit

from autotune.search.correction import fit
from autotune.search.front import pareto_candidates
from autotune.search.knapsack import Floats
from autotune.search.ledger import Ledger
from autotune.search.problem import Budget, Candidate, Evaluation, Genotype
from autotune.search.ratio import LossRatio, dnll_upper_nats
from autotune.search.study import Decoder

ARMS = 4  # moves a race starts with
NEAREST = 3  # members of the front refined, by distance to the budget
PARTNERS = 64  # flips considered for each half of a double move
DROP_LEVEL = 0.1  # one-sided, per look


def refine(ledger: Ledger, decode: Decoder, evaluations: float, seed: int) -> None:
    """Race moves until the evaluations are spent or nothing new is proposed."""
    end = ledger.spent + evaluations
    turn = idle = 0
    tried: set[Genotype] = set()  # a move that lost a race is not proposed again: that would cost nothing, for ever
    while ledger.spent < end:
        targets = focus(pareto_candidates(ledger.candidates.values()), ledger.budget, ledger.loss_ratio())
        if idle >= max(NEAREST, len(targets)) or not targets:
            return
        incumbent = targets[turn % len(targets)]
        arms = propose(ledger, decode, incumbent, seed, turn, tried)
        tried.update(arms)
        idle = 0 if arms else idle + 1
        for genotype in race(ledger, incumbent.genotype, arms):
            if ledger.spent >= end:
                return
            ledger.measure(genotype, f"refine {turn}")
        turn += 1


def focus(front: list[Candidate], budget: Budget, ratio: LossRatio) -> list[Candidate]:
    """The members of the front nearest the limit, nearest first; without a limit all. Lossless ones stay out."""
    lossy = [item for item in front if item.evaluation.kl_nats > 0]
    if budget.max_latency_us is not None:
        lossy = [item for item in lossy if item.latency_us <= budget.max_latency_us] or lossy
        if not math.isfinite(budget.max_loss_nats):
            return lossy[: -NEAREST - 1 : -1]
    if not math.isfinite(budget.max_loss_nats) or budget.max_loss_nats <= 0:
        return lossy

    def distance(candidate: Candidate) -> float:
        loss = max(dnll_upper_nats(candidate.evaluation, ratio), 1e-3 * budget.max_loss_nats)
        return abs(math.log(loss / budget.max_loss_nats))

    return sorted(lossy, key=distance)[:NEAREST]


def propose(
    ledger: Ledger, decode: Decoder, incumbent: Candidate, seed: int, turn: int, tried: Set[Genotype] = frozenset()
) -> list[Genotype]:
    """Up to ARMS new genotypes: the best move by the fitted table, then the best by each posterior draw."""
    measured = list(ledger.candidates.values())
    fitted = fit(decode.table, [item.genotype for item in measured], [item.evaluation.kl_nats for item in measured])
    random = np.random.default_rng([seed, 2, turn])
    room = ledger.budget.max_bytes
    arms: list[Genotype] = []
    for arm in range(ARMS):
        losses = fitted.losses if arm == 0 else fitted.draw(random)
        for genotype in map(ledger.problem.settle, moves(losses, decode.latency, incumbent.genotype)):
            fits_bytes = room is None or ledger.problem.weight_bytes(genotype) <= room
            known = genotype in ledger.candidates or genotype in tried or genotype in arms
            if fits_bytes and not known:
                arms.append(genotype)
                break
    return arms


def moves(losses: Floats, latency: Floats, start: Genotype) -> list[Genotype]:
    """Flips and double flips that are not slower and have less loss by the table, best first."""
    rows, current = np.arange(len(start)), np.array(start)
    extra = latency - latency[rows, current][:, None]
    change = losses - losses[rows, current][:, None]
    real = np.isfinite(extra) & (np.arange(latency.shape[1]) != current[:, None])
    group, option = np.nonzero(real)
    extra, change = extra[group, option], change[group, option]
    better = np.flatnonzero(change < 0)
    better = better[np.argsort(change[better] / np.maximum(extra[better], 1e-9), kind="stable")[:PARTNERS]]
    faster = np.flatnonzero(extra < 0)
    faster = faster[np.argsort(change[faster] / -extra[faster], kind="stable")[:PARTNERS]]
    found: list[tuple[float, tuple[int, ...]]] = [(float(change[a]), (int(a),)) for a in better if extra[a] <= 0]
    gain = change[better][:, None] + change[faster]
    fitting = (gain < 0) & (extra[better][:, None] + extra[faster] <= 0) & (group[better][:, None] != group[faster])
    found += [(float(gain[i, j]), (int(better[i]), int(faster[j]))) for i, j in zip(*np.nonzero(fitting), strict=True)]
    ranked = sorted(found)[: 4 * PARTNERS]
    return [_changed(start, [(int(group[a]), int(option[a])) for a in flips]) for _, flips in ranked]


def race(ledger: Ledger, incumbent: Genotype, arms: list[Genotype]) -> list[Genotype]:
    """The arms still standing after every partial look, best first; `ledger` measures them in full afterwards."""
    standing = list(arms)
    for look in range(ledger.looks - 1):
        if not standing:
            return []
        reference = ledger.look(incumbent, look)
        seen = {genotype: ledger.look(genotype, look) for genotype in standing}
        best = min([reference, *seen.values()], key=lambda evaluation: evaluation.kl_nats)
        standing = [genotype for genotype in standing if not clearly_worse(seen[genotype], best)]
        standing.sort(key=lambda genotype: (seen[genotype].kl_nats, genotype))
    return standing


def clearly_worse(one: Evaluation, other: Evaluation, level: float = DROP_LEVEL) -> bool:
    """Paired one-sided t test over documents that `one` has the larger KL; log1p of KL over its median tames tails."""
    tokens = np.array(one.tokens, float)
    first, second = np.array(one.kl) / tokens, np.array(other.kl) / tokens  # (documents,)
    scale = float(np.median(second)) or 1.0
    difference = np.log1p(np.maximum(first, 0) / abs(scale)) - np.log1p(np.maximum(second, 0) / abs(scale))
    documents = len(difference)
    if documents < 2 or one is other:
        return False
    mean, spread = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(documents)
    if spread == 0:
        return mean > 0
    return mean / spread > float(stdtrit(documents - 1, 1 - level))


def _changed(start: Genotype, flips: list[tuple[int, int]]) -> Genotype:
    changed = list(start)
    for group, option in flips:
        changed[group] = option
    return tuple(changed)
