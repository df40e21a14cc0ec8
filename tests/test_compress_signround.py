"""Sign-gradient rounding: never worse than the grid it starts from, levels of the format, pruned weights stay zeros."""

from __future__ import annotations

import pytest
import torch
from test_compress_sweep import correlated, error, weights

from autotune.compress import rounding, signround, wanda
from autotune.compress.curvature import damped
from autotune.kernels import formats
from autotune.search_space.schemes import NumberFormat

FORMATS = [NumberFormat("int", bits, 32) for bits in (2, 3, 4, 8)] + [NumberFormat("int", 3, 64, symmetric=False)]


def valued(levels, grid):
    return levels * grid.scales.repeat_interleave(levels.shape[1] // grid.scales.shape[1], 1)


def tuned(number, keep=None, steps=signround.STEPS, rows=24):
    hessian, weight = correlated(), weights(rows)
    weight = weight if keep is None else weight * keep
    grid = rounding.find_grid(weight, hessian.diagonal(), number, keep)
    return weight, hessian, grid, signround.tune(weight, hessian, number, grid, keep, steps)


@pytest.mark.parametrize("number", FORMATS, ids=str)
def test_one_step_is_rounding_to_nearest_and_more_lower_every_rows_error(number):
    weight, hessian, grid, (first, same) = tuned(number, steps=1)
    groups = weight.view(24, grid.scales.shape[1], -1)
    zeros = None if grid.zeros is None else grid.zeros.unsqueeze(-1)
    assert torch.equal(first.view_as(groups), formats.round_to(groups / grid.scales.unsqueeze(-1), number, zeros))
    assert torch.equal(same.scales, grid.scales)
    _, _, _, (levels, best) = tuned(number)
    curvature = damped(hessian)
    for row in range(24):
        piece = slice(row, row + 1)
        before = error(weight[piece], valued(first, same)[piece], curvature)
        assert error(weight[piece], valued(levels, best)[piece], curvature) <= before * (1 + 1e-5)
    assert error(weight, valued(levels, best), hessian) < 0.8 * error(weight, valued(first, same), hessian)


@pytest.mark.parametrize("number", FORMATS, ids=str)
def test_levels_and_scales_are_the_formats(number):
    weight, _, grid, (levels, best) = tuned(number)
    groups = levels.view(24, grid.scales.shape[1], -1)
    zeros = None if grid.zeros is None else grid.zeros.unsqueeze(-1)
    assert torch.equal(formats.round_to(groups.clone(), number, zeros), groups)
    assert torch.equal(best.scales, formats.round_scale(best.scales))
    assert best.zeros is grid.zeros
    assert torch.equal(weight, weights())


def test_pruned_weights_stay_zeros():
    keep = wanda.mask_24(weights(), None)
    assert not bool(tuned(FORMATS[2], keep)[3][0][~keep].any())


def test_parts_of_rows_make_the_whole(monkeypatch):
    whole = tuned(FORMATS[2])[3]
    monkeypatch.setattr(signround, "_PART_WEIGHTS", 7 * 128)
    parts = tuned(FORMATS[2])[3]
    assert float((valued(*whole) - valued(*parts)).norm() / valued(*whole).norm()) < 0.05  # ties may fall otherwise
