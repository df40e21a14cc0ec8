"""End-to-end runs: interleaved rounds, medians with intervals, savings paired by round."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import verify
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.workload import parse
from autotune.verify import MAX_ROUNDS, MIN_ROUNDS, EndToEnd, Interval, Run, interval, measure

GROUPS = tuple(LayerGroup(f"{n}", "o", n, (Linear(f"{n}", f"{n}", 64, 64, False),)) for n in range(3))
SPEC = ModelSpec("m", "M", "causal-lm", "fp32", None, GROUPS, (), False)
WORKLOAD = parse("1,8,4")
REST_US = 70.0


class Clock:
    """Stands in for a model on its kernels: time is arithmetic, and `slow` rounds are slow for everyone."""

    spec = SPEC

    def __init__(self, cost, slow=()):
        self.cost, self.slow, self.calls = cost, set(slow), []
        self.configuration = {}

    def select(self, configuration):
        self.configuration = configuration
        self.calls.append(configuration)

    def time_request(self, batch, prompt, steps):
        groups = sum(self.cost[self.configuration.get(group.name, "fp32")] for group in GROUPS)
        factor = 2.0 if len(self.calls) in self.slow else 1.0
        total = (REST_US + groups) * 1e-6 * factor
        return 0.2 * total, 0.8 * total / 4  # prefill, and one of the four decode steps


COST = {"fp32": 100.0, "w8a16-int8": 60.0, "w4a16-int4-g32": 40.0, "zeros": 0.0}


def test_configurations_take_turns():
    clock = Clock(COST)
    configurations = {"dense": {}, "a": {"0": "w8a16-int8"}, "b": {"1": "w8a16-int8"}}
    result = measure(clock, configurations, WORKLOAD, 1e-9)
    assert {len(run.rounds_ms) for run in result.runs} == {MIN_ROUNDS}
    rounds = [clock.calls[start : start + 3] for start in range(3, len(clock.calls), 3)]  # the first is the warm-up
    assert all(sorted(map(str, turn)) == sorted(map(str, configurations.values())) for turn in rounds)
    assert len({str(turn[0]) for turn in rounds}) == 3  # none is always first


def test_rounds_are_bounded():
    assert len(measure(Clock(COST), {"dense": {}}, WORKLOAD, 1e9).runs[0].rounds_ms) == MAX_ROUNDS


def test_a_few_disturbed_rounds_do_not_move_the_median():
    quiet = measure(Clock(COST), {"dense": {}}, WORKLOAD, 1e-9).runs[0].latency_ms.median
    disturbed = measure(Clock(COST, slow=(3, 5)), {"dense": {}}, WORKLOAD, 1e-9).runs[0].latency_ms.median
    assert disturbed == quiet


def test_noise_is_said():
    assert measure(Clock(COST), {"dense": {}}, WORKLOAD, 1e-9).noisy == ""
    assert "dense" in measure(Clock(COST, slow=(2, 4, 6, 8)), {"dense": {}}, WORKLOAD, 1e-9).noisy


def test_a_mix_of_requests_is_weighed():
    asked = []

    class Fixed(Clock):
        def time_request(self, batch, prompt, steps):
            asked.append(steps)
            assert steps in (0, verify.DECODE_STEPS, verify.FEWER_STEPS)
            assert (steps > 0) == (batch == 1)
            return (1e-3, 2e-3) if batch == 1 else (8e-3, 0.0)

    run = measure(Fixed(COST), {"dense": {}}, parse("3*1,8,20+1*2,8,0"), 1e-9).runs[0]
    warm, timed = asked[0], set(asked[1:]) - {0}
    assert (warm, timed) == (verify.DECODE_STEPS, {verify.FEWER_STEPS})  # no time at all: every round is too long
    assert run.latency_ms.median == pytest.approx(0.75 * (1 + 20 * 2) + 0.25 * 8)
    assert run.prefill_ms.median == pytest.approx(0.75 * 1 + 0.25 * 8)
    assert run.phases_ms["prefill"] == pytest.approx((0.75 * 1 + 0.25 * 8,) * MIN_ROUNDS)
    assert run.phases_ms["decode"] == pytest.approx((0.75 * 20 * 2,) * MIN_ROUNDS)


def test_a_phase_that_the_workload_does_not_have_is_not_there():
    run = measure(Clock(COST), {"dense": {}}, parse("1,8,0"), 1e-9).runs[0]
    assert set(run.phases_ms) == {"prefill"}
    assert run.rounds_ms == run.phases_ms["prefill"]


def made(**rounds):
    same = Interval(1.0, 1.0, 1.0)
    halves = {name: tuple(float(value) / 2 for value in values) for name, values in rounds.items()}
    runs = (Run(name, same, same, same, {"prefill": half, "decode": half}) for name, half in halves.items())
    return EndToEnd(tuple(runs), "")


def test_savings_are_paired_by_round():
    """Drift hits both alike: the saving is sharp where the times are not."""
    drift = np.linspace(10, 20, 20)
    saving = made(dense=drift, fast=drift - 1).saving_ms("fast")
    assert (saving.low, saving.median, saving.high) == pytest.approx((1, 1, 1))
    assert made(dense=drift, fast=drift / 2).speedup("fast").median == pytest.approx(2)


def test_savings_of_phases_are_paired_by_round_too():
    drift = tuple(np.linspace(10, 20, 20))
    same = Interval(1.0, 1.0, 1.0)
    dense = Run("dense", same, same, same, {"prefill": drift, "decode": drift})
    mixed = {"prefill": tuple(value + 1 for value in drift), "decode": tuple(value - 3 for value in drift)}
    found = EndToEnd((dense, Run("mixed", same, same, same, mixed)), "")
    assert found.saving_ms("mixed", phase="prefill").median == pytest.approx(-1)
    assert found.saving_ms("mixed", phase="decode").median == pytest.approx(3)
    assert found.saving_ms("mixed").median == pytest.approx(2)


@given(st.lists(st.floats(0.1, 100), min_size=3, max_size=30))
def test_an_interval_holds_its_median_and_is_within_the_samples(samples):
    found = interval(np.array(samples))
    assert min(samples) <= found.low <= found.median <= found.high <= max(samples)
    assert interval(np.array(samples)) == found


def test_intervals_cover():
    generator = np.random.default_rng(0)
    found = [interval(generator.normal(10, 1, 25), resamples=200) for _ in range(300)]
    assert 0.88 <= np.mean([item.low <= 10 <= item.high for item in found]) <= 0.99


def test_results_survive_json():
    result = measure(Clock(COST), {"dense": {}, "a": {"0": "w8a16-int8"}}, WORKLOAD, 1e-9)
    assert EndToEnd.from_json(json.loads(json.dumps(result.to_json()))) == result
