"""Compression methods by name: how a group's weights become codes. The choices of `--compression`.

A method takes a group's dense weights, what calibration saw of its inputs, and formats, all of them at once because
methods share work between them. Add one: write its file, add a line to `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autotune.compress import hwpq, rounding, signround, sparse, wanda
from autotune.compress.calibrate import InputStatistics
from autotune.compress.curvature import SweepFactor, sweep_factor
from autotune.compress.rounding import Grid
from autotune.compress.sweep import Start, sweep
from autotune.errors import InputError, did_you_mean
from autotune.kernels.formats import FP16_SMALLEST_NORMAL, encode
from autotune.kernels.packing import movable
from autotune.kernels.patterns import choose
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight
from autotune.place import at_a_time
from autotune.search_space.schemes import NumberFormat, Scheme, Sparsity

Method = Callable[[torch.Tensor, InputStatistics, Sequence[Scheme]], list[GroupWeight]]
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # weight (out, in), moment (in,) -> (out, in)

AUTO = "auto"
FAST = "wanda"  # without a Hessian; HWPQ's metric costs as much and prunes worse (docs/measured.md)
QUICK = "gptq"  # for large models
_FINE = NumberFormat("int", 16)
_ROWS_OF_WEIGHTS = 2**23  # rows are compressed in parts of so many weights: memory stays that of a part


@dataclass(frozen=True)
class Compressed:
    """One group under one format, by which method, and its error on documents that no method was fitted to."""

    weight: GroupWeight
    method: str
    layer_error: float | None  # of the group's output, squared and relative; None where it was not measured


def join(experts: Sequence[Compressed], powers: Sequence[float]) -> Compressed:
    """A layer's experts under one format as one group. `powers`: of their outputs, summed over the tokens they get."""
    names = [item.method for item in experts]
    counts = {name: names.count(name) for name in sorted(set(names), key=names.count, reverse=True)}
    method = names[0] if len(counts) == 1 else ", ".join(f"{name} ({n} experts)" for name, n in counts.items())
    errors = [item.layer_error for item in experts if item.layer_error is not None]
    weight = _joined([item.weight for item in experts])
    if len(errors) < len(experts):
        return Compressed(weight, method, None)
    lost = sum(error * power for error, power in zip(errors, powers, strict=True))
    return Compressed(weight, method, lost / (sum(powers) or 1.0))


def compress(name: str, weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[Compressed]:
    """Compress a group's weights (out, in) fp32 by the named method, or by the best for each scheme (`AUTO`)."""
    # Judging takes as long as the quick method itself, which is not compared with others.
    power = None if name == QUICK else inputs.output_power(weight)

    def judged(method: str) -> list[Compressed]:
        made = METHODS[method](weight, inputs, schemes)
        if power is None:
            return [Compressed(item, method, None) for item in made]
        changes = [inputs.output_power(dequantize(item) - weight) or 0.0 for item in made]
        return [Compressed(item, method, error / (power or 1.0)) for item, error in zip(made, changes, strict=True)]

    candidates = [judged(method) for method in (AUTO_METHODS if name == AUTO else (name,))]
    return [min(found, key=lambda item: item.layer_error or 0.0) for found in zip(*candidates, strict=True)]


def check(name: str) -> None:
    """Raises InputError `compression.unknown`, with the closest known names."""
    if name != AUTO and name not in METHODS:
        what = f"there is no compression method {name!r}."
        raise InputError("compression.unknown", what, did_you_mean(name, [AUTO, *METHODS]))


def takes_hessian(name: str) -> bool:
    return name in (AUTO, "joint", "gptq", "signround")


@dataclass(frozen=True)
class _Fit:
    """Rows (out, in) before rounding, and where they are not pruned."""

    weight: torch.Tensor
    keep: torch.Tensor | None = None


Pruning = Callable[[torch.Tensor, Scheme], _Fit]  # rows (out, in), a scheme of the pattern


def joint(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    """Masks and weights of least layer error, then one sweep that rounds every format and makes up for it."""
    spectrum = sparse.spectrum(inputs.hessian) if any(item.sparsity != "dense" for item in schemes) else None

    def pruned(rows: torch.Tensor, item: Scheme) -> _Fit:
        assert spectrum is not None
        keep = sparse.admm_mask(rows, spectrum, item)
        found = sparse.least_squares(rows, inputs.hessian, keep)
        return _Fit(found, keep)

    return _swept(weight, inputs, schemes, sweep_factor(inputs.hessian), pruned)


def gptq(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    """SparseGPT's masks and update, then a sweep that rounds every format: a fraction of `joint`'s work where inputs
    are many. A pattern of whole rows, which cannot be chosen on the way, has Wanda's mask."""

    def pruned(rows: torch.Tensor, item: Scheme) -> _Fit:
        # As integers so fine that rounding is nothing; made up for, a weight may double.
        grid = Grid(2 * rows.abs().amax(1, keepdim=True).clamp_min(FP16_SMALLEST_NORMAL) / _FINE.qmax)
        keep = None if item.block else choose(wanda.score(rows, inputs.moment), item)
        start = Start(_FINE, rows, grid, keep, item.block or 0)
        found = sweep([start], sweep_factor(inputs.hessian, together=item.block or 1))[0] * grid.scales
        return _Fit(found, found != 0)

    return _swept(weight, inputs, schemes, sweep_factor(inputs.hessian), pruned)


def _swept(
    weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme], factor: SweepFactor, pruned: Pruning
) -> list[GroupWeight]:
    patterns = {item.sparsity: item for item in schemes if item.sparsity != "dense"}
    coded = [item for item in schemes if item.weight.bits < 16]
    # Scales that rows share need all rows; where a scheme is sparse they wait for the weights that survive.
    grids = {i.name: rounding.find_grid(weight, inputs.moment, i.weight) for i in coded if i.sparsity == "dense"}
    parts: list[list[GroupWeight]] = []
    step = max(1, at_a_time(weight.device, _ROWS_OF_WEIGHTS, 2**25) // weight.shape[1])
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        fits = {"dense": _Fit(weight[part])} | {name: pruned(weight[part], item) for name, item in patterns.items()}
        starts = [_start(item, fits[item.sparsity], grids.get(item.name), part, inputs) for item in coded]
        made = dict(zip([i.name for i in coded], sweep(starts, factor) if starts else [], strict=True))
        grid = {item.name: start.grid for item, start in zip(coded, starts, strict=True)}
        parts.append(
            [
                _coded(item, made[item.name], grid[item.name])
                if item.name in made
                else GroupWeight(item.name, dense=fits[item.sparsity].weight.to(torch.bfloat16))
                for item in schemes
            ]
        )
    return [_joined(pieces) for pieces in zip(*parts, strict=True)]


def _start(item: Scheme, fit: _Fit, grid: Grid | None, part: slice, inputs: InputStatistics) -> Start:
    """Scales belong to the weights that survive."""
    found = grid.rows(part) if grid else rounding.find_grid(fit.weight, inputs.moment, item.weight, fit.keep)
    return Start(item.weight, fit.weight, found, fit.keep)


def _coded(item: Scheme, levels: torch.Tensor, grid: Grid) -> GroupWeight:
    size = item.weight.group_size or levels.shape[1]
    zeros = None if grid.zeros is None else grid.zeros.repeat_interleave(size, 1)
    codes = encode(levels, item.weight, zeros)
    return GroupWeight(item.name, codes=codes, scales=grid.scales, zeros=grid.zeros)


def _joined(pieces: Sequence[GroupWeight]) -> GroupWeight:
    """Parts of a group's rows as one."""

    def cat(name: str) -> torch.Tensor | None:
        tensors = [getattr(piece, name) for piece in pieces]
        if tensors[0] is None or len(tensors) == 1:
            return tensors[0]  # type: ignore[no-any-return]
        return torch.cat([movable(tensor) for tensor in tensors]).view(tensors[0].dtype)

    parts = {name: cat(name) for name in ("dense", "codes", "scales", "zeros")}
    return GroupWeight(pieces[0].scheme, **parts)


def rounded(score: Score) -> Method:
    """Round to nearest with clipped scales, after a mask where the scheme is sparse; no weight is moved."""

    def method(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
        sparsities: dict[Sparsity, Scheme] = {item.sparsity: item for item in schemes if item.sparsity != "dense"}
        scores = score(weight, inputs.moment) if sparsities else weight
        masks = {name: choose(scores, item) for name, item in sparsities.items()}
        made = []
        for item in schemes:
            keep = masks.get(item.sparsity)
            if item.weight.bits >= 16:
                dense = weight if keep is None else weight * keep
                made.append(GroupWeight(item.name, dense=dense.to(torch.bfloat16)))
            else:
                found = rounding.quantize(weight, inputs.moment, item.weight, keep)
                made.append(GroupWeight(item.name, codes=found.codes, scales=found.scales, zeros=found.zeros))
        return made

    return method


def signed(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    """Masks and weights as `joint` has them, then integers by sign-gradient rounding; other formats to nearest."""
    patterns = {item.sparsity: item for item in schemes if item.sparsity != "dense"}
    spectrum = sparse.spectrum(inputs.hessian) if patterns else None
    fits: dict[Sparsity, _Fit] = {"dense": _Fit(weight)}
    for name, item in patterns.items():
        assert spectrum is not None
        keep = sparse.admm_mask(weight, spectrum, item)
        fits[name] = _Fit(sparse.least_squares(weight, inputs.hessian, keep), keep)
    return [_signed(item, fits[item.sparsity], inputs) for item in schemes]


def _signed(item: Scheme, fit: _Fit, inputs: InputStatistics) -> GroupWeight:
    if item.weight.bits >= 16:
        return GroupWeight(item.name, dense=fit.weight.to(torch.bfloat16))
    if item.weight.kind != "int":
        found = rounding.quantize(fit.weight, inputs.moment, item.weight, fit.keep)
        return GroupWeight(item.name, codes=found.codes, scales=found.scales, zeros=found.zeros)
    grid = rounding.find_grid(fit.weight, inputs.moment, item.weight, fit.keep)
    return _coded(item, *signround.tune(fit.weight, inputs.hessian, item.weight, grid, fit.keep))


METHODS: dict[str, Method] = {
    "joint": joint,
    "gptq": gptq,
    "signround": signed,
    "wanda": rounded(wanda.score),
    "hwpq": rounded(hwpq.score),
    "magnitude": rounded(lambda weight, _: wanda.score(weight, None)),
}
AUTO_METHODS = ("joint", "wanda")
