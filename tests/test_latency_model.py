"""The latency model: rest and one factor a scheme, fitted on uniform runs, predict what a mix takes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import tiny

from autotune.latency_model import Calibration, calibrate, isolated_us, uniform, uniform_configurations
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.workload import parse
from autotune.verify import measure

GROUPS = tuple(LayerGroup(f"{n}", "o", n, (Linear(f"{n}", f"{n}", 64, 64, False),)) for n in range(3))
SPEC = ModelSpec("m", "M", "causal-lm", "fp32", None, GROUPS, (), False)
WORKLOAD = parse("1,8,4")
REST_US = 70.0
COST = {"fp32": 100.0, "w8a16-int8": 60.0, "w4a16-int4-g32": 40.0, "zeros": 0.0}
AVAILABLE = {"0": ["fp32", "w8a16-int8"], "1": ["fp32", "w8a16-int8", "w4a16-int4-g32"], "2": ["fp32"]}


class Clock:
    """Stands in for a model on its kernels: time is arithmetic, and drifts from call to call."""

    spec = SPEC

    def __init__(self, cost, drift=0.0):
        self.cost, self.drift, self.calls = cost, drift, 0
        self.configuration = {}

    def select(self, configuration):
        self.configuration = configuration

    def time_request(self, batch, prompt, steps):
        self.calls += 1
        groups = sum(self.cost[self.configuration.get(group.name, "fp32")] for group in GROUPS)
        total = (REST_US + groups) * 1e-6 + self.drift * self.calls * 1e-6
        return 0.2 * total, 0.8 * total / 4  # prefill, and one of the four decode steps


@pytest.fixture
def table():
    space = tiny.space_of(SPEC)
    return tiny.fake_profile(SPEC, space, tiny.here(), WORKLOAD)


def test_the_fit_returns_the_numbers_that_made_the_times(table):
    """factor x isolated time = the time in the model, rest = what is left without linears."""
    fitted = calibrate(Clock(COST), table, AVAILABLE, WORKLOAD, 1e-9)
    assert fitted.rest_us == pytest.approx(REST_US)
    for name in ("fp32", "w8a16-int8", "w4a16-int4-g32"):
        assert fitted.group_us(table, GROUPS[0], name, WORKLOAD) == pytest.approx(COST[name], rel=1e-6)


def test_predictions_add_up_to_what_a_mix_takes(table):
    fitted = calibrate(Clock(COST), table, AVAILABLE, WORKLOAD, 1e-9)
    mix = {"0": "w8a16-int8", "1": "w4a16-int4-g32"}
    predicted = fitted.rest_us + sum(fitted.group_us(table, g, mix.get(g.name, "fp32"), WORKLOAD) for g in GROUPS)
    measured = measure(Clock(COST), {"dense": {}, "mix": mix}, WORKLOAD, 1e-9).of("mix").latency_ms.median
    assert predicted / 1e3 == pytest.approx(measured)


def test_a_scheme_that_costs_less_than_nothing_is_set_to_nothing(table):
    assert calibrate(Clock(COST | {"w8a16-int8": -500.0}), table, AVAILABLE, WORKLOAD, 1e-9).factors["w8a16-int8"] == 0


def test_uniform_means_wherever_it_is_offered():
    assert uniform(SPEC, AVAILABLE, "w4a16-int4-g32") == {"0": "fp32", "1": "w4a16-int4-g32", "2": "fp32"}


def test_a_fit_sees_dense_zeros_and_every_uniform_scheme():
    found = uniform_configurations(SPEC, AVAILABLE)
    assert set(found) == {"dense", "zeros", "uniform w8a16-int8", "uniform w4a16-int4-g32"}
    assert set(found["zeros"].values()) == {"zeros"}
    assert set(found["dense"].values()) == {"fp32"}


def test_drift_of_the_machine_hardly_enters_the_fit(table):
    """Configurations take turns and savings are paired, so a slow change hits all alike."""
    fitted = calibrate(Clock(COST, drift=0.5), table, AVAILABLE, WORKLOAD, 1e-9)
    for name in ("fp32", "w8a16-int8", "w4a16-int4-g32"):
        assert fitted.group_us(table, GROUPS[0], name, WORKLOAD) == pytest.approx(COST[name], abs=5)


def test_the_predicted_saving_is_over_dense(table):
    fitted = calibrate(Clock(COST), table, AVAILABLE, WORKLOAD, 1e-9)
    assert fitted.saving_us(table, SPEC, {"0": "w8a16-int8", "1": "w4a16-int4-g32"}, WORKLOAD) == pytest.approx(100)
    assert fitted.saving_us(table, SPEC, {}, WORKLOAD) == 0


def test_a_calibration_survives_json(table):
    fitted = calibrate(Clock(COST), table, AVAILABLE, WORKLOAD, 1e-9)
    assert Calibration.from_json(json.loads(json.dumps(asdict(fitted)))) == fitted


def test_with_nothing_run_the_table_stands_for_itself(table):
    assert Calibration(0.0, {}, None).group_us(table, GROUPS[0], "fp32", WORKLOAD) == isolated_us(
        table, GROUPS[0], "fp32", WORKLOAD
    )
