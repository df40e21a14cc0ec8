"""Which candidates fit the budget, which are not dominated, and how large the dominated area is.

Loss is judged by an upper bound, because a search keeps the luckiest of
many candidates. The bound covers the search documents only; the caller tightens `max_loss_nats` for certification.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import norm

from autotune.search.problem import Budget, Candidate, Evaluation

CONFIDENCE = 0.8  # of the bound used while searching; certification has its own, stricter one
# dNLL over KL of one configuration: about one, seen between 0.8 and 1.2. KL is known 5 to 10 times more exactly than
# dNLL from the same tokens, so this prior sharpens what a few thousand tokens can say about dNLL.
RATIO_SPREAD = 0.25


def dnll_upper_nats(evaluation: Evaluation, confidence: float = CONFIDENCE) -> float:
    """One-sided upper bound of the dNLL per token.

    The measured mean, with its standard error over documents (ratio estimator), is combined with the prior
    dNLL ~ N(KL, (RATIO_SPREAD KL)^2), each weighted by its precision.
    """
    mean, error = _ratio_estimate(evaluation)
    kl = evaluation.kl_nats
    spread = max(RATIO_SPREAD * kl, 1e-12)
    weight = 0.0 if math.isinf(error) else spread**2 / (spread**2 + error**2)
    best = weight * mean + (1.0 - weight) * kl
    deviation = math.sqrt(1.0 - weight) * spread
    return best + float(norm.ppf(confidence)) * deviation


def _ratio_estimate(evaluation: Evaluation) -> tuple[float, float]:
    """(mean, standard error) of dNLL over documents; one document alone has no error that could be known."""
    tokens = np.array(evaluation.tokens, float)  # (documents,)
    documents = len(tokens)
    if documents < 2:
        return evaluation.dnll_nats, math.inf
    residual = np.array(evaluation.dnll) - evaluation.dnll_nats * tokens
    variance = documents / (documents - 1) * float(residual @ residual) / float(tokens.sum()) ** 2
    return evaluation.dnll_nats, math.sqrt(variance)


def excess(candidate: Candidate, budget: Budget) -> dict[str, float]:
    """By how much each limit is missed; zero or less is within it. Limits that are not set do not appear."""
    missed: dict[str, float] = {}
    if math.isfinite(budget.max_loss_nats):
        missed["loss"] = dnll_upper_nats(candidate.evaluation) - budget.max_loss_nats
    if budget.max_bytes is not None:
        missed["bytes"] = float(candidate.weight_bytes - budget.max_bytes)
    if budget.max_latency_us is not None:
        missed["latency"] = candidate.latency_us - budget.max_latency_us
    return missed


def fits(candidate: Candidate, budget: Budget) -> bool:
    return all(value <= 0 for value in excess(candidate, budget).values())


def pareto(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Indices of the points that no other point beats in one coordinate without losing in the other, by the first."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not kept or points[index][1] < points[kept[-1]][1]:
            kept.append(index)
    return tuple(kept)


def pareto_candidates(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Not dominated in (latency, KL), fastest first."""
    everything = list(candidates)
    return [everything[i] for i in pareto([(item.latency_us, item.evaluation.kl_nats) for item in everything])]


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area between the front of `points` and the reference corner; larger is better."""
    inside = [(x, y) for x, y in points if x < reference[0] and y < reference[1]]
    area, ceiling = 0.0, reference[1]
    for index in pareto(inside):
        x, y = inside[index]
        area += (reference[0] - x) * (ceiling - y)
        ceiling = y
    return area
