"""The loss table's second column: what every (group, scheme) is expected to lose after training.

A row's recovered loss is its one-shot loss times the factor of its scheme's kind, its bounds times the factor's bounds.
It is a promise; what a whole plan is left with is measured once the plan has been trained. Of a plan, whose one-shot
loss is measured, factors promise a share: the sum of its rows times their factors, over the sum of its rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
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
class Promise:
    """KL to the dense model that training is expected to leave, with the interval it is expected in."""

    nats: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


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


def promise(
    one_shot_nats: float, chosen: Mapping[str, str], losses: LossTable, factors: Sequence[Factor], steps: int
) -> Promise:
    """For a configuration (group -> scheme) after `steps` of training, from its measured one-shot KL."""
    rows = [row for row in losses.rows if chosen.get(row.group) == row.scheme]
    total = sum(row.loss_nats for row in rows)
    if not total > 0:
        return Promise(one_shot_nats, one_shot_nats, one_shot_nats)
    known = _left(factors, steps)
    shares = [sum(row.loss_nats * known(row.scheme)[end] for row in rows) / total for end in range(3)]
    return Promise(*(one_shot_nats * share for share in shares))


def _left(factors: Sequence[Factor], steps: int) -> Callable[[str], tuple[float, float, float]]:
    """Scheme -> (share left, low, high)."""
    known = {factor.kind: factor.at(steps) for factor in factors}
    return lambda name: known.get(kind_of(name), (1.0, 1.0, 1.0))


def prices(losses: LossTable, factors: Sequence[Factor], steps: int) -> Prices:
    """The column after `steps` of training."""
    known = _left(factors, steps)
    rows = []
    for row in losses.rows:
        left, low, high = known(row.scheme)
        recovered = row.loss_nats * left, row.low_nats * low, row.high_nats * high
        rows.append(Price(row.group, row.scheme, row.loss_nats, row.low_nats, row.high_nats, *recovered))
    return Prices(tuple(rows))
