"""The latency model: rest and a factor per scheme and phase, fitted on uniform runs, predict what a mix takes."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import tiny

from autotune.latency_model import FAR, Calibration, calibrate, fit, isolated_us, uniform, uniform_configurations
from autotune.profilers.table import LatencyRow, LatencyTable
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.workload import parse
from autotune.verify import EndToEnd, Interval, Run, measure

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
    assert fitted.total_rest_us == pytest.approx(REST_US)
    assert fitted.rest_us == pytest.approx({"prefill": 0.2 * REST_US, "decode": 0.8 * REST_US})
    for name in ("fp32", "w8a16-int8", "w4a16-int4-g32"):
        assert fitted.group_us(table, GROUPS[0], name, WORKLOAD) == pytest.approx(COST[name], rel=1e-6)


def test_predictions_add_up_to_what_a_mix_takes(table):
    fitted = calibrate(Clock(COST), table, AVAILABLE, WORKLOAD, 1e-9)
    mix = {"0": "w8a16-int8", "1": "w4a16-int4-g32"}
    predicted = fitted.total_rest_us + sum(fitted.group_us(table, g, mix.get(g.name, "fp32"), WORKLOAD) for g in GROUPS)
    measured = measure(Clock(COST), {"dense": {}, "mix": mix}, WORKLOAD, 1e-9).of("mix").latency_ms.median
    assert predicted / 1e3 == pytest.approx(measured)


def test_a_scheme_that_seems_free_or_absurdly_slow_is_held_near_the_dense_one(table):
    fitted = calibrate(Clock(COST | {"w8a16-int8": -500.0}), table, AVAILABLE, WORKLOAD, 1e-9)
    dense = fitted.factors["fp32"]
    assert fitted.factors["w8a16-int8"] == pytest.approx({phase: dense[phase] / FAR for phase in dense})
    fitted = calibrate(Clock(COST | {"w8a16-int8": 1e5}), table, AVAILABLE, WORKLOAD, 1e-9)
    assert fitted.factors["w8a16-int8"] == pytest.approx({phase: dense[phase] * FAR for phase in dense})


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
    alone = table.best(GROUPS[0], "fp32", WORKLOAD).latency_us
    assert Calibration({}, {}, None).group_us(table, GROUPS[0], "fp32", WORKLOAD) == pytest.approx(alone)
    assert sum(isolated_us(table, GROUPS[0], "fp32", WORKLOAD).values()) == pytest.approx(alone)


FACTORS = {"fp32": (1.0, 1.0), "w8a16-int8": (0.3, 1.4), "w4a16-int4-g32": (2.0, 0.4), "zeros": (0.0, 0.0)}


class TwoPhases(Clock):
    """A scheme that is good in prompts and bad in decode steps: in the model a call takes `FACTORS` times its own."""

    def __init__(self, table):
        super().__init__({})
        self.table = table

    def time_request(self, batch, prompt, steps):
        self.calls += 1
        request = parse(f"{batch},{prompt},{steps}")
        seconds = {"prefill": 30e-6 * batch, "decode": 50e-6 * batch}
        for group in GROUPS:
            name = self.configuration.get(group.name, "fp32")
            alone = isolated_us(self.table, group, "fp32" if name == "zeros" else name, request)
            for factor, (phase, time_us) in zip(FACTORS[name], alone.items(), strict=False):
                seconds[phase] += factor * time_us * 1e-6 / (steps if phase == "decode" else 1)
        return seconds["prefill"], seconds["decode"] if steps else 0.0


@pytest.mark.parametrize("text", ["1,8,4", "1,8,0", "0.7*1,8,4+0.3*2,16,0", "3*1,8,4+1*4,32,12"])
def test_every_phase_of_a_scheme_has_its_own_factor(text):
    """Also in a mix of requests, with its weights; a phase that the workload does not have drops out."""
    workload = parse(text)
    names = {phase.name for phase in workload.phases}
    table = tiny.fake_profile(SPEC, tiny.space_of(SPEC), tiny.here(), parse("1,8,4+2,16,0+4,32,12"))
    clock = TwoPhases(table)
    fitted = calibrate(clock, table, AVAILABLE, workload, 1e-9)
    assert set(fitted.rest_us) == names
    for scheme in ("fp32", "w8a16-int8", "w4a16-int4-g32"):
        given = dict(zip(("prefill", "decode"), FACTORS[scheme], strict=True))
        assert fitted.factors[scheme] == pytest.approx({phase: given[phase] for phase in names})
    mix = {"0": "w8a16-int8", "1": "w4a16-int4-g32"}
    run = measure(clock, {"dense": {}, "mix": mix}, workload, 1e-9)
    savings = fitted.phase_savings_us(table, SPEC, mix, workload)
    assert savings == pytest.approx({phase: run.saving_ms("mix", phase=phase).median * 1e3 for phase in names})
    assert fitted.saving_us(table, SPEC, mix, workload) == pytest.approx(run.saving_ms("mix").median * 1e3)
    assert sum(savings.values()) == pytest.approx(fitted.saving_us(table, SPEC, mix, workload))


# Measured: the demo model's shapes, chat, in milliseconds end to end (prefill, decode step) and microseconds alone
# (rows 128, rows 1; the head sees one row). Decode steps of bf16 and int4 take 1.6 times what their kernels do alone.
RECORDED_MS = {
    "dense": (10.441, 1.8737),
    "zeros": (2.5214, 0.8182),
    "uniform w4a16-int4-g128": (14.8151, 1.4213),
    "uniform w8a16-int8": (11.7167, 1.3344),
    "uniform w8a8-int8": (9.1102, 1.8137),
}
RECORDED_US = {  # role -> (prefill, decode step), of one of two layers
    "bf16": {"qkv": (495.5, 51.4), "o": (371.3, 43.4), "gate_up": (1881.8, 120.8), "down": (948.4, 76.1)},
    "w8a8-int8": {"qkv": (411.5, 78.6), "o": (334.0, 76.6), "gate_up": (1181.0, 112.5), "down": (731.7, 92.1)},
    "w8a16-int8": {"qkv": (620.9, 29.2), "o": (469.1, 21.1), "gate_up": (2343.7, 104.8), "down": (1149.9, 48.4)},
    "w4a16-int4-g128": {"qkv": (898.0, 23.6), "o": (680.1, 18.3), "gate_up": (3304.8, 84.1), "down": (1644.9, 44.1)},
}
RECORDED_HEAD_US = {"bf16": 54.3, "w8a8-int8": 93.3, "w8a16-int8": 53.8, "w4a16-int4-g128": 44.2}
WIDTHS = {"qkv": (1024, 768), "o": (768, 768), "gate_up": (4096, 768), "down": (768, 2048), "lm_head": (2048, 768)}


def recorded():
    """(spec, table, available, workload, run) of the record; rounds drift together by up to 10%."""
    workload, groups, rows = parse("1,128,64"), [], []
    for role, (outputs, inputs) in WIDTHS.items():
        for layer in (None,) if role == "lm_head" else (0, 1):
            name = f"{role}.{layer}"
            linear = Linear(name, name, outputs, inputs, False)
            groups.append(LayerGroup(name, role, layer, (linear,), last_token_only=role == "lm_head"))
        for scheme, times in RECORDED_US.items():
            both = times.get(role, (None, RECORDED_HEAD_US[scheme]))
            for count, time_us in zip((128, 1), both, strict=True):
                if time_us is not None:
                    key = ("kernel", scheme, (outputs,), inputs, False, "bf16", count, None)
                    rows.append(LatencyRow(*key, time_us, time_us, time_us, 20, "measured", False, "", 1))
    spec = ModelSpec("m", "M", "causal-lm", "bf16", None, tuple(groups), (), False)
    drift, same = np.linspace(1.0, 1.1, 21), Interval(1.0, 1.0, 1.0)
    runs = []
    for name, (prefill, step) in RECORDED_MS.items():
        phases = {"prefill": tuple(prefill * drift), "decode": tuple(64 * step * drift)}
        runs.append(Run(name, same, same, same, phases))
    available = {group.name: list(RECORDED_US) for group in groups}
    return spec, LatencyTable("t", "f", tuple(rows)), available, workload, EndToEnd(tuple(runs), "")


def test_uniform_configurations_are_reproduced_exactly_in_every_phase():
    spec, table, available, workload, run = recorded()
    fitted = fit(run, table, spec, available, workload)
    for scheme in ("w8a8-int8", "w8a16-int8", "w4a16-int4-g128"):
        savings = fitted.phase_savings_us(table, spec, uniform(spec, available, scheme), workload)
        for phase in ("prefill", "decode"):
            measured = run.saving_ms(f"uniform {scheme}", phase=phase).median * 1e3
            assert savings[phase] == pytest.approx(measured, rel=1e-9), (scheme, phase)
    linear_us = sum(fitted.group_us(table, group, "bf16", workload) for group in spec.groups)
    dense_us = np.median(run.of("dense").rounds_ms) * 1e3
    assert fitted.total_rest_us + linear_us == pytest.approx(dense_us)
    # One factor for both phases would be far off in each: kernels in a decode step are short calls with cold caches.
    factors = fitted.factors["w4a16-int4-g128"]
    assert factors["prefill"] < 1.1 and factors["decode"] > 1.5
