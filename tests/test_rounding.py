"""Rounding to a format: never worse than plain round-to-nearest, exact where it can be, zeros stay zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.compress import rounding
from autotune.kernels.cpu import grid as native_grid
from autotune.kernels.formats import round_scale
from autotune.search_space.schemes import NumberFormat

INT8, INT4, FP8 = NumberFormat("int", 8), NumberFormat("int", 4, 16), NumberFormat("float", 8)
FORMATS = {"int8": INT8, "int4": INT4, "int4 a row": NumberFormat("int", 4), "fp8": FP8}


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request, monkeypatch):
    """Both ways of searching scales of integers."""
    if request.param == "native" and not native_grid.available():
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(native_grid, "available", lambda: request.param == "native")


def quantize(*args):
    """Codes and scales of a symmetric format."""
    found = rounding.quantize(*args)
    assert found.zeros is None
    return found.codes, found.scales


def random(rows=8, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def decode(codes, scales):
    rows, columns = codes.shape
    return (codes.float().view(rows, scales.shape[1], -1) * scales.unsqueeze(-1)).view(rows, columns)


def error(weight, codes, scales, moment=None):
    difference = (decode(codes, scales) - weight).square()
    return float((difference * (1 if moment is None else moment)).sum())


def round_to_nearest(weight, number):
    """Without the clipping search: the scale of the largest weight."""
    size = number.group_size or weight.shape[1]
    grouped = weight.view(len(weight), -1, size)
    scales = round_scale(grouped.abs().amax(-1) / number.qmax)
    codes = (grouped / scales.unsqueeze(-1)).round().clamp(-number.qmax, number.qmax)
    return codes.view_as(weight), scales


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_and_kinds(name):
    number = FORMATS[name]
    codes, scales = quantize(random(), None, number)
    assert codes.dtype == (torch.int8 if number.kind == "int" else torch.float8_e4m3fn)
    assert codes.shape == (8, 64)
    assert scales.shape == (8, 64 // (number.group_size or 64))
    assert float(codes.float().abs().max()) <= number.qmax


@pytest.mark.parametrize("name", FORMATS)
def test_scales_mean_the_same_in_bf16_and_fp16(name):
    _, scales = quantize(random(), None, FORMATS[name])
    assert torch.equal(scales.bfloat16().float(), scales)
    assert torch.equal(scales.half().float(), scales)


@pytest.mark.parametrize("name", ["int8", "int4", "int4 a row"])
@pytest.mark.parametrize("weighed", [False, True])
def test_never_worse_than_round_to_nearest(name, weighed):
    weight = random()
    moment = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3 if weighed else None
    found = error(weight, *quantize(weight, moment, FORMATS[name]), moment)
    plain = error(weight, *round_to_nearest(weight, FORMATS[name]), moment)
    assert found <= plain * (1 + 1e-6)
    if name == "int4 a row":
        assert found < 0.9 * plain  # with few bits, clipping pays


def test_inputs_that_matter_more_are_rounded_better():
    weight, moment = random(64), torch.ones(64)
    moment[:32] = 1000.0
    number = FORMATS["int4 a row"]

    def important(codes, scales):
        return float((decode(codes, scales) - weight)[:, :32].square().sum())

    assert important(*quantize(weight, moment, number)) < important(*quantize(weight, None, number))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["int8", "int4"]), st.integers(-6, 3))
def test_what_is_not_clipped_is_within_half_a_step(seed, name, magnitude):
    weight, number = random(4, 32, seed) * 2.0**magnitude, FORMATS[name]
    codes, scales = quantize(weight, None, number)
    steps = scales.repeat_interleave(32 // scales.shape[1], 1)
    inside = codes.abs() < number.qmax
    off = (decode(codes, scales) - weight).abs()
    assert bool((off[inside] <= 0.5001 * steps[inside]).all())


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows_and_constant_groups(name):
    weight = random()
    weight[0], weight[1] = 0.0, 0.5
    codes, scales = quantize(weight, None, FORMATS[name])
    assert torch.equal(decode(codes, scales)[0], torch.zeros(64))
    assert decode(codes, scales)[1].tolist() == pytest.approx([0.5] * 64, rel=0.01)
    assert torch.isfinite(scales).all() and (scales > 0).all()


@pytest.mark.parametrize("tiny", [1e-40, 1e-30, 1e-8])
def test_tiny_weights_give_finite_codes(tiny):
    codes, scales = quantize(random() * tiny, None, INT8)
    assert torch.isfinite(decode(codes, scales)).all()
    assert float((decode(codes, scales) - random() * tiny).abs().max()) <= 2.0**-15  # half the smallest scale


def test_dead_inputs_do_not_decide_the_scale_alone():
    """A moment of zero everywhere must not make every scale equally good."""
    weight = random()
    found = error(weight, *quantize(weight, torch.zeros(64), INT8))
    assert found <= error(weight, *round_to_nearest(weight, INT8)) * (1 + 1e-6)


def test_pruned_weights_are_exact_zeros_and_do_not_widen_the_scale():
    weight = random()
    weight[:, 0] = 100.0
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, 0] = False
    codes, scales = quantize(weight, None, INT8, keep)
    assert not codes[:, 0].any()
    assert float(scales.max()) < 0.01


def test_pieces_do_not_change_the_result(monkeypatch):
    weight = random(33)
    whole = quantize(weight, None, INT4)
    monkeypatch.setattr("autotune.compress.rounding._CHUNK_WEIGHTS", 100)
    codes, scales = quantize(weight, None, INT4)
    assert torch.equal(codes, whole[0])
    assert torch.equal(scales, whole[1])


def test_the_weight_is_not_changed():
    weight = random()
    before = weight.clone()
    quantize(weight, torch.ones(64), INT4, torch.rand(8, 64) > 0.5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "number",
    [
        INT8,
        INT4,
        NumberFormat("int", 4, 24, symmetric=False),
        NumberFormat("int", 2, 48),
        NumberFormat("int", 2, 32, symmetric=False),
    ],
    ids=str,
)
def test_both_ways_find_scales_that_lose_as_little(number, weighted, pruned, monkeypatch):
    weight = random(33, 96)
    weight[3] = 0.0  # a row of zeros, and one that only has one sign
    weight[4] = weight[4].abs()
    moment = torch.rand(96, generator=torch.Generator().manual_seed(1)) if weighted else None
    keep = random(33, 96, seed=2) > 0 if pruned else None
    lost = {}
    for native in (True, False):
        monkeypatch.setattr(native_grid, "available", lambda native=native: native)
        made = rounding.quantize(weight, moment, number, keep)
        zeros = 0 if made.zeros is None else made.zeros.repeat_interleave(number.group_size, 1)
        kept = weight if keep is None else weight * keep
        lost[native] = error(kept, made.codes.float() - zeros, made.scales, moment)
    assert lost[True] == pytest.approx(lost[False], rel=1e-5)
