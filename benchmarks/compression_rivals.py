"""Orders of pruning and quantization that others use, for comparison: prune then GPTQ, GPTQ then prune."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotune.compress import rounding, wanda
from autotune.compress.calibrate import InputStatistics
from autotune.compress.curvature import damped, sweep_factor
from autotune.compress.methods import Method
from autotune.compress.sweep import Start, sweep
from autotune.kernels.formats import decode, encode
from autotune.kernels.patterns import best_two, choose
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import Scheme

_BLOCK = 64


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, kept): SparseGPT at 2:4 (arXiv 2301.00774): of every four inputs the two with the largest w^2 / U_ii^2
    stay, chosen when the sweep reaches them; inputs in their own order, as its authors have them."""
    lower = torch.linalg.cholesky(damped(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    rest, inputs = weight.t().clone(), weight.shape[1]  # (in, out)
    kept = torch.zeros_like(rest, dtype=torch.bool)
    result = torch.empty_like(rest)
    for first in range(0, inputs, _BLOCK):
        last = min(first + _BLOCK, inputs)
        errors = torch.empty(last - first, rest.shape[1])
        for here in range(first, last):
            if here % 4 == 0:
                scores = (rest[here : here + 4] / upper.diagonal()[here : here + 4].unsqueeze(1)).square()
                kept[here : here + 4] = best_two(scores.t().contiguous()).t()
            result[here] = rest[here] * kept[here]
            errors[here - first] = (rest[here] - result[here]) / upper[here, here]
            rest[here + 1 : last].addr_(upper[here, here + 1 : last], errors[here - first], alpha=-1)
        rest[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
    return result.t().contiguous(), kept.t().contiguous()


def prune_then_gptq(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    made = []
    for item in schemes:
        assert item.sparsity in ("dense", "2:4"), "as written here it prunes 2:4 only"
        pruned, kept = sparsegpt(weight, inputs.hessian) if item.sparsity == "2:4" else (weight, None)
        made.append(_gptq(item, pruned, kept, inputs))
    return made


def gptq_then_prune(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    made = []
    for item in schemes:
        found = _gptq(item, weight, None, inputs)
        if item.sparsity != "dense":
            kept = choose(wanda.score(valued(found, item), inputs.moment), item)
            dense = None if found.dense is None else found.dense * kept
            codes = None if found.codes is None else found.codes * kept
            found = GroupWeight(item.name, dense, codes, found.scales)
        made.append(found)
    return made


def _gptq(item: Scheme, weight: torch.Tensor, kept: torch.Tensor | None, inputs: InputStatistics) -> GroupWeight:
    if item.weight.bits >= 16:
        return GroupWeight(item.name, dense=weight.to(torch.bfloat16))
    grid = rounding.find_grid(weight, inputs.moment, item.weight, kept)
    codes = sweep([Start(item.weight, weight, grid, kept)], sweep_factor(inputs.hessian))[0]
    if grid.zeros is None:
        return GroupWeight(item.name, codes=encode(codes, item.weight), scales=grid.scales)
    zeros = grid.zeros.repeat_interleave(item.weight.group_size or weight.shape[1], 1)
    return GroupWeight(item.name, codes=encode(codes, item.weight, zeros), scales=grid.scales, zeros=grid.zeros)


def valued(weight: GroupWeight, item: Scheme) -> torch.Tensor:
    """(out, in) fp32, also of formats that are not among the product's schemes."""
    if weight.dense is not None:
        return weight.dense.float()
    assert weight.codes is not None and weight.scales is not None
    size = item.weight.group_size or weight.codes.shape[1]
    zeros = None if weight.zeros is None else weight.zeros.repeat_interleave(size, 1)
    return decode(weight.codes, item.weight, zeros) * weight.scales.repeat_interleave(size, 1)


RIVALS: dict[str, Method] = {"prune-then-gptq": prune_then_gptq, "gptq-then-prune": gptq_then_prune}
