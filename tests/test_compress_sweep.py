"""The joint sweep: GPTQ's arithmetic, many formats at once, pruned positions made up for too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sanitized
import torch
from native import AVX2, NATIVE

from autotune.compress import curvature, rounding, sweep, wanda
from autotune.compress.curvature import damped, sweep_factor
from autotune.errors import DeviceError, InputError
from autotune.kernels.cpu import build
from autotune.kernels.cpu import sweep as native_sweep
from autotune.kernels.formats import round_to
from autotune.search_space.schemes import NumberFormat
from autotune.targets.detect import compiler

FORMATS = [
    NumberFormat("int", 4, 32),
    NumberFormat("int", 4, 64, symmetric=False),
    NumberFormat("int", 8),
    NumberFormat("int", 3, 32),
]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request, monkeypatch):
    """Both ways of sweeping integers."""
    if request.param == "native" and not native_sweep.available():
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(native_sweep, "available", lambda: request.param == "native")
    return request.param


def correlated(inputs=128, tokens=400, seed=0, own=1.0):
    """A Hessian of inputs that follow a few others, as a model's do, and do something of their `own`."""
    generator = torch.Generator().manual_seed(seed)
    followed = torch.randn(inputs // 8, inputs, generator=generator)
    loudness = torch.rand(inputs, generator=generator) + 0.1
    x = torch.randn(tokens, inputs // 8, generator=generator) @ followed
    x = (x + own * torch.randn(tokens, inputs, generator=generator)) * loudness
    return x.T @ x / tokens


def weights(rows=24, inputs=128, seed=1):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def start_of(weight, hessian, number, keep=None):
    grid = rounding.find_grid(weight, hessian.diagonal(), number, keep)
    return sweep.Start(number, weight if keep is None else weight * keep, grid, keep)


def valued(codes, start):
    size = start.number.group_size or codes.shape[1]
    return codes * start.grid.scales.repeat_interleave(size, 1)


def error(weight, found, hessian):
    change = found - weight
    return float(((change @ hessian) * change).sum())


def plain(start, hessian):
    """GPTQ as OBQ has it, in float64: round an input, spread its error by the inverse, take it out of the inverse."""
    matrix = damped(hessian).double()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    weight, inverse = start.weight.double().clone(), matrix.inverse()
    size = start.number.group_size or weight.shape[1]
    scales = start.grid.scales.double().repeat_interleave(size, 1)
    zeros = None if start.grid.zeros is None else start.grid.zeros.repeat_interleave(size, 1)
    codes = torch.zeros_like(weight)
    for i in order.tolist():
        code = round_to(weight[:, i] / scales[:, i], start.number, None if zeros is None else zeros[:, i])
        codes[:, i] = code if start.keep is None else code * start.keep[:, i]
        off = (weight[:, i] - codes[:, i] * scales[:, i]) / inverse[i, i]
        weight -= off.unsqueeze(1) * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes.float()


@pytest.mark.parametrize("number", FORMATS, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_it_is_gptq(number, pruned):
    hessian, weight = correlated(), weights()
    start = start_of(weight, hessian, number, wanda.mask_24(weight, hessian.diagonal()) if pruned else None)
    found = sweep.sweep([start], sweep_factor(hessian))[0]
    assert torch.equal(found, plain(start, hessian))


def test_formats_swept_at_once_get_the_codes_they_get_alone(monkeypatch):
    hessian, weight = correlated(256), weights(70, 256)
    keep = wanda.mask_24(weight, hessian.diagonal())
    starts = [start_of(weight, hessian, number) for number in FORMATS]
    starts += [start_of(weight, hessian, number, keep) for number in FORMATS]
    starts.append(start_of(weight, hessian, NumberFormat("float", 8)))
    factor = sweep_factor(hessian)
    together = sweep.sweep(starts, factor)
    for start, codes in zip(starts, together, strict=True):
        assert torch.equal(codes, sweep.sweep([start], factor)[0])
    monkeypatch.setattr(sweep, "_LINE", 100)  # rows of all formats, 11 at a time
    assert all(torch.equal(a, b) for a, b in zip(sweep.sweep(starts, factor), together, strict=True))


@pytest.mark.parametrize("number", [*FORMATS, NumberFormat("float", 8)], ids=str)
def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest(number):
    weight, hessian = weights(), torch.diag(torch.rand(128) + 0.5)
    start = start_of(weight, hessian, number)
    made = rounding.quantize(weight, hessian.diagonal(), number)
    zeros = 0 if made.zeros is None else made.zeros.repeat_interleave(number.group_size, 1)
    assert torch.equal(sweep.sweep([start], sweep_factor(hessian))[0], made.codes.float() - zeros)


@pytest.mark.parametrize("number", FORMATS, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_it_loses_less_than_rounding(number, pruned):
    hessian, weight = correlated(), weights()
    start = start_of(weight, hessian, number, wanda.mask_24(weight, hessian.diagonal()) if pruned else None)
    uncorrelated = sweep_factor(torch.eye(weight.shape[1]))  # nothing to make up for: rounding to nearest
    rounded = valued(sweep.sweep([start], uncorrelated)[0], start)
    found = valued(sweep.sweep([start], sweep_factor(hessian))[0], start)
    assert error(start.weight, found, hessian) < 0.8 * error(start.weight, rounded, hessian)
    if pruned:
        assert not bool(found[~start.keep].any())


def test_codes_are_numbers_of_their_format():
    hessian, weight = correlated(), weights()
    starts = [start_of(weight, hessian, number) for number in (FORMATS[0], NumberFormat("float", 8))]
    integers, floats = sweep.sweep(starts, sweep_factor(hessian))
    assert torch.equal(integers, integers.round())
    assert float(integers.abs().max()) <= 7
    assert torch.equal(floats, floats.to(torch.float8_e4m3fn).float())


def test_an_input_never_seen_is_rounded_and_takes_no_error_over():
    hessian, weight = correlated(), weights()
    hessian[5], hessian[:, 5] = 0.0, 0.0
    start = start_of(weight, hessian, FORMATS[0])
    found = sweep.sweep([start], sweep_factor(hessian))[0]
    expected = round_to(weight[:, 5] / start.grid.scales[:, 0], FORMATS[0])
    assert torch.equal(found[:, 5], expected)


def test_damping_is_raised_until_the_matrix_can_be_factored(monkeypatch):
    line = torch.arange(1.0, 65.0)
    hessian = torch.outer(line, line) - 20.0 * torch.eye(64)  # not definite, as sums in fp32 may be
    shares = []
    monkeypatch.setattr(curvature, "damped", lambda matrix, share: shares.append(share) or damped(matrix, share))
    factor = sweep_factor(hessian, 1e-3)
    assert len(shares) > 1
    assert bool(factor.upper.isfinite().all())


def test_all_inputs_silent():
    factor = sweep_factor(torch.zeros(8, 8))
    start = sweep.Start(NumberFormat("int", 8), weights(2, 8), rounding.Grid(torch.full((2, 1), 0.01)))
    assert bool(factor.upper.isfinite().all())
    assert torch.equal(sweep.sweep([start], factor)[0], (weights(2, 8) / 0.01).round())


def test_activations_that_are_not_finite_are_an_error():
    hessian = torch.eye(8)
    hessian[0, 0] = torch.nan
    with pytest.raises(InputError, match="finite") as caught:
        sweep_factor(hessian)
    assert caught.value.code == "compression.hessian"


@pytest.mark.parametrize("rows", [1, 16, 47, 48, 49, 130])
@pytest.mark.parametrize("inputs", [8, 32, 40, 96])
@pytest.mark.parametrize("form", ["int8", "int4-g8", "int4-g8-asym", "int4-g8 pruned"])
def test_rows_and_inputs_that_fill_no_strip(rows, inputs, form):
    hessian, weight = correlated(inputs), weights(rows, inputs, seed=2)
    number = NumberFormat("int", 8) if form == "int8" else NumberFormat("int", 4, 8, symmetric="asym" not in form)
    start = start_of(weight, hessian, number, weight > 0.01 if "pruned" in form else None)
    assert torch.equal(sweep.sweep([start], sweep_factor(hessian))[0], plain(start, hessian))


@pytest.mark.parametrize("pattern", [4, 8])
def test_a_pattern_chosen_on_the_way_is_sparsegpts(pattern):
    """Of each block, when it is reached, those inputs stay whose w^2 / U_ii^2 is largest."""
    hessian, weight = correlated(), weights(50)
    factor = sweep_factor(hessian, together=pattern)
    assert bool((factor.order.view(-1, pattern).diff(dim=1) == 1).all())  # neighbours are swept together
    start = replace(start_of(weight, hessian, FORMATS[2]), pattern=pattern)
    levels, mask = sweep.sweep([start], factor)[0], torch.zeros(50, 128, dtype=torch.bool)
    assert int((levels.view(50, -1, pattern) != 0).sum(-1).max()) <= pattern // 2
    rest, upper = weight.double(), factor.upper.double()
    for place, i in enumerate(factor.order.tolist()):
        if place % pattern == 0:
            own = slice(place, place + pattern)
            score = (rest[:, factor.order[own]] / upper.diagonal()[own]).abs()
            mask[:, factor.order[own]] = score > score.sort(1, descending=True).values[:, pattern // 2, None]
        off = (rest[:, i] - levels[:, i].double() * start.grid.scales[:, 0]) / upper[place, place]
        rest[:, factor.order[place:]] -= off.unsqueeze(1) * upper[place, place:]
    assert torch.equal(levels != 0, mask & (levels != 0))
    assert int((mask & (levels == 0)).sum()) < 0.01 * mask.sum()  # small ones are rounded to zero


def test_threads_change_nothing():
    hessian, weight = correlated(256), weights(300, 256)
    starts, factor = [start_of(weight, hessian, number) for number in FORMATS], sweep_factor(hessian)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(sweep.sweep(starts, factor))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_weights_need_not_be_contiguous():
    hessian, weight = correlated(), weights(40)
    start = start_of(weight, hessian, FORMATS[0])
    turned = sweep.Start(start.number, weight.t().contiguous().t(), start.grid)
    factor = sweep_factor(hessian)
    assert torch.equal(sweep.sweep([turned], factor)[0], sweep.sweep([start], factor)[0])


@pytest.mark.parametrize("way", ["native"], indirect=True)
def test_without_a_compiler_integers_are_swept_by_torch(monkeypatch):
    def missing(name):
        raise DeviceError("kernel.compiler", "none.")

    monkeypatch.undo()
    hessian, weight = correlated(), weights()
    start, factor = start_of(weight, hessian, FORMATS[0]), sweep_factor(hessian)
    expected = sweep.sweep([start], factor)[0]
    monkeypatch.setattr(build, "library", missing)
    build.available.cache_clear()
    assert torch.equal(sweep.sweep([start], factor)[0], expected)
    build.available.cache_clear()


@needs_compiler
@pytest.mark.parametrize("way", ["native"], indirect=True)
@pytest.mark.parametrize("instructions", [NATIVE, AVX2], ids=["native", "avx2"])
def test_sanitizers_find_nothing_and_the_numbers_are_gptqs(tmp_path, instructions):
    """`sweep_harness.cpp`: buffers of exactly the size needed against a plain sweep in double precision."""
    sanitized.run("sweep", instructions, tmp_path)
