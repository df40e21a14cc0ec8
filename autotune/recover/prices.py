"""The loss table's second column: what every (group, scheme) is expected to lose after training.

A row's recovered loss is its one-shot loss times the factor of its scheme's kind, its bounds times the factor's bounds.
It is a promise; what a whole plan is left with is measured once the plan has been trained.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

from autotune.recover.gains import Factor, kind_of
from autotune.score import LossTable
from autotune.search.problem import GroupOptions, Problem


@dataclass(frozen=True)
class Price:
    """A row of the loss table and what training for `steps` is expected to leave of it, each with a 95% interval."""

    group: str
    scheme: str
    loss_nats: float
    low_nats: float
    high_nats: float
    recovered_nats: float
    recovered_low_nats: float
    recovered_high_nats: float


@dataclass(frozen=True)
class Prices:
    rows: tuple[Price, ...]

    def problem(self, one_shot: Problem) -> Problem:
        """The problem with recovered losses; what has no row (dense, the KV cache) keeps its own."""
        known = {(row.group, row.scheme): row.recovered_nats for row in self.rows}

        def priced(group: GroupOptions) -> GroupOptions:
            options = [replace(o, loss_nats=known.get((group.name, o.scheme), o.loss_nats)) for o in group.options]
            return replace(group, options=tuple(options))

        return replace(one_shot, groups=tuple(priced(group) for group in one_shot.groups))

    def to_csv(self) -> str:
        return str(pd.DataFrame([asdict(row) for row in self.rows]).to_csv(index=False))

    @classmethod
    def from_csv(cls, text: str) -> Prices:
        frame = pd.read_csv(io.StringIO(text), float_precision="round_trip")
        return cls(tuple(Price(**row) for row in frame.to_dict("records")))


def prices(losses: LossTable, factors: Sequence[Factor], steps: int) -> Prices:
    """The column after `steps` of training."""
    known = {factor.kind: factor.at(steps) for factor in factors}
    rows = []
    for row in losses.rows:
        left, low, high = known.get(kind_of(row.scheme), (1.0, 1.0, 1.0))
        recovered = row.loss_nats * left, row.low_nats * low, row.high_nats * high
        rows.append(Price(row.group, row.scheme, row.loss_nats, row.low_nats, row.high_nats, *recovered))
    return Prices(tuple(rows))
