"""Which points are worth measuring, which are finalists, and which one is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune import decide
from autotune.certify import Bound, Certificate
from autotune.decide import Point, choose
from autotune.search.problem import Candidate, Evaluation, GroupOptions, Option, Problem
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


def certificate(state):
    bound = Bound(0.0, 0.0, 0.0, 0.0, 2, 200)
    return Certificate(state, "data", 0.1, bound, bound, 1.0, 1.0, None)


FAST = Point("point 0", candidate((2, 2, 2), 0.02), True)
MIDDLE = Point("point 1", candidate((1, 1, 2), 0.01), True)
SAFE = Point("uniform w8a16-int8", candidate((1, 1, 1), 0.001), True)
UNTESTED = Point("point 3", candidate((2, 2, 1), 0.015), False)
POINTS = (FAST, MIDDLE, SAFE, UNTESTED)


def measured(**latencies):
    same = Interval(1.0, 1.0, 1.0)
    names = {"fast": "point 0", "middle": "point 1", "safe": "uniform w8a16-int8", "untested": "point 3"}
    runs = (Run(names[k], same, same, Interval(v, v, v), (v,)) for k, v in latencies.items())
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
    assert choose(POINTS, certificates, None, True) is chosen


def test_fast_is_what_was_measured_not_what_was_predicted():
    certificates = {point.name: certificate("certified") for point in (SAFE, MIDDLE, FAST)}
    assert choose(POINTS, certificates, measured(fast=5, middle=3, safe=4, untested=1), True) is MIDDLE


def test_without_losses_the_fastest_finalist():
    assert choose(POINTS, {}, None, False) is FAST
    assert choose(POINTS, {}, measured(fast=5, middle=3, safe=4, untested=1), False) is MIDDLE


def test_finalists_can_be_told_apart():
    close = [replace(candidate((2, 2, 2)), latency_us=latency) for latency in (100.0, 100.3, 101.0, 120.0)]
    assert [c.latency_us for c in decide._spread(close, 2)] == [100.0, 101.0]
    assert len(decide._spread(close, 9)) == 3


def test_a_safe_finalist_is_among_them():
    """Certification starts with it: bad luck of the others then leaves something certified."""
    fast = [replace(candidate((2, 2, 2), 0.09), latency_us=latency) for latency in (100.0, 110.0, 120.0)]
    safe = replace(candidate((1, 1, 1), 0.02), latency_us=200.0)
    assert decide._finalists([*fast, safe], 3, 0.1) == [*fast[:2], safe]
    assert decide._finalists([*fast, safe], 1, 0.1) == fast[:1]
    assert decide._finalists([fast[0], replace(safe, latency_us=105.0), *fast[1:]], 2, 0.1)[1].latency_us == 105.0


def test_points_are_spread_over_the_range_and_uniform_ones_come_first():
    line = [replace(candidate((1, 1, 1)), latency_us=float(n)) for n in range(11)]
    uniform = replace(candidate((2, 2, 2), source="uniform w4"), latency_us=50.0)
    chosen = decide._evenly([*line, uniform], 4)
    assert chosen[0] is uniform
    assert sorted(c.latency_us for c in chosen[1:]) == [0.0, 5.0, 10.0]
    assert decide._evenly(line, 0) == []
    assert len(decide._evenly(line, 99)) == 11


@pytest.mark.parametrize(
    ("genotype", "name"),
    [((0, 0, 0), "dense"), ((1, 1, 1), "uniform w8a16-int8"), ((1, 2, 0), "point 7"), ((0, 0, 1), "point 7")],
)
def test_points_have_the_names_people_know(genotype, name):
    assert decide._point_name(PROBLEM, candidate(genotype), 7) == name


def test_a_configuration_names_every_group():
    assert decide.configuration(PROBLEM, (0, 1, 2)) == {"0": "fp32", "1": "w8a16-int8", "2": "w4a16-int4-g32"}
