"""The multiple-choice knapsack: one option per group, least total loss within a latency limit (and a size limit).

Inputs are tables indexed [group][option]; rows may differ in length, and an infinite latency marks an option that may
not be taken. Any units will do as long as a limit has those of its table.

`hull_front` sweeps the Lagrangian: per group the lower convex hull of (latency, loss), all segments merged by
efficiency (Sinha and Zoltners 1979). Every point of it is optimal at its own latency. `solve` takes the last point
below the limit and fills the rest; with `exact` it then runs a dynamic programme over Pareto states, pruned by the hull
of the groups not yet decided (Dyer, Riha and Walker 1995). It is exact, not rounded to buckets, while no more than
MAX_STATES partial choices stay open; only losses that are nearly an affine function of latency exceed that. Then the
most promising are kept, and the answer lies between the hull's bound and its fill. A size limit is solved exactly by
HiGHS, or, with `exact=False`, priced into the loss by bisection.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from autotune.errors import InfeasibleError
from autotune.search.problem import Genotype

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Table = Sequence[Sequence[float]] | Floats

MAX_STATES = 5000
PRICE_STEPS = 24  # bisections of the price of a byte
ROUND_OFF = 1e-12  # relative; sums of a few hundred terms differ by this when added in another order


def hull_front(losses: Table, latencies: Table) -> list[tuple[float, Genotype]]:
    """The Pareto points the Lagrangian reaches, fastest first: (total latency, genotype)."""
    loss, latency = _pad(losses), _pad(latencies)
    hull = _hull(loss, latency)
    current = hull.fastest.copy()
    front = [(hull.latency, _genotype(current))]
    for group, option, total in zip(hull.group, hull.option, hull.latencies, strict=True):
        current[group] = option
        front.append((float(total), _genotype(current)))
    return front


def solve(
    losses: Table,
    latencies: Table,
    limit: float,
    weight_bytes: Table | None = None,
    byte_limit: float | None = None,
    *,
    exact: bool = True,
) -> Genotype:
    """The options of least total loss with total latency <= limit and, if given, total bytes <= byte_limit.

    Raises:
        InfeasibleError: `search.infeasible`, naming the nearest point that can be had.
    """
    loss, latency = _pad(losses), _pad(latencies)
    limit += abs(limit) * ROUND_OFF
    _check_latency(latency, limit)
    choice = _solve_latency(loss, latency, limit, exact)
    if weight_bytes is None or byte_limit is None:
        return _genotype(choice)
    size = _pad(weight_bytes)
    if _total(size, choice) <= byte_limit:
        return _genotype(choice)
    priced = None if exact else _price_bytes(loss, latency, limit, size, byte_limit)
    return _genotype(_solve_milp(loss, latency, limit, size, byte_limit) if priced is None else priced)


@dataclass(frozen=True)
class _Hull:
    """The fastest choice, then upgrades by efficiency: `group` takes `option`, reaching `latencies`, `losses`."""

    fastest: Ints  # (groups,)
    latency: float
    loss: float
    group: Ints  # (segments,)
    option: Ints
    extra_latency: Floats
    saved_loss: Floats
    latencies: Floats  # running totals after each segment
    losses: Floats

    def efficiency(self, segment: int) -> float:
        return float(self.saved_loss[segment] / self.extra_latency[segment])

    def at(self, limit: float) -> tuple[int, Ints]:
        """How many segments fit below the limit, and the choice they make."""
        count = int(np.searchsorted(self.latencies, limit, side="right"))
        choice = self.fastest.copy()
        choice[self.group[:count]] = self.option[:count]  # later segments of a group overwrite earlier ones
        return count, choice


def _hull(loss: Floats, latency: Floats) -> _Hull:
    fastest = np.zeros(len(loss), np.int64)
    rows: list[tuple[float, int, int, int, float, float]] = []
    for group, (losses, latencies) in enumerate(zip(loss.tolist(), latency.tolist(), strict=True)):
        corners = _corners(losses, latencies)
        fastest[group] = corners[0]
        for step, (a, b) in enumerate(itertools.pairwise(corners)):
            extra, saved = latencies[b] - latencies[a], losses[a] - losses[b]
            rows.append((-saved / extra, group, step, b, extra, saved))
    rows.sort()
    extra_latency = np.array([row[4] for row in rows], float)
    saved_loss = np.array([row[5] for row in rows], float)
    start_latency, start_loss = _total(latency, fastest), _total(loss, fastest)
    return _Hull(
        fastest,
        start_latency,
        start_loss,
        np.array([row[1] for row in rows], np.int64),
        np.array([row[3] for row in rows], np.int64),
        extra_latency,
        saved_loss,
        start_latency + np.cumsum(extra_latency),
        start_loss - np.cumsum(saved_loss),
    )


def _corners(losses: list[float], latencies: list[float]) -> list[int]:
    """Options on the lower convex hull of (latency, loss), from the fastest to the one of least loss."""
    corners: list[int] = []
    for option in sorted(range(len(losses)), key=lambda k: (latencies[k], losses[k], k)):
        x, y = latencies[option], losses[option]
        if x == np.inf or (corners and y >= losses[corners[-1]]):
            continue
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            if (losses[a] - losses[b]) * (x - latencies[b]) > (losses[b] - y) * (latencies[b] - latencies[a]):
                break
            corners.pop()
        corners.append(option)
    return corners


def _solve_latency(loss: Floats, latency: Floats, limit: float, exact: bool) -> Ints:
    hull = _hull(loss, latency)
    count, choice = hull.at(limit)
    if count == len(hull.group):
        return choice  # the option of least loss everywhere
    choice = _fill(choice, loss, (latency, limit))
    return _pareto_states(hull, count, choice, loss, latency, limit) if exact else choice


def _fill(choice: Ints, loss: Floats, *limits: tuple[Floats, float]) -> Ints:
    """Spend what is left below the limits of (table, limit): the one change that saves most loss, until none fits."""
    rows = np.arange(len(choice))
    choice = choice.copy()
    while True:
        fitting = np.ones(loss.shape, bool)
        for table, limit in limits:
            fitting &= table - table[rows, choice][:, None] <= limit - _total(table, choice)
        gain = np.where(fitting & np.isfinite(loss), loss[rows, choice][:, None] - loss, 0.0)
        group, option = divmod(int(np.argmax(gain)), loss.shape[1])
        if gain[group, option] <= 0:
            return choice
        choice[group] = option


def _pareto_states(hull: _Hull, count: int, incumbent: Ints, loss: Floats, latency: Floats, limit: float) -> Ints:
    """Exact: decide the groups one by one, keeping the partial choices that may still beat the incumbent."""
    best = _total(loss, incumbent)
    tolerance = ROUND_OFF * max(abs(best), float(np.max(loss[np.isfinite(loss)], initial=0.0)))
    price = hull.efficiency(count)
    cost = loss + price * np.where(np.isfinite(latency), latency, np.inf)
    regret = cost - cost.min(axis=1, keepdims=True)  # rise of the Lagrangian bound when an option is forced
    keep = regret <= best - (float(cost.min(axis=1).sum()) - price * limit) + tolerance
    order = np.argsort(np.where(keep, regret, 0.0).max(axis=1), kind="stable")[::-1]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))

    states_latency, states_loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[int, Ints, Ints]] = []  # group, parent state, option
    for position, group in enumerate(order):
        options = np.flatnonzero(keep[group])
        new_latency = (states_latency[:, None] + latency[group, options]).ravel()
        new_loss = (states_loss[:, None] + loss[group, options]).ravel()
        bound, reached = _complete(hull, rank > position, limit - new_latency, loss, latency)
        best = min(best, float(np.min(new_loss + reached)))
        bound += new_loss
        alive = np.flatnonzero(bound <= best + tolerance)
        if len(alive) > MAX_STATES:
            alive = alive[np.argsort(bound[alive], kind="stable")[:MAX_STATES]]
        alive = alive[np.lexsort((new_loss[alive], new_latency[alive]))]
        falling = np.minimum.accumulate(new_loss[alive])
        alive = alive[np.r_[True, falling[1:] < falling[:-1]][: len(alive)]]
        if len(alive) == 0:
            return incumbent
        states_latency, states_loss = new_latency[alive], new_loss[alive]
        steps.append((int(group), alive // len(options), options[alive % len(options)]))
    choice = _trace(steps, int(np.argmin(states_loss)), len(order))
    return choice if _total(loss, choice) < _total(loss, incumbent) else incumbent


def _complete(
    hull: _Hull, open_groups: NDArray[np.bool_], left: Floats, loss: Floats, latency: Floats
) -> tuple[Floats, Floats]:
    """For the groups still open and the latency left: the least loss of the relaxed problem, and one within reach."""
    rows = np.flatnonzero(open_groups)
    segments = open_groups[hull.group]
    x = np.cumsum(np.r_[latency[rows, hull.fastest[rows]].sum(), hull.extra_latency[segments]])
    y = np.cumsum(np.r_[loss[rows, hull.fastest[rows]].sum(), -hull.saved_loss[segments]])
    floor = np.searchsorted(x, left, side="right") - 1
    reached = np.where(floor >= 0, y[np.maximum(floor, 0)], np.inf)
    bound = np.where(floor >= 0, np.interp(left, x, y), np.inf)
    return bound, reached


def _trace(steps: list[tuple[int, Ints, Ints]], state: int, groups: int) -> Ints:
    choice = np.zeros(groups, np.int64)
    for group, parent, option in reversed(steps):
        choice[group] = option[state]
        state = int(parent[state])
    return choice


def _price_bytes(loss: Floats, latency: Floats, limit: float, size: Floats, byte_limit: float) -> Ints | None:
    """The choice of least loss among those that fit, over prices of a byte found by bisection; None if none fits."""
    scale = float(np.max(loss[np.isfinite(latency)], initial=0.0)) or 1.0
    low, high = 0.0, 1e6 * scale / byte_limit if byte_limit > 0 else scale
    best: Ints | None = None
    for _ in range(PRICE_STEPS):
        price = float(np.sqrt(low * high)) if low else high
        choice = _solve_latency(loss + price * np.where(np.isfinite(latency), size, 0.0), latency, limit, False)
        if _total(size, choice) > byte_limit:
            if price == high:
                return None
            low = price
            continue
        high = price
        low = low or price * 1e-12
        if best is None or _total(loss, choice) < _total(loss, best):
            best = choice
    return None if best is None else _fill(best, loss, (latency, limit), (size, byte_limit))


def _solve_milp(loss: Floats, latency: Floats, limit: float, size: Floats, byte_limit: float) -> Ints:
    group, option = np.nonzero(np.isfinite(latency))
    columns = np.arange(len(group))
    one_each = coo_matrix((np.ones(len(group)), (group, columns)), shape=(len(loss), len(group)))
    rows = np.stack([latency[group, option] / limit, size[group, option] / max(byte_limit, 1.0)])
    bounds = [1.0, byte_limit / max(byte_limit, 1.0)]
    scale = float(np.max(np.abs(loss[group, option]))) or 1.0
    result = milp(
        loss[group, option] / scale,
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(rows, -np.inf, bounds)],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise _too_big(latency, limit, size, byte_limit)
    choice = np.zeros(len(loss), np.int64)
    taken = result.x > 0.5
    choice[group[taken]] = option[taken]
    return choice


def _check_latency(latency: Floats, limit: float) -> None:
    if np.any(np.isinf(latency).all(axis=1)):
        group = int(np.argmax(np.isinf(latency).all(axis=1)))
        raise InfeasibleError("search.infeasible", f"group {group} has no option that may be taken.")
    fastest = float(latency.min(axis=1).sum())
    if not fastest <= limit:
        message = f"no choice takes {limit:.6g} or less; the fastest takes {fastest:.6g}."
        raise InfeasibleError("search.infeasible", message, "Raise the latency limit, or allow more schemes.")


def _too_big(latency: Floats, limit: float, size: Floats, byte_limit: float) -> InfeasibleError:
    allowed = np.where(np.isfinite(latency), size, np.inf)
    choice = _solve_latency(allowed, latency, limit, False)
    message = (
        f"no choice takes {byte_limit:.0f} bytes or less at a latency of {limit:.6g} or less; "
        f"the smallest found at that latency takes {_total(size, choice):.0f}."
    )
    return InfeasibleError("search.infeasible", message, "Raise the memory limit or the latency limit.")


def _pad(table: Table) -> Floats:
    """Rows of equal length; what is missing is infinite."""
    if isinstance(table, np.ndarray):
        return table
    padded = np.full((len(table), max((len(row) for row in table), default=1)), np.inf)
    for group, row in enumerate(table):
        padded[group, : len(row)] = row
    return padded


def _total(table: Floats, choice: Ints) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def _genotype(choice: Ints) -> Genotype:
    return tuple(choice.tolist())
