"""Which schemes leave the space after measuring, and what people are told."""

from dataclasses import replace

import pytest

from autotune.profilers.prune import at_least_as_accurate, prune
from autotune.profilers.table import LatencyRow, LatencyTable
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.schemes import MORE, SCHEMES, scheme
from autotune.search_space.space import build
from autotune.search_space.workload import parse
from autotune.targets.target import Ceilings, Target

TARGET = Target("cpu-test", "cpu", "test", (), 1, 2**30, 2**25, Ceilings(((2**25, 100.0),), {"bf16": 1.0}, 5.0))
GROUP = LayerGroup("g", "o", 0, (Linear("w", "m", 128, 128, False),))
MODEL = ModelSpec("m", "M", "causal-lm", "bf16", None, (GROUP,), (), False)
NAMES = ("bf16", "w8a8-int8", "w8a16-int8", "w4a16-int4-g32", "w4a16-int4-g128")
KERNELS = tuple(KernelSpec(name, (name,), "cpu", ("bf16",), "none") for name in NAMES)
SPACE = build(MODEL, TARGET, KERNELS, local=True)
WORKLOAD = parse("1,8,0")
EVERY = (*SCHEMES, *MORE)
BYTES = {"bf16": 4000, "w8a8-int8": 2000, "w8a16-int8": 2000, "w4a16-int4-g32": 1100, "w4a16-int4-g128": 1030}


def row(name, median, spread=0.01, **more):
    interval = (None, None, None) if median is None else (median, median * (1 - spread), median * (1 + spread))
    values = LatencyRow(
        name, name, (128,), 128, False, "bf16", 8, None, *interval, 20, "measured", False, "", BYTES[name]
    )
    return replace(values, **more)


def dropped(*rows, keep_bytes=False):
    found = prune(MODEL, SPACE, LatencyTable("cpu-test", "f", rows), WORKLOAD, keep_bytes)
    return {name: reason for (_, name), reason in found.items()}


FAST = [row("w8a8-int8", 60), row("w8a16-int8", 80), row("w4a16-int4-g32", 50), row("w4a16-int4-g128", 40)]


def test_nothing_leaves_when_every_step_down_is_faster():
    assert dropped(row("bf16", 100), *FAST) == {}


def test_slower_than_dense_says_both_numbers():
    reasons = dropped(row("bf16", 100), row("w8a8-int8", 20_000), *FAST[1:])
    assert reasons == {"w8a8-int8": "kept dense is faster here: 100.0 us against 20.00 ms a request"}


def test_touching_intervals_decide_nothing():
    assert dropped(row("bf16", 100, 0.05), FAST[0], row("w8a16-int8", 108, 0.05), *FAST[2:]) == {}


def test_noisy_rows_need_a_wide_gap():
    others = [row("bf16", 100, noisy=True), FAST[0], *FAST[2:]]
    assert dropped(*others, row("w8a16-int8", 130)) == {}
    assert "w8a16-int8" in dropped(*others, row("w8a16-int8", 200))


def test_estimates_are_not_trusted_to_the_last_percent():
    def estimated(name, median):
        return row(name, median, 0.0, status="estimated")

    others = [estimated(name, us) for name, us in (("bf16", 100), ("w8a8-int8", 60), ("w4a16-int4-g32", 50))]
    others.append(estimated("w4a16-int4-g128", 40))
    assert dropped(*others, estimated("w8a16-int8", 110)) == {}
    assert "(estimated)" in dropped(*others, estimated("w8a16-int8", 130))["w8a16-int8"]


def test_a_better_scheme_beats_a_worse_one_that_is_slower():
    reasons = dropped(row("bf16", 100), *FAST[:2], row("w4a16-int4-g32", 30), row("w4a16-int4-g128", 40))
    assert reasons == {
        "w4a16-int4-g128": "w4a16-int4-g32 is faster here and at least as accurate: 30.0 us against 40.0 us a request"
    }


def test_with_a_memory_budget_smaller_ones_stay():
    slow = [row("bf16", 100), *FAST[:2], row("w4a16-int4-g32", 30), row("w4a16-int4-g128", 200)]
    assert dropped(*slow, keep_bytes=True) == {}
    larger = replace(slow[-1], packed_bytes=9000)
    assert list(dropped(*slow[:-1], larger, keep_bytes=True)) == ["w4a16-int4-g128"]


def test_what_could_not_be_timed_leaves_with_the_reason():
    failed = row("w8a8-int8", None, status="failed", reason="check failed: NaN")
    reasons = dropped(row("bf16", 100), failed, *FAST[1:3])
    assert reasons == {
        "w8a8-int8": "could not be timed: w8a8-int8: check failed: NaN",
        "w4a16-int4-g128": "no kernel of it was timed",
    }


def test_the_space_takes_the_reasons():
    after = SPACE.without({("g", "w8a8-int8"): "kept dense is faster here"})
    assert "w8a8-int8" not in [entry.scheme for entry in after.schemes("g")]


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ("bf16", "w8a8-int8", True),
        ("w8a16-int8", "w8a8-int8", True),
        ("w8a8-int8", "w8a16-int8", False),
        ("w4a16-int4-g32", "w4a16-int4-g128", True),
        ("w4a16-int4-g128", "w4a16-int4-g32", False),
        ("w8a8-int8", "w4a16-int4-g128", False),  # its activations are coarser
        ("w8a8-int8", "w8a8-fp8", False),
        ("w8a8-fp8", "w8a8-int8", False),
        ("2:4", "w8a16-int8", False),
        ("w4a16-int4-g128", "2:4+w4a16-int4-g128", True),
        ("w8a8-int8", "2:4+w8a8-int8", True),
        ("w4a16-int4-g128", "2:4+w8a8-int8", False),
        ("2:4", "2:4+w8a8-fp8", True),
        ("4:8", "2:4", True),  # every 2:4 mask is a 4:8 mask, and that one of half a row
        ("50%", "4:8", True),
        ("2:4", "50%", False),
        ("w8a16-fp8", "w8a8-fp8-tensor", True),
        ("w8a8-fp8-128x128", "w8a8-fp8", False),  # blocks are finer across inputs, coarser across outputs
        ("w4a16-nf4-g64", "w4a16-int4-g64", False),
        ("w4a16-int4-g32-asym", "w4a16-int4-g64", False),
        ("w4a16-int4-g32-asym", "w4a16-int4-g64-asym", True),
    ],
)
def test_order_of_accuracy(better, worse, expected):
    assert at_least_as_accurate(scheme(better), scheme(worse)) is expected


def test_the_order_is_a_partial_order():
    for a in EVERY:
        assert at_least_as_accurate(a, a)
        for b in EVERY:
            if a is not b and at_least_as_accurate(a, b):
                assert not at_least_as_accurate(b, a)
                assert all(at_least_as_accurate(a, c) for c in EVERY if at_least_as_accurate(b, c))
