"""What `autotune tune` offers when a budget is missed by up to three times: a command that may mend it, and its price.

Where no configuration met the budget, offered are the nearest, and a search with what training wins back, if something
measured misses by its loss alone and has schemes that training helps; each with its price. Else the plan where it was
not certified; or, where a measured point is clearly faster than the plan and its loss alone is too high, the search,
which may find that point or a better one within the budget.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from autotune.compress.database import scheme_of
from autotune.decide import of_layers
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
    """The offer for a run that has reached its choice; None where there is none."""
    return next(iter(offers(result, models)), None)


def offers(result: Result, models: Models) -> tuple[Offer, ...]:
    """All there are for a run that has reached its choice, or found nothing to choose."""
    session = result.session
    if session.config.latency_only or session.opened.checkpoint is None or session.streams:  # training holds it whole
        return ()
    either = (_nearest(result), _searched(result)) if result.chosen is None else (_plan(result) or _faster(result),)
    found = [item for item in either if item is not None]
    if not found:
        return ()
    rate = _tokens_per_second(models)
    return tuple(_offer(result, item, rate) for item in found)


def _offer(result: Result, found: Found, tokens_per_second: float) -> Offer:
    point, name, over, faster = found
    named = "" if point is None else f" --point {point}"
    command = f"autotune recover {result.session.folder.path}{named} --data TEXT"
    tokens = TOKENS
    if point == SEARCHED:
        assert result.database is not None
        tokens = round(price(TOKENS, len(kinds(scheme_of(name) for _, name in result.database.entries))))
    return Offer(point, name, over, faster, tokens, tokens_per_second, command)


def _nearest(result: Result) -> Found | None:
    session, problem, front = result.session, result.problem, result.front
    assert problem is not None and front is not None
    nearest = nearest_candidate(session, problem, front)
    over = _over(result, nearest)
    if nearest.genotype == problem.dense or over > REACH or not _by_loss_alone(result, nearest):
        return None
    return "nearest", "the nearest", over, None


def _searched(result: Result) -> Found | None:
    """Of what training helps and misses by its loss alone, that which misses by the least: of what was measured, else
    of what had left the search because it breaks the budget in one group."""
    problem, front, losses = result.problem, result.front, result.losses
    assert problem is not None and front is not None and losses is not None
    helped = [c for c in front.candidates if kinds(option.scheme for _, option in of_layers(problem, c.genotype))]
    over = min((_over(result, c) for c in helped if _by_loss_alone(result, c)), default=math.inf)
    if over <= REACH:
        return SEARCHED, "the nearest that training helps", over, None
    limit = result.session.search_limit
    rows = [row for row in losses.rows if kinds([row.scheme]) and 1 < row.loss_nats / limit <= REACH]
    if not rows:
        return None
    row = min(rows, key=lambda item: item.loss_nats)
    return SEARCHED, f"{row.scheme} in {row.group} alone", row.loss_nats / limit, None


def _by_loss_alone(result: Result, candidate: Candidate) -> bool:
    session, problem, front = result.session, result.problem, result.front
    assert problem is not None and front is not None
    missed = excess(candidate, search_budget(session, problem), front_ratio(front, session.search_limit))
    return not any(value > 0 for name, value in missed.items() if name != "loss")


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
