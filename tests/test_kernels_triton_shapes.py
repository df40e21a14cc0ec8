"""Triton kernels at the oddest shapes they take, in every configuration; what they do not take is refused before."""

from __future__ import annotations

import pytest

from autotune.kernels.spec import KERNELS
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.targets import target

pytest.importorskip("triton", reason="Triton is not installed here")

from interpreted import interpreted

SPECS = [spec for spec in KERNELS if "triton" in spec.limits.features]
FEWEST = 8  # outputs; fewer than any tile has
# Scheme -> the fewest inputs, of which all others are multiples.
LEAST = {
    "w8a8-int8": 16,
    "w8a16-int8": 16,
    "w8a16-fp8": 16,
    "w8a8-fp8-128x128": 128,
    "w4a16-int4-g32": 32,
    "w4a16-int4-g64": 64,
    "w4a16-int4-g128": 128,
    "2:4": 32,
    "2:4+w8a16-int8": 32,
    "2:4+w4a16-int4-g128": 128,
}
# Past the end of the widest tile of outputs, and of the longest splits of inputs, by as little as can be.
PAST = {
    "triton.w8a8": [264, 528, 1, 33, 66],
    "triton.w8a16": [72, 2064, 1, 33, 66],
    "triton.w8a16.fp8": [72, 2064, 1, 33, 66],
    "triton.fp8.blocks": [136, 256, 1, 33, 130],
    "triton.w4a16": [136, 1152, 1, 33, 66],
    "triton.24.bf16": [264, 2080, 1, 33],
    "triton.24.w8a16": [72, 2080, 1, 64, 66],
    "triton.24.w4a16": [136, 2176, 1, 33, 64],
}
# Tiles of 64 rows, full and not, of the kernels that have the fewest registers left for them.
MANY_ROWS = {"triton.24.bf16": [40, 96, 33, 64], "triton.24.w8a16": [40, 96, 49], "triton.24.w4a16": [40, 128, 33, 64]}


def ids(spec):
    return spec.name


@pytest.fixture(scope="module")
def found():
    """Every configuration at the smallest shape of all, one row and a tile of 64 with one row more than 32."""
    small = [(spec.name, [[FEWEST, max(LEAST[name] for name in spec.schemes), 1, 33]], "every") for spec in SPECS]
    sparse = [(name, [shape], "first") for name, shape in MANY_ROWS.items()]
    answers = interpreted(small + sparse)["kernels"]
    return dict(zip([*(name for name, *_ in small), *(f"{name} rows" for name in MANY_ROWS)], answers, strict=True))


def _right(results):
    assert results and [result for result in results if "error" in result] == []
    assert all(result["rms"] < 4e-3 for result in results)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_the_fewest_outputs_and_inputs(found, spec):
    _right(found[spec.name])
    assert {result["rows"] for result in found[spec.name]} == {1, 33}


@pytest.mark.parametrize("name", MANY_ROWS)
def test_sparse_tiles_of_64_rows(found, name):
    _right(found[f"{name} rows"])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_every_configuration_just_past_its_tiles(spec):
    """Splits of the inputs among them, one of which has hardly any work."""
    (results,) = interpreted([(spec.name, [PAST[spec.name]], "every")])["kernels"]
    _right(results)
    assert max(result["config"] for result in results) >= 2  # not only the first


# ---- what is not taken


def _judged(item, outputs, inputs):
    group = LayerGroup("g", "o", 0, (Linear("g", "g", outputs, inputs, False),))
    return legality(scheme(item), group, "bf16", target.load("h100"), SPECS, local=True)


@pytest.mark.parametrize("item", LEAST)
def test_inputs_between_are_refused_with_the_reason(item):
    for inputs in range(8, 4 * LEAST[item] + 1, 8):
        answer = _judged(item, FEWEST, inputs)
        assert answer.usable == (inputs % LEAST[item] == 0)
        if not answer.usable:
            assert f"{inputs} inputs are not a multiple of " in answer.reason


@pytest.mark.parametrize("item", LEAST)
def test_outputs_between_are_refused_with_the_reason(item):
    for outputs in (1, 7, 12, 50257):
        answer = _judged(item, outputs, 256)
        assert not answer.usable and f"{outputs} outputs are not a multiple of {FEWEST}" in answer.reason


def test_every_scheme_of_every_kernel_is_here():
    assert set(LEAST) == {name for spec in SPECS for name in spec.schemes} and set(PAST) == {s.name for s in SPECS}
