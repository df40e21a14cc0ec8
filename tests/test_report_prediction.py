"""What the report says of predictions: true ones, wrong ones, and a machine that changed between two runs."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.report.numbers_prediction import compare, drift, judge
from autotune.verify import EndToEnd, Interval, Run

GOOD = {"median_error": 0.05, "spearman": 0.97}
OFF = {"median_error": 0.56, "spearman": 0.93}
UNRANKED = {"median_error": 0.56, "spearman": None}
NONE = {"median_error": None, "spearman": None}


def a_run(times_ms):
    """EndToEnd of constant times: name -> milliseconds of the workload."""
    rounds = {name: {"decode": (time,) * 5} for name, time in times_ms.items()}
    same = {name: Interval(time, time, time) for name, time in times_ms.items()}
    return EndToEnd(tuple(Run(n, same[n], same[n], same[n], rounds[n]) for n in times_ms), "")


def points(predicted, measured, half_width=0.1):
    return [
        {
            "name": str(n),
            "saving": p,
            "measured_saving_ms": {"median": m, "low": m - half_width, "high": m + half_width},
        }
        for n, (p, m) in enumerate(zip(predicted, measured, strict=True))
    ]


def test_errors_are_of_savings_and_ranks_of_points_that_can_be_told_apart():
    found = compare(points([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]), "saving")
    assert found["median_error"] == pytest.approx(0.1)
    assert found["spearman"] == pytest.approx(1.0)
    swapped = compare(points([10.0, 10.05, 20.0, 30.0], [10.1, 10.0, 20.0, 30.0], half_width=1.0), "saving")
    assert swapped["spearman"] == pytest.approx(1.0)  # the first two are one point to this measurement
    assert compare(points([10.0, 10.05, 10.1], [10.0, 10.1, 10.0], half_width=1.0), "saving")["spearman"] is None
    assert compare(points([30.0, 20.0, 10.0], [10.0, 20.0, 30.0]), "saving")["spearman"] == pytest.approx(-1.0)
    assert compare(points([1.0, 2.0], [1.0, 2.0]), "saving") == NONE


def test_drift_is_what_the_same_configurations_took_then_and_now():
    then = a_run({"dense": 100.0, "zeros": 20.0, "uniform a": 60.0, "uniform b": 40.0})
    now = a_run({"dense": 80.0, "zeros": 20.0, "uniform a": 60.0, "uniform b": 50.0, "point 1": 55.0})
    assert drift(then, now) == {"dense_ms": {"then": 100.0, "now": 80.0}, "savings": pytest.approx(0.5)}
    assert drift(then, then)["savings"] == 1.0
    assert drift(None, now) is None
    alone = a_run({"dense": 100.0})
    assert drift(alone, alone)["savings"] is None


def test_a_prediction_holds_only_if_the_search_believed_it_too():
    moved = drift(a_run({"dense": 100.0, "uniform a": 60.0}), a_run({"dense": 80.0, "uniform a": 60.0}))
    assert judge(GOOD, GOOD, moved, "") == {"holds": True, "verdict": "predicted savings hold"}
    changed = judge(GOOD, OFF, moved, "")
    assert changed["holds"] is False
    for said in ("too noisy", "56%", "0.93", "dense 100.0 ms then, 80.0 ms now", "0.50 times"):
        assert said in changed["verdict"]
    assert judge(GOOD, GOOD | {"spearman": 0.5}, moved, "")["holds"] is False
    assert "correlation" not in judge(GOOD, UNRANKED, moved, "")["verdict"]
    assert judge(GOOD, OFF, None, "")["holds"] is False


def test_a_model_of_latency_that_is_wrong_is_not_excused_by_drift():
    moved = drift(a_run({"dense": 100.0, "uniform a": 60.0}), a_run({"dense": 80.0, "uniform a": 60.0}))
    assert judge(OFF, OFF, moved, "")["verdict"].startswith("predicted savings are off")
    assert judge(OFF, GOOD, moved, "too noisy: dense")["verdict"] == "too noisy: dense"


@pytest.mark.parametrize(("now_ms", "holds"), [(61.0, None), (75.0, False), (40.0, False)])
def test_too_few_points_still_tell_a_machine_that_changed(now_ms, holds):
    then, now = a_run({"dense": 100.0, "uniform a": 60.0}), a_run({"dense": 100.0, "uniform a": now_ms})
    assert judge(NONE, NONE, drift(then, now), "")["holds"] is holds


def test_savings_of_no_scheme_make_no_ratio():
    slower = a_run({"dense": 100.0, "uniform a": 130.0})
    moved = drift(slower, slower)
    assert moved["savings"] is None
    assert np.isfinite(moved["dense_ms"]["now"])
    assert judge(GOOD, OFF, moved, "")["holds"] is False
