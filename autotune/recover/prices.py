"""The loss table's second column: what every (group, scheme) is expected to lose after training.

A row's recovered loss is its one-shot loss times the factor of its scheme's kind, its bounds times the factor's bounds.
It is a promise; what a whole plan is left with is measured once the plan has been trained.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from autotune.recover.gains import Factor, kind_of
from autotune.score import LossRow, LossTable

TABLE = "loss_recovered.csv"  # in the run's folder
METHOD = "fisher, times what training leaves"


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

    @property
    def losses(self) -> LossTable:
        """The recovered column by itself, as a search takes it."""
        rows = [(r.group, r.scheme, r.recovered_nats, r.recovered_low_nats, r.recovered_high_nats) for r in self.rows]
        return LossTable(tuple(LossRow(*row, METHOD) for row in rows))

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
