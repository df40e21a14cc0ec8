"""fp32 products by either library: the same numbers, gradients too."""

from __future__ import annotations

import pytest
import torch

from autotune.kernels import products
from autotune.kernels.products import accumulate, linear, matmul


@pytest.fixture(params=[False, True], ids=["torch's", "oneDNN"], autouse=True)
def way(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "differs", lambda: request.param)
    return request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("shape", [(33, 40), (2, 17, 40), (1, 40), (40,), (5, 3, 7, 40)])
def test_linear(shape):
    x, weight = random(*shape), random(24, 40, seed=1)
    assert near(linear(x, weight), x.double() @ weight.double().t())


def test_any_strides():
    a, b = random(50, 70), random(50, 30, seed=1)
    assert near(matmul(a.t(), b), a.double().t() @ b.double())
    assert near(linear(a[:, ::2], random(20, 35)), a[:, ::2].double() @ random(20, 35).double().t())
    assert near(matmul(a[3:, 5:], random(65, 9)), a[3:, 5:].double() @ random(65, 9).double())


@pytest.mark.parametrize("rows", [1, 300])
def test_sums_grow(rows, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", 70 * 11)
    total, a, b = random(50, 70, seed=2), random(rows, 50), random(rows, 70, seed=1)
    expected = total.double() + a.double().t() @ b.double()
    accumulate(total, a, b)
    assert near(total, expected)


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("of_weight", [True, False])
def test_gradients(of_x, of_weight):
    x, weight = random(2, 19, 40), random(24, 40, seed=1)
    pull = random(2, 19, 24, seed=2)
    found, expected = [], []
    for linear_of, number, made in (
        (linear, torch.float32, found),
        (torch.nn.functional.linear, torch.float64, expected),
    ):
        own = [x.to(number).clone().requires_grad_(of_x), weight.to(number).clone().requires_grad_(of_weight)]
        y = linear_of(*own)
        assert y.requires_grad == (of_x or of_weight)
        if y.requires_grad:
            (y * pull.to(number)).sum().backward()
        made += [item.grad for item in own]
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or near(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_devices_are_torchs(dtype):
    x, weight = random(9, 40, dtype=dtype), random(24, 40, seed=1, dtype=dtype)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert linear(x.to("meta"), weight.to("meta")).shape == (9, 24)


def test_nothing_is_too_small():
    assert linear(random(0, 40), random(24, 40)).shape == (0, 24)
    assert linear(random(9, 40), random(0, 40)).shape == (9, 0)
    assert torch.equal(linear(random(9, 0), random(24, 0)), torch.zeros(9, 24))


def test_weights_have_no_gaps(way, monkeypatch):
    """oneDNN multiplies others a thousand times slower."""
    given = []
    call = products._operator
    monkeypatch.setattr(products, "_operator", lambda x, w, *rest: (given.append(w), call(x, w, *rest))[1])
    x, wide = random(9, 20), random(48, 40, seed=1)
    for weight in (wide[::2, :20], wide[:, ::2], wide[:20].t(), wide[:20, :24].t(), wide.view(-1)[:480].view(24, 20)):
        assert near(linear(x, weight), x.double() @ weight.double().t())
    assert len(given) == (5 if way else 0)
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in given)
