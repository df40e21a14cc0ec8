"""Which points are worth measuring, which are finalists, and which one is chosen and why."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from autotune import finalists
from autotune.certify import Bound, Certificate
from autotune.finalists import Point, choose
from autotune.search.problem import Candidate, Evaluation, GroupOptions, Option, Problem
from autotune.search.ratio import PRIOR, LossRatio
from autotune.verify import EndToEnd, Interval, Run

DENSE, INT8, INT4 = (
    Option("fp32", "a", 100.0, 0.0, 400),
    Option("w8a16-int8", "b", 60.0, 1e-4, 100),
    Option("w4a16-int4-g32", "c", 40.0, 1e-2, 60),
)
PROBLEM = Problem(tuple(GroupOptions(f"{n}", "o", n, (DENSE, INT8, INT4)) for n in range(3)), 50.0, 1000)


def candidate(genotype, kl=0.0, source="study 1"):
    evaluation = Evaluation((100.0, 100.0), (kl * 100,) * 2, (kl * 100,) * 2)
    latency, size = PROBLEM.latency_us(genotype), PROBLEM.weight_bytes(genotype)
    return Candidate(genotype, latency, size, 0.0, evaluation, source)


def certificate(state, upper=0.0):
    bound = Bound(0.0, 0.0, upper, 0.0, 2, 200)
    return Certificate(state, "data", 0.1, bound, bound, 1.0, 1.0, None)


FAST = Point("point 0", candidate((2, 2, 2), 0.02), True)
MIDDLE = Point("point 1", candidate((1, 1, 2), 0.01), True)
SAFE = Point("uniform w8a16-int8", candidate((1, 1, 1), 0.001), True)
UNTESTED = Point("point 3", candidate((2, 2, 1), 0.015), False)
POINTS = (FAST, MIDDLE, SAFE, UNTESTED)


NAMES = {"fast": "point 0", "middle": "point 1", "safe": "uniform w8a16-int8", "untested": "point 3"}


def measured(**latencies):
    """A run; a latency is a number, the same in every round, or a list of rounds."""
    same, runs = Interval(1.0, 1.0, 1.0), []
    for name, given in latencies.items():
        rounds = tuple(given) if isinstance(given, list) else (given,) * 8
        middle = statistics.median(rounds)
        runs.append(Run(NAMES[name], same, same, Interval(middle, middle, middle), {"prefill": rounds}))
    return EndToEnd(tuple(runs), "")


@pytest.mark.parametrize(
    ("certified", "chosen"),
    [([SAFE, MIDDLE, FAST], FAST), ([SAFE, MIDDLE], MIDDLE), ([SAFE], SAFE), ([], SAFE)],
)
def test_the_fastest_that_passes_else_the_safest(certified, chosen):
    certificates = {point.name: certificate("certified") for point in certified}
    rest = [point for point in (SAFE, MIDDLE, FAST) if point not in certified]
    if rest:
        certificates[rest[0].name] = certificate("not_certified")
    assert choose(POINTS, certificates, None, True)[0] is chosen


def test_fast_is_what_was_measured_not_what_was_predicted():
    certificates = {point.name: certificate("certified") for point in (SAFE, MIDDLE, FAST)}
    point, why = choose(POINTS, certificates, measured(fast=5, middle=3, safe=4, untested=1), True)
    assert point is MIDDLE
    assert why == "point 1 is the fastest measured of 3 certified"


DRIFT = [
    10.0,
    10.5,
    11.0,
    11.5,
    12.0,
    12.5,
    13.0,
    13.5,
    14.0,
]  # of the machine, far larger than what tells points apart


def rounds(offset, noise=0.0):
    """Slower by `offset` in every round, give or take."""
    return [value + offset + noise * (-1) ** number for number, value in enumerate(DRIFT)]


def certified(**uppers):
    points = {"fast": FAST, "middle": MIDDLE, "safe": SAFE}
    return {points[name].name: certificate("certified", upper) for name, upper in uppers.items()}


def test_of_points_as_fast_the_safest_is_taken_and_the_reason_says_so():
    run = measured(fast=rounds(0.0), middle=rounds(0.001, 0.02), safe=rounds(2.0))
    point, why = choose(POINTS, certified(fast=0.09, middle=0.05, safe=0.01), run, True)
    assert point is MIDDLE
    assert why == "point 1 is as fast as point 0 within what the run can tell, and safer"


def test_a_safer_point_that_is_slower_in_every_round_is_not_as_fast():
    """Though the machine drifts by more than the difference: rounds are paired."""
    run = measured(fast=rounds(0.0), middle=rounds(0.1), safe=rounds(0.2))
    point, why = choose(POINTS, certified(fast=0.09, middle=0.05, safe=0.01), run, True)
    assert point is FAST
    assert why == "point 0 is the fastest measured of 3 certified"


def test_a_run_too_noisy_to_tell_does_not_make_the_slow_as_fast():
    noisy = measured(fast=[10.0, 30.0] * 4, middle=[32.0, 13.0] * 4, safe=[100.0] * 8)
    saving = noisy.saving_ms("point 1", "point 0")
    assert saving.low < 0 < saving.high
    assert choose(POINTS, certified(fast=0.09, middle=0.05, safe=0.06), noisy, True)[0] is FAST


def test_safest_is_what_certification_bounds_lowest():
    run = measured(fast=rounds(0.0), middle=rounds(0.001, 0.02), safe=rounds(0.002, 0.03))
    assert choose(POINTS, certified(fast=0.09, middle=0.05, safe=0.06), run, True)[0] is MIDDLE
    assert choose(POINTS, certified(fast=0.04, middle=0.05, safe=0.06), run, True)[0] is FAST
    same = certified(fast=0.05, middle=0.05, safe=0.05)
    assert choose(POINTS, same, run, True)[0] is FAST  # the faster of two that are as safe


def test_only_what_was_certified_counts_as_safe():
    run = measured(fast=rounds(0.0), middle=rounds(0.001, 0.02), safe=rounds(0.002, 0.03))
    certificates = certified(fast=0.09) | {MIDDLE.name: certificate("not_certified", 0.01)}
    assert choose(POINTS, certificates, run, True)[0] is FAST
    point, why = choose(POINTS, {MIDDLE.name: certificate("violated")}, run, True)
    assert point is SAFE
    assert "none of the finalists was certified" in why


def test_without_losses_the_fastest_finalist():
    assert choose(POINTS, {}, None, False)[0] is FAST
    assert choose(POINTS, {}, measured(fast=5, middle=3, safe=4, untested=1), False)[0] is MIDDLE


def test_finalists_can_be_told_apart():
    close = [replace(candidate((2, 2, 2)), latency_us=latency) for latency in (100.0, 100.3, 101.0, 120.0)]
    assert [c.latency_us for c in finalists.spread(close, 2)] == [100.0, 101.0]
    assert len(finalists.spread(close, 9)) == 3


def test_a_safe_finalist_is_among_them():
    """Certification starts with it: bad luck of the others then leaves something certified."""
    fast = [replace(candidate((2, 2, 2), 0.09), latency_us=latency) for latency in (100.0, 110.0, 120.0)]
    safe = replace(candidate((1, 1, 1), 0.02), latency_us=200.0)
    assert finalists._finalists([*fast, safe], 3, 0.1, PRIOR) == [*fast[:2], safe]
    assert finalists._finalists([*fast, safe], 1, 0.1, PRIOR) == fast[:1]
    nearer = [fast[0], replace(safe, latency_us=105.0), *fast[1:]]
    assert finalists._finalists(nearer, 2, 0.1, PRIOR)[1].latency_us == 105.0
    # What is safe is what the loss ratio of the search makes of it.
    assert finalists._finalists([*fast, safe], 3, 0.1, LossRatio(2.0, 0.1, 0.2, 1.0, ())) == fast


def test_points_are_spread_over_the_range_and_uniform_ones_come_first():
    line = [replace(candidate((1, 1, 1)), latency_us=float(n)) for n in range(11)]
    uniform = replace(candidate((2, 2, 2), source="uniform w4"), latency_us=50.0)
    chosen = finalists._evenly([*line, uniform], 3)
    assert chosen[0] is uniform
    assert sorted(c.latency_us for c in chosen[1:]) == [0.0, 5.0, 10.0]
    assert finalists._evenly(line, 0) == []
    assert len(finalists._evenly(line, 99)) == 11


@pytest.mark.parametrize(
    ("genotype", "name"),
    [((0, 0, 0), "dense"), ((1, 1, 1), "uniform w8a16-int8"), ((1, 2, 0), "point 7"), ((0, 0, 1), "point 7")],
)
def test_points_have_the_names_people_know(genotype, name):
    assert finalists._point_name(PROBLEM, candidate(genotype), 7) == name
