"""Triton kernels without a card: numbers in the interpreter, machine code ahead of time for five generations."""

from __future__ import annotations

import itertools

import pytest
import torch

from autotune.errors import InputError
from autotune.kernels.spec import KERNELS
from autotune.search_space.schemes import scheme

pytest.importorskip("triton", reason="Triton is not installed here")

from interpreted import interpreted

from autotune.kernels.triton import compiled, launch
from autotune.kernels.triton.launch import Config
from autotune.kernels.triton.survivors import survivors

SPECS = [spec for spec in KERNELS if "triton" in spec.limits.features]
# (outputs, inputs, rows ...): tiles that do not divide, one row, few rows, several row tiles, and unpacking.
SHAPES = [[24, 128, 1, 5], [40, 256, 17, 66]]


@pytest.fixture(scope="module")
def found():
    """What the interpreter computed, of all kernels and, over splits of the inputs, of two."""
    # Three (two) parts of the inputs, the last one short, added up by a second kernel.
    splits = [("triton.w4a16", [[24, 384, 1, 3]], "splits"), ("triton.24.bf16", [[24, 1152, 1, 3]], "splits")]
    answers = interpreted([*((spec.name, SHAPES, "first") for spec in SPECS), *splits])
    names = [*(spec.name for spec in SPECS), *(f"{name} splits" for name, *_ in splits)]
    return dict(zip(names, answers["kernels"], strict=True)) | {"activations": answers["activations"]}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_numbers_match_the_reference(found, spec):
    results = found[spec.name]
    assert len(results) == 6 * len(spec.schemes)
    assert [result for result in results if "error" in result] == []
    for result in results:
        own = scheme(result["scheme"]).bits_per_weight
        assert own <= result["bits"] <= 1.3 * own + 2.0  # scales and bias of a small layer


@pytest.mark.parametrize("name", ["triton.w4a16", "triton.24.bf16"])
def test_sums_over_splits(found, name):
    results = found[f"{name} splits"]
    assert len(results) == 3 and [result for result in results if "error" in result] == []


def test_activations_are_quantized_as_the_reference_does(found):
    assert found["activations"].pop("rescaled_away") < 0.004  # a product rounded once more
    assert [name for name, same in found["activations"].items() if not same] == []


FIRST = [variant for spec in SPECS for variant in compiled.variants(spec) if "unpack" not in variant.name]


def _check(variant, capability):
    if capability < variant.least_capability:
        return
    found = compiled.inspect(variant, capability)
    assert not found.spills, found
    assert found.shared_bytes <= {8.0: 163, 8.9: 99, 9.0: 227, 10.0: 227, 12.0: 99}[capability] * 1024
    assert bool(found.instruction) == variant.tensor_cores, found
    if variant.name.startswith(("w8a8", "fp8")) and "16" not in variant.name and capability == 9.0:
        assert found.instruction == "wgmma.mma_async"
    if variant.name.startswith("fp8") and "16" not in variant.name and capability == 10.0:
        assert found.instruction == "tcgen05.mma"


def _cases():
    """Every kernel for every generation; outside of slow tests each for one of them in turn, as what compiles for one
    seldom fails for another, and only one row of those that unroll most."""
    generations = itertools.cycle((9.0, 8.9, 12.0, 10.0, 8.0))
    for variant in FIRST:
        unrolled = "sparse24" in variant.name or "w4a16" in variant.name
        first = 9.0 if unrolled or "128 rows" in variant.name else next(generations)
        left = unrolled and variant.name not in ("w4a16 1 row", "sparse24_int4 1 row")
        for capability in compiled.CAPABILITIES:
            slow = left or capability != first
            name = f"{variant.name.replace(' ', '-')}-{capability}"
            yield pytest.param(variant, capability, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("variant", "capability"), _cases())
def test_compiles_without_spills_onto_tensor_cores(variant, capability):
    _check(variant, capability)


@pytest.mark.parametrize(
    "capability", [pytest.param(n, marks=[] if n == 9.0 else [pytest.mark.slow]) for n in compiled.CAPABILITIES]
)
@pytest.mark.parametrize("variant", list(compiled.shared_variants()), ids=lambda variant: variant.name)
def test_the_shared_functions_compile(variant, capability):
    _check(variant, capability)


def _others():
    """All configurations but each kernel's first."""
    every = (variant for spec in SPECS for variant in compiled.variants(spec, everything=True))
    for variant in (variant for variant in every if variant not in FIRST):
        for capability in (n for n in compiled.CAPABILITIES if n >= variant.least_capability):
            yield pytest.param(variant, capability, id=f"{str(variant).replace(' ', '-')}-{capability}")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "capability"), _others())
def test_every_configuration_compiles(variant, capability):
    """What needs more shared memory than a card has leaves when it is timed; what spills would stay."""
    found = compiled.inspect(variant, capability)
    assert not found.spills and bool(found.instruction) == variant.tensor_cores, found


def test_machine_code_is_named():
    from autotune.kernels.machine_code import machine_code

    spec = next(spec for spec in SPECS if spec.name == "triton.w8a8")  # compiled above already: Triton keeps it
    text = machine_code(spec, 9.0)
    assert "wgmma" in text and "no spills" in text
    assert machine_code(KERNELS[0], 9.0) == "" and machine_code(spec, None) == ""


# ---- choosing a configuration


def test_the_fastest_configuration_is_kept_and_what_does_not_fit_leaves(monkeypatch):
    times = {16: 3.0, 32: 1.0, 64: float("inf")}
    asked = []

    def time_s(call, config):
        asked.append(config.outputs)
        return times[config.outputs]

    monkeypatch.setattr(launch, "_time_s", time_s)
    monkeypatch.setattr(launch.torch.cuda, "is_current_stream_capturing", lambda: False)
    configs = tuple(Config(size, 16) for size in times)
    key = ("test", object())
    assert launch.pick(key, configs, lambda config: None).outputs == 32
    assert launch.pick(key, configs, lambda config: None).outputs == 32 and asked == [16, 32, 64]


def test_nothing_is_timed_inside_a_graph(monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch, "_time_s", None)
    assert launch.pick(("graph", object()), (Config(16, 16), Config(32, 16)), lambda config: None).outputs == 16


def test_splits_need_work_for_each():
    configs = (Config(16, 64, 8), Config(16, 64, 2), Config(16, 64))
    assert launch.splits_that_fit(configs, 128) == configs[1:]


# ---- 2:4


def test_survivors_keep_their_places_in_order():
    values = torch.tensor([[0, 3, 0, -2, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]], dtype=torch.int8)
    kept, places = survivors(values)
    assert places.tolist() == [[[1, 3], [0, 1], [0, 1], [0, 3]]]
    assert kept.tolist() == [[[3, -2], [5, 0], [0, 0], [0, 7]]]
    with pytest.raises(InputError, match=r"packing\.pattern"):
        survivors(torch.ones(1, 4))
