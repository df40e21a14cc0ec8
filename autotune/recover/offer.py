"""What `autotune tune` offers when a budget is missed by up to three times: a command that may mend it, and its price.

Offered are, in this order: the nearest configuration where none met the budget; the plan where it was not certified;
and, where a measured point is clearly faster than the plan and its loss alone is too high, a search with what training
wins back, which may find that point or a better one within the budget.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from autotune.finalists import front_ratio, nearest_candidate, search_budget
from autotune.models import Models
from autotune.recover.gains import kinds
from autotune.recover.job import SEARCHED, TOKENS
from autotune.recover.searched import FASTER, price
from autotune.result import Result
from autotune.search.front import excess
from autotune.search.problem import Candidate
from autotune.search.ratio import dnll_upper_nats

REACH = 3.0  # times the budget; beyond, minutes of training have not been seen to help enough
FORWARD_PASSES = 4.4  # of the dense model, that a training step takes as long as: measured on the demo, 4.3 to 4.7
_TIMED_TOKENS = 256


@dataclass(frozen=True)
class Offer:
    """`point`: as `--point` takes it, None for the run's plan. `name`: of the configuration that speaks for it.
    `over`: times the budget that its loss is. `faster`: than the plan, as predicted; None where it is the plan, or
    there is none. `tokens`: to be trained in all."""

    point: str | None
    name: str
    over: float
    faster: float | None
    tokens: int
    tokens_per_second: float
    command: str

    @property
    def minutes(self) -> float:
        return self.tokens / self.tokens_per_second / 60

    @property
    def sentence(self) -> str:
        gain = f"would be {self.faster:.2f}x faster than the plan, but " if self.faster is not None else ""
        what = f"{self.name[0].upper()}{self.name[1:]} {gain}loses {self.over:.1f} times the budget"
        price = f"{self.tokens:,} tokens, about {self.minutes:,.0f} min at {self.tokens_per_second:,.0f} tokens/s"
        may = "Training may bring it back"
        if self.point == SEARCHED:
            may = "A search with what training wins back may bring it or a better one within it"
        return f"{what}. {may} ({price}): {self.command}"


Found = tuple[str | None, str, float, float | None]  # point, name, over, faster: see `Offer`


def offer(result: Result, models: Models) -> Offer | None:
    """The offer for a run that has reached its choice, or found nothing to choose; None where there is none."""
    session = result.session
    if session.config.latency_only or session.opened.checkpoint is None or session.streams:  # training holds it whole
        return None
    found = _nearest(result) if result.chosen is None else _plan(result) or _faster(result)
    if found is None:
        return None
    point, name, over, faster = found
    named = "" if point is None else f" --point {point}"
    command = f"autotune recover {session.folder.path}{named} --data TEXT"
    tokens = TOKENS
    if point == SEARCHED:
        tokens = round(price(TOKENS, len(kinds(entry.scheme for entry in result.space.entries))))
    return Offer(point, name, over, faster, tokens, _tokens_per_second(models), command)


def _nearest(result: Result) -> Found | None:
    session, problem, front = result.session, result.problem, result.front
    assert problem is not None and front is not None
    nearest = nearest_candidate(session, problem, front)
    missed = excess(nearest, search_budget(session, problem), front_ratio(front, session.search_limit))
    over = _over(result, nearest)
    if nearest.genotype == problem.dense or over > REACH or any(v > 0 for k, v in missed.items() if k != "loss"):
        return None
    return "nearest", "nearest", over, None


def _plan(result: Result) -> Found | None:
    assert result.chosen is not None and result.problem is not None
    certificate = (result.certificates or {}).get(result.chosen.name)
    if certificate is None or certificate.state not in ("not_certified", "violated"):
        return None
    over = certificate.loss.upper / certificate.limit
    dense = result.chosen.candidate.genotype == result.problem.dense
    return None if dense or over > REACH else (None, "the plan", over, None)


def _faster(result: Result) -> Found | None:
    assert result.chosen is not None and result.problem is not None
    memory = result.session.config.max_memory_bytes
    chosen = result.chosen.candidate.latency_us
    for point in sorted(result.points, key=lambda item: item.candidate.latency_us):
        faster, over = chosen / point.candidate.latency_us, _over(result, point.candidate)
        fits = memory is None or point.candidate.weight_bytes <= memory
        if faster >= FASTER and 1 < over <= REACH and fits:
            return SEARCHED, point.name, over, faster
    return None


def _over(result: Result, candidate: Candidate) -> float:
    """The upper bound of its loss over what the search allows."""
    assert result.front is not None
    ratio = front_ratio(result.front, result.session.search_limit)
    return dnll_upper_nats(candidate.evaluation, ratio) / result.session.search_limit


def _tokens_per_second(models: Models) -> float:
    """Of training, from the dense model's own forward pass here and now."""
    reference = models.reference
    reference.select({})
    document = max(models.session.search_documents, key=len)[:_TIMED_TOKENS]
    reference.outputs(document)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        reference.outputs(document)
        seconds.append(time.perf_counter() - start)
    return len(document) / (FORWARD_PASSES * min(seconds))


def to_json(item: Offer | None) -> dict[str, Any] | None:
    """As report.json has it."""
    if item is None:
        return None
    value = {"point": item.point, "over": item.over, "faster": item.faster, "tokens": item.tokens}
    return value | {"minutes": item.minutes, "command": item.command, "sentence": item.sentence}
