"""Interleaved timing under a fake clock: neighbours are seen, drift cancels in ratios, order rotates."""

import random

import pytest

from autotune.errors import UsageError
from autotune.profilers.timer import Protocol, measure, ratio, timing

QUICK = Protocol(warm_s=0.0)


class FakeMachine:
    """A clock that candidates advance; `slowdown` maps the time of day to a factor."""

    def __init__(self, slowdown=lambda now: 1.0, jitter=0.002, seed=0):
        self.now, self.slowdown, self.jitter, self.random = 0.0, slowdown, jitter, random.Random(seed)
        self.calls = []

    def clock(self):
        return self.now

    def candidate(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slowdown(self.now) * (1 + self.jitter * self.random.random())

        return call

    def measure(self, seconds, protocol=QUICK, **more):
        calls = {name: self.candidate(name, value) for name, value in seconds.items()}
        return measure(calls, protocol, clock=self.clock, **more)


def test_a_quiet_machine_gives_the_truth_in_microseconds():
    result = FakeMachine().measure({"a": 10e-6, "b": 20e-6})
    assert result["a"].median_us == pytest.approx(10, rel=0.01)
    assert result["b"].median_us == pytest.approx(20, rel=0.01)
    assert not result["a"].noisy and result["a"].rounds == QUICK.rounds
    assert result["a"].low_us <= result["a"].median_us <= result["a"].high_us
    assert ratio(result["b"], result["a"]).value == pytest.approx(2, rel=0.01)
    assert ratio(result["b"], result["a"]).apart


def test_samples_are_long_enough_for_the_clock():
    machine = FakeMachine()
    machine.measure({"a": 1e-6})
    assert len(machine.calls) > 1000 * QUICK.rounds  # about 1500 calls of 1 us a sample


def test_candidates_take_turns_and_the_order_rotates():
    machine, order = FakeMachine(), []
    machine.measure(
        {"a": 2e-3, "b": 2e-3, "c": 2e-3}, Protocol(warm_s=0.0, rounds=3, max_rounds=3), starting=order.append
    )
    assert order[-9:] == list("abcbcacab")


def test_a_neighbour_in_the_second_half_is_reported_not_averaged():
    noisy = FakeMachine(lambda now: 1.0 if now < 0.045 else 1.5).measure({"a": 1e-3, "b": 1.1e-3})
    assert noisy["a"].noisy and noisy["b"].noisy


def test_a_neighbour_that_comes_and_goes_is_reported():
    chance = random.Random(1)
    noisy = FakeMachine(lambda now: chance.choice([1.0, 1.6])).measure({"a": 2e-3})
    assert noisy["a"].noisy and noisy["a"].rounds == QUICK.max_rounds


def test_noise_asks_for_more_rounds_and_quiet_ends_it():
    result = FakeMachine(lambda now: 1.4 if now < 0.012 else 1.0).measure({"a": 2e-3})
    assert not result["a"].noisy


def test_drift_cancels_in_the_ratio():
    """The machine slows to half its speed during the run: medians are useless, the ratio is not."""
    machine = FakeMachine(lambda now: 1.0 + now / 0.2)
    result = machine.measure({"a": 2e-3, "b": 2.2e-3}, Protocol(warm_s=0.0, max_rounds=20))
    between = ratio(result["b"], result["a"])
    assert result["a"].drift > 0.1 and result["a"].noisy
    assert (
        between.apart and between.low == pytest.approx(1.1, abs=0.04) and between.high == pytest.approx(1.1, abs=0.04)
    )


def test_equal_candidates_are_not_told_apart():
    """A 95% interval may miss the truth one time in twenty, not often."""
    results = [FakeMachine(jitter=0.02, seed=seed).measure({"a": 2e-3, "b": 2e-3}) for seed in range(15)]
    assert sum(ratio(result["a"], result["b"]).apart for result in results) <= 3


def test_a_slow_candidate_stops_early_and_the_others_go_on():
    result = FakeMachine().measure({"slow": 1.0, "fast": 1e-3})
    assert result["slow"].rounds == QUICK.min_rounds
    assert result["fast"].rounds == QUICK.rounds


def test_before_runs_ahead_of_every_sample_untimed():
    machine = FakeMachine()

    def prepare():
        machine.now += 5.0

    result = machine.measure({"a": 2e-3}, before={"a": prepare})
    assert result["a"].median_us == pytest.approx(2000, rel=0.01)


def test_the_interval_is_reproducible():
    samples = [random.Random(3).gauss(100, 5) for _ in range(20)]
    assert timing(samples, QUICK) == timing(samples, QUICK)


def test_nothing_to_time_is_an_error():
    with pytest.raises(UsageError, match=r"timer\.nothing"):
        measure({})
