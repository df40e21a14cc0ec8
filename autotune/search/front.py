"""Which candidates fit the budget, which are not dominated, and how large the dominated area is.

Loss is judged by an upper bound (`ratio`), because a search keeps the luckiest of many candidates. A constraint told to
the study stays as it was said, so it is judged by its candidate alone; what is decided anew each time (where to aim,
what to refine, the finalists) by the loss ratio of everything measured so far. So the order of evaluations decides
nothing that it did not decide anyway, and a search replayed over its memo judges as it did the first time. The caller
tightens `max_loss_nats` for certification.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from autotune.search.problem import Budget, Candidate
from autotune.search.ratio import PRIOR, LossRatio, dnll_upper_nats


def excess(candidate: Candidate, budget: Budget, ratio: LossRatio = PRIOR) -> dict[str, float]:
    """By how much each limit is missed; zero or less is within it. Limits that are not set do not appear."""
    missed: dict[str, float] = {}
    if math.isfinite(budget.max_loss_nats):
        missed["loss"] = dnll_upper_nats(candidate.evaluation, ratio) - budget.max_loss_nats
    if budget.max_bytes is not None:
        missed["bytes"] = float(candidate.weight_bytes - budget.max_bytes)
    if budget.max_latency_us is not None:
        missed["latency"] = candidate.latency_us - budget.max_latency_us
    return missed


def fits(candidate: Candidate, budget: Budget, ratio: LossRatio = PRIOR) -> bool:
    return all(value <= 0 for value in excess(candidate, budget, ratio).values())


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
