"""The knapsack equals brute force, its hull is a front, and what cannot be done is said."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import InfeasibleError
from autotune.search.knapsack import hull_front, solve


def total(table, genotype):
    return sum(row[option] for row, option in zip(table, genotype, strict=True))


def brute_force(losses, latencies, limit, weight_bytes=None, byte_limit=None):
    """The least loss, or None."""
    best = None
    for genotype in itertools.product(*(range(len(row)) for row in losses)):
        if total(latencies, genotype) > limit * (1 + 1e-12):
            continue
        if weight_bytes is not None and total(weight_bytes, genotype) > byte_limit:
            continue
        loss = total(losses, genotype)
        best = loss if best is None else min(best, loss)
    return best


@st.composite
def tables(draw, count=2):
    """`count` tables of one ragged shape; small integers make ties and dominated options common."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = st.one_of(st.integers(0, 6).map(float), st.integers(0, 10**6).map(lambda number: number / 1e4))
    return [[draw(st.lists(number, min_size=n, max_size=n)) for n in widths] for _ in range(count)]


@given(tables(), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_exact_equals_brute_force(given_tables, share):
    losses, latencies = given_tables
    fastest, slowest = sum(map(min, latencies)), sum(map(max, latencies))
    limit = fastest + share * (slowest - fastest)
    genotype = solve(losses, latencies, limit)
    assert total(latencies, genotype) <= limit * (1 + 1e-9)
    assert total(losses, genotype) == pytest.approx(brute_force(losses, latencies, limit), abs=1e-9)


@given(tables(3), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_two_limits_equal_brute_force(given_tables, share, byte_share):
    losses, latencies, sizes = given_tables
    sizes = [[round(value) + 1 for value in row] for row in sizes]
    latencies = [[round(value) + 1 for value in row] for row in latencies]
    limit = sum(map(min, latencies)) + round(share * 20)
    byte_limit = round(sum(map(min, sizes)) * (0.8 + byte_share))
    expected = brute_force(losses, latencies, limit, sizes, byte_limit)
    if expected is None:
        with pytest.raises(InfeasibleError, match=r"search\.infeasible"):
            solve(losses, latencies, limit, sizes, byte_limit)
        return
    genotype = solve(losses, latencies, limit, sizes, byte_limit)
    priced = solve(losses, latencies, limit, sizes, byte_limit, exact=False)
    assert total(losses, genotype) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for found in (genotype, priced):
        assert total(latencies, found) <= limit
        assert total(sizes, found) <= byte_limit


@given(tables())
@settings(max_examples=60, deadline=None)
def test_hull_points_are_optimal_at_their_latency(given_tables):
    losses, latencies = given_tables
    front = hull_front(losses, latencies)
    assert [latency for latency, _ in front] == sorted(latency for latency, _ in front)
    for latency, genotype in front:
        assert total(latencies, genotype) == pytest.approx(latency)
        assert total(losses, genotype) == pytest.approx(brute_force(losses, latencies, latency), abs=1e-9)


def large(groups=250, options=12, seed=0):
    random = np.random.default_rng(seed)
    latencies = random.uniform(10, 100, (groups, 1)) * random.uniform(0.3, 1.0, (groups, options))
    losses = random.lognormal(0, 1, (groups, 1)) * 10 ** random.uniform(-6, -2, options)
    return losses, latencies * (1 + 1e-3 * random.normal(size=latencies.shape))


def test_large_problems_take_milliseconds_and_the_fill_is_close():
    losses, latencies = large()
    limit = 1.3 * latencies.min(axis=1).sum()
    start = time.perf_counter()
    exact = solve(losses, latencies, limit)
    assert time.perf_counter() - start < 1.0  # 25 ms on an idle core
    filled = solve(losses, latencies, limit, exact=False)
    gap = total(losses, filled) / total(losses, exact) - 1
    assert 0 <= gap < 0.02


def test_losses_affine_in_latency_stay_bounded():
    """The worst case, a subset sum: bounded in time, and next to the bound."""
    _, latencies = large(60, 8)
    losses = 200 - latencies
    limit = latencies.min(axis=1).sum() * 1.5
    genotype = solve(losses, latencies, limit)
    assert total(latencies, genotype) <= limit * (1 + 1e-9)
    assert total(losses, genotype) == pytest.approx(200 * 60 - limit, rel=1e-4)


def test_an_infinite_latency_bars_an_option():
    assert solve([[0.0, 1.0], [0.0, 1.0]], [[np.inf, 1.0], [1.0, 0.5]], 10.0) == (1, 0)
    with pytest.raises(InfeasibleError, match="group 1"):
        solve([[0.0], [0.0]], [[1.0], [np.inf]], 10.0)


def test_the_nearest_feasible_point_is_named():
    with pytest.raises(InfeasibleError, match="the fastest takes 3") as caught:
        solve([[0.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [2.0, 2.0]], 2.5)
    assert caught.value.code == "search.infeasible"
    with pytest.raises(InfeasibleError, match="takes 30") as caught:
        solve([[0.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [2.0, 2.0]], 4.0, [[20, 10], [20, 20]], 25)
    assert caught.value.code == "search.infeasible"
