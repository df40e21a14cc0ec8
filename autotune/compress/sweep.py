"""The joint sweep: pruning and rounding errors of many formats compensated in one pass over one Hessian.

GPTQ (arXiv 2210.17323): inputs are rounded one after the other, and what rounding (or a pruned position: SparseGPT,
arXiv 2301.00774) does to the output is made up for by the inputs still to come,

    e = (w_i - q_i) / U_ii,   w_j -= e U_ij for j > i,   with H^-1 = U^T U.

U depends on the inputs alone and rows do not see each other, so all formats of a group are stacked as rows of one
matrix and swept at once. Scales are fixed before (static groups), from the weights that start the sweep, so that the
order of inputs is free.

On a CPU integers are swept natively (`kernels/cpu/sweep.cpp`). All else is swept here by torch's operators, weights
input by input: an input of all rows is one contiguous line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from autotune.compress.curvature import SweepFactor
from autotune.compress.rounding import Grid
from autotune.kernels.cpu import sweep as native
from autotune.kernels.formats import round_to
from autotune.place import at_a_time
from autotune.search_space.schemes import NumberFormat

_BLOCK = 32  # inputs swept before their errors are carried to the rest by one product
_LINE = 2**13  # rows swept together: a block of them stays in cache
_NO_LIMIT = 3e38


@dataclass(frozen=True)
class Start:
    """One format's rows before the sweep."""

    number: NumberFormat
    weight: torch.Tensor  # (out, in) fp32; zero where pruned
    grid: Grid
    keep: torch.Tensor | None = None  # (out, in) bool; elsewhere levels are zero
    pattern: int = (
        0  # neighbours of which the sweep itself keeps half (SparseGPT); the factor's order has them together
    )

    def rows(self, part: slice) -> Start:
        keep = None if self.keep is None else self.keep[part]
        return replace(self, weight=self.weight[part], grid=self.grid.rows(part), keep=keep)


def sweep(starts: Sequence[Start], factor: SweepFactor) -> list[torch.Tensor]:
    """Levels (out, in) fp32 of every format, numbers it holds, before scales. All starts have the same shape."""
    integers = [number for number, start in enumerate(starts) if _is_native(start)]
    others = [number for number in range(len(starts)) if number not in integers]
    levels = dict(zip(integers, _natively([starts[number] for number in integers], factor), strict=True))
    levels |= dict(zip(others, _by_torch([starts[number] for number in others], factor), strict=True))
    return [levels[number] for number in range(len(starts))]


def _is_native(start: Start) -> bool:
    return start.number.kind == "int" and start.weight.device.type == "cpu" and native.available()


def _natively(starts: Sequence[Start], factor: SweepFactor) -> list[torch.Tensor]:
    rows = [
        native.Rows(
            start.weight,
            start.grid.scales,
            start.grid.zeros,
            start.keep,
            start.number.group_size or start.weight.shape[1],
            *_range(start),
            start.pattern,
        )
        for start in starts
    ]
    return native.sweep(rows, factor.upper, factor.order) if rows else []


def _range(start: Start) -> tuple[float, float]:
    """The lowest and the highest code."""
    if start.number.kind != "int":
        return -_NO_LIMIT, _NO_LIMIT
    return -start.number.qmax - (start.grid.zeros is not None), start.number.qmax


def _by_torch(starts: Sequence[Start], factor: SweepFactor) -> list[torch.Tensor]:
    if not starts:
        return []
    rows = len(starts[0].weight)
    step = max(1, at_a_time(factor.upper.device, _LINE, 2**17) // len(starts))
    levels = [torch.empty_like(start.weight) for start in starts]
    for first in range(0, rows, step):
        part = slice(first, first + step)
        pieces = [start.rows(part) for start in starts]
        for whole, piece in zip(levels, _sweep_rows(pieces, factor), strict=True):
            whole[part] = piece
    return levels


def _sweep_rows(starts: Sequence[Start], factor: SweepFactor) -> list[torch.Tensor]:
    order, upper = factor.order, factor.upper
    inputs, rows = len(order), len(starts[0].weight)
    weight = torch.cat([start.weight.t()[order] for start in starts], 1)  # (in, rows of all formats)
    keep = _keep(starts, order)
    levels = torch.empty_like(weight)
    for first in range(0, inputs, _BLOCK):
        last = min(first + _BLOCK, inputs)
        block = slice(first, last)
        grids = [_grid(start, order[block], inputs) for start in starts]
        with _one_thread():
            errors = _sweep_block(
                starts, grids, weight[block], levels[block], upper[block, block], None if keep is None else keep[block]
            )
        if last < inputs:
            weight[last:].addmm_(upper[block, last:].t(), errors, alpha=-1)
    unordered = torch.empty_like(levels)
    unordered[order] = levels
    return [piece.t().contiguous() for piece in unordered.split(rows, 1)]


def _sweep_block(
    starts: Sequence[Start],
    grids: Sequence[Grid],
    weight: torch.Tensor,
    levels: torch.Tensor,
    upper: torch.Tensor,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """Fill the levels of a block of inputs, (block, rows of all formats) as `weight` is; returns their errors."""
    rows = len(starts[0].weight)
    scales = torch.cat([grid.scales for grid in grids], 1)
    low, high = _limits(starts, grids, keep)
    diagonal = upper.diagonal().tolist()
    errors = torch.empty_like(weight)
    integers = all(start.number.kind == "int" for start in starts)
    patterns = [(start.pattern, slice(n * rows, (n + 1) * rows)) for n, start in enumerate(starts) if start.pattern]
    for place, (line, scale, level) in enumerate(zip(weight, scales, levels, strict=True)):
        for pattern, own in patterns:
            if place % pattern == 0:
                lines = slice(place, place + pattern)
                kept = _half(weight[lines, own] / upper.diagonal()[lines].unsqueeze(1))
                low[lines, own].mul_(kept)
                high[lines, own].mul_(kept)
        torch.div(line, scale, out=level)
        if integers:
            level.round_()
        else:
            for start, own in zip(starts, level.split(rows), strict=True):
                own.round_() if start.number.kind == "int" else round_to(own, start.number)
        torch.clamp(level, low[place], high[place], out=level)
        error = torch.addcmul(line, level, scale, value=-1, out=errors[place]).div_(diagonal[place])
        if place + 1 < len(weight):  # by addcmul: how addr rounds depends on where a line ends
            weight[place + 1 :].addcmul_(upper[place, place + 1 :].unsqueeze(1), error, value=-1)
    return errors


def _half(values: torch.Tensor) -> torch.Tensor:
    """(pattern, rows) bool: the larger half of every row, of equals the earlier."""
    sizes = values.square()
    places = torch.arange(len(sizes), device=sizes.device)
    first = places.view(-1, 1, 1) < places.view(1, -1, 1)  # (other, own, 1)
    larger = (sizes.unsqueeze(1) > sizes) | ((sizes.unsqueeze(1) == sizes) & first)
    return larger.sum(0) < len(sizes) // 2


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lines stay in cache and take microseconds: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _limits(
    starts: Sequence[Start], grids: Sequence[Grid], keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block, rows of all formats) each: the lowest and the highest level, both zero where pruned."""
    lows, highs = [], []
    for start, grid in zip(starts, grids, strict=True):
        zeros = torch.zeros_like(grid.scales) if grid.zeros is None else grid.zeros.to(grid.scales.dtype)
        lowest, highest = _range(start)
        lows.append(lowest - zeros)
        highs.append(highest - zeros)
    low, high = torch.cat(lows, 1), torch.cat(highs, 1)
    return (low, high) if keep is None else (low.mul_(keep), high.mul_(keep))


def _keep(starts: Sequence[Start], order: torch.Tensor) -> torch.Tensor | None:
    """(in, rows of all formats) bool, or None where nothing is pruned."""
    if all(start.keep is None for start in starts):
        return None
    parts = [torch.ones_like(s.weight, dtype=torch.bool) if s.keep is None else s.keep for s in starts]
    return torch.cat([part.t()[order] for part in parts], 1)


def _grid(start: Start, places: torch.Tensor, inputs: int) -> Grid:
    """(places, rows): scale and zero point of every input of a block."""
    groups = places // (start.number.group_size or inputs)
    zeros = None if start.grid.zeros is None else start.grid.zeros.t()[groups]
    return Grid(start.grid.scales.t()[groups], zeros)
