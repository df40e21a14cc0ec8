"""The joint sweep: GPTQ's arithmetic, many formats at once, pruned positions made up for too."""

from __future__ import annotations

import pytest
import torch

from autotune.compress import curvature, rounding, sweep, wanda
from autotune.compress.curvature import damped, sweep_factor
from autotune.errors import InputError
from autotune.kernels.formats import round_to
from autotune.search_space.schemes import NumberFormat

FORMATS = [NumberFormat("int", 4, 32), NumberFormat("int", 4, 64), NumberFormat("int", 8), NumberFormat("int", 3, 32)]


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
    scales = start.grid.scales.double().repeat_interleave(start.number.group_size or weight.shape[1], 1)
    codes = torch.zeros_like(weight)
    for i in order.tolist():
        code = round_to(weight[:, i] / scales[:, i], start.number)
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
    codes = rounding.quantize(weight, hessian.diagonal(), number).codes
    assert torch.equal(sweep.sweep([start], sweep_factor(hessian))[0], codes.float())


@pytest.mark.parametrize("number", FORMATS, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_it_loses_less_than_rounding(number, pruned):
    hessian, weight = correlated(), weights()
    start = start_of(weight, hessian, number, wanda.mask_24(weight, hessian.diagonal()) if pruned else None)
    rounded = rounding.quantize(weight, hessian.diagonal(), number, start.keep).codes.float()
    found = valued(sweep.sweep([start], sweep_factor(hessian))[0], start)
    assert error(start.weight, found, hessian) < 0.8 * error(start.weight, valued(rounded, start), hessian)
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
