"""2:4 by least layer error: the mask by ADMM, the weights on it by least squares."""

from __future__ import annotations

import pytest
import torch
from test_compress_sweep import correlated, error, weights

from autotune.compress import hwpq, sparse, wanda
from autotune.compress.curvature import damped
from autotune.search_space.schemes import scheme


def two_of_four(mask):
    return torch.equal(mask.view(len(mask), -1, 4).sum(-1), torch.full((len(mask), mask.shape[1] // 4), 2))


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_loses_less_than_wandas(seed):
    hessian, weight = correlated(seed=seed, own=0.1), weights(seed=seed + 10)
    mask = sparse.admm_mask(weight, sparse.spectrum(hessian), scheme("2:4"))
    assert two_of_four(mask)
    losses = [
        error(weight, sparse.least_squares(weight, hessian, keep), hessian)
        for keep in (mask, wanda.mask_24(weight, hessian.diagonal()))
    ]
    assert losses[0] < 0.9 * losses[1]


def test_where_inputs_do_not_depend_on_each_other_wandas_mask_is_nearly_reached():
    """There it is the best one, and `auto` finds it; ADMM stops where the mask no longer moves."""
    weight, moment = weights(), torch.rand(128, generator=torch.Generator().manual_seed(3)) + 0.1
    mask = sparse.admm_mask(weight, sparse.spectrum(torch.diag(moment)), scheme("2:4"))
    best = wanda.mask_24(weight, damped(torch.diag(moment)).diagonal())
    losses = [float((weight.square() * moment)[~keep].sum()) for keep in (best, mask)]
    assert losses[0] <= losses[1] < 1.25 * losses[0]


def test_a_mask_of_silent_inputs_is_still_a_mask():
    assert two_of_four(sparse.admm_mask(weights(), sparse.spectrum(torch.zeros(128, 128)), scheme("2:4")))


def test_least_squares_are_exact_after_enough_steps():
    hessian, weight = correlated(32), weights(6, 32)
    keep = wanda.mask_24(weight, hessian.diagonal())
    found = sparse.least_squares(weight, hessian, keep, steps=64)
    curvature = damped(hessian).double()
    for row in range(6):
        here = keep[row]
        right = curvature[here] @ weight[row].double()
        expected = torch.linalg.solve(curvature[here][:, here], right)
        assert torch.allclose(found[row, here].double(), expected, rtol=1e-3, atol=1e-5)
    assert not bool(found[~keep].any())


def test_every_step_helps():
    hessian, weight = correlated(), weights()
    keep = wanda.mask_24(weight, hessian.diagonal())
    losses = [
        error(weight, sparse.least_squares(weight, hessian, keep, steps), damped(hessian)) for steps in (0, 1, 2, 4, 8)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_a_loud_input_is_kept_by_hwpqs_metric():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert hwpq.mask_24(weight, torch.ones(4)).tolist() == [[True, True, False, False]]
    assert hwpq.mask_24(weight, torch.tensor([1.0, 1.0, 1.0, 1e4])).tolist() == [[True, False, False, True]]
    assert two_of_four(hwpq.mask_24(weights(), torch.zeros(128)))
