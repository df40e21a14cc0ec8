"""Round-to-nearest quantization with scales chosen by activation-weighted error.

For each scale group, scale = r * amax / qmax with r on a grid; the r that minimises

    sum_j E[x_j^2] (w_j - q_j scale)^2

wins (AWQ's clipping search, arXiv 2306.00978, on the second moment of the inputs). r is in [0.5, 1]; for two bits,
where clipping pays more, from 0.25 on; among powers of two the nearest and its neighbours. With a zero point the range
is r * (largest - smallest), zero included. One scale for a whole tensor is that of its largest weight: e4m3 has the
range. Scales are rounded to what the format can write first, so codes and scales mean the same number in bf16, fp16 and
fp32. Scales of integers are searched natively on a CPU (`kernels/cpu/grid.cpp`), the others here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from autotune.kernels import formats
from autotune.kernels.cpu import grid as native
from autotune.place import at_a_time
from autotune.search_space.schemes import NumberFormat

SHRINK = tuple(1.0 - 0.5 * step / 20 for step in range(20))
_SHRINK_MORE = tuple(1.0 - 0.75 * step / 20 for step in range(20))
_CHUNK_WEIGHTS = 2**18  # rows are handled in pieces that stay in cache: 4x faster than whole matrices


@dataclass(frozen=True)
class Grid:
    """Where a weight's levels lie: scales fp32 (out, groups), and zero points int8 of asymmetric formats."""

    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def rows(self, part: slice) -> Grid:
        return Grid(self.scales[part], None if self.zeros is None else self.zeros[part])


@dataclass(frozen=True)
class Rounded:
    """Codes (out, in), int8 or float8_e4m3fn, and what they count in."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantize(
    weight: torch.Tensor,  # (out_features, in_features) fp32
    moment: torch.Tensor | None,  # (in_features,) mean squared input; None weighs all inputs alike
    number: NumberFormat,
    keep: torch.Tensor | None = None,  # (out_features, in_features) bool; False is pruned to exact zero
) -> Rounded:
    """The nearest codes on the best grid."""
    rows, columns = weight.shape
    grid = find_grid(weight, moment, number, keep)
    codes = torch.empty(rows, columns, dtype=formats.code_type(number), device=weight.device)
    groups = grid.scales.shape[1]
    for part in _parts(weight, 1):
        chunk = weight[part] if keep is None else weight[part] * keep[part]
        scales, zeros = grid.scales[part].unsqueeze(-1), None if grid.zeros is None else grid.zeros[part].unsqueeze(-1)
        levels = formats.round_to(chunk.reshape(len(chunk), groups, -1) / scales, number, zeros)
        codes[part] = formats.encode(levels, number, zeros).view(chunk.shape)
    return Rounded(codes, grid.scales, grid.zeros)


def find_grid(
    weight: torch.Tensor, moment: torch.Tensor | None, number: NumberFormat, keep: torch.Tensor | None = None
) -> Grid:
    """The scales and zero points of least weighted error; arguments as `quantize` has them."""
    rows, columns = weight.shape
    size = number.group_size or columns
    if number.rows is None:
        return Grid(formats.round_scale(_largest(weight, keep) / number.qmax).expand(rows, columns // size).clone())
    unit = 1.0
    if number.scale == "e4m3":
        unit = formats.scale_unit(float(_largest(weight, keep)) / number.qmax)
    importance = torch.ones(columns, device=weight.device) if moment is None else moment.float().clamp_min(1e-12)
    if _is_native(weight, number):
        shrinks = _shrinks(number)
        return Grid(*native.find_grid(weight, keep, importance, shrinks, size, number.qmax, number.symmetric))
    importance = importance.view(1, columns // size, size)
    found = []
    for part in _parts(weight, number.rows):
        chunk = weight[part] if keep is None else weight[part] * keep[part]
        found.append(_search(chunk.reshape(len(chunk), -1, size), importance, number, unit))
    zeros = [grid.zeros for grid in found if grid.zeros is not None]
    return Grid(torch.cat([grid.scales for grid in found]), torch.cat(zeros) if zeros else None)


def _is_native(weight: torch.Tensor, number: NumberFormat) -> bool:
    plain = number.kind == "int" and number.rows == 1 and number.scale == "bf16"
    return plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and native.available()


def _largest(weight: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    parts = [weight[p] if keep is None else weight[p] * keep[p] for p in _parts(weight, 1)]
    return torch.stack([part.abs().max() for part in parts]).max()


def _parts(weight: torch.Tensor, together: int) -> list[slice]:
    """Pieces of rows, each a multiple of the rows that share a scale."""
    step = max(1, at_a_time(weight.device, _CHUNK_WEIGHTS) // weight.shape[1] // together) * together
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _search(
    weight: torch.Tensor,  # (rows, groups, size)
    importance: torch.Tensor,  # (1, groups, size)
    number: NumberFormat,
    unit: float,
) -> Grid:
    low, span = _range(weight, number)
    best_error = torch.full_like(span, torch.inf)
    best_scale, best_zero = torch.ones_like(span), torch.zeros_like(span)
    steps = 2.0**number.bits - 1 if not number.symmetric else number.qmax
    buffer, levels = torch.empty_like(weight), torch.empty_like(weight)
    for shrink in _shrinks(number):
        scale = formats.round_scales(span * (shrink / steps), number, unit)
        zero = None if number.symmetric else _zero(low * shrink, scale, number)
        torch.div(weight, scale.unsqueeze(-1), out=levels)
        formats.round_to(levels, number, None if zero is None else zero.unsqueeze(-1))
        torch.mul(levels, scale.unsqueeze(-1), out=buffer)
        error = shared(buffer.sub_(weight).square_().mul_(importance).sum(-1), number, torch.sum)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = best_zero if zero is None else torch.where(better, zero, best_zero)
    return Grid(best_scale, None if number.symmetric else best_zero.to(torch.int8))


def _shrinks(number: NumberFormat) -> tuple[float, ...]:
    if number.scale == "e8m0":
        return (1.0, 2.0, 0.5)
    return SHRINK if number.bits > 2 else _SHRINK_MORE


def _range(weight: torch.Tensor, number: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(smallest weight or 0, what the levels from zero, or from the lowest, have to span): (rows, groups)."""
    if number.symmetric:
        largest = shared(weight.abs().amax(-1), number, torch.amax)
        return largest, largest
    low = weight.amin(-1).clamp_max(0.0)
    return low, weight.amax(-1).clamp_min(0.0) - low


def _zero(low: torch.Tensor, scale: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """The code that stands for 0 where `low` has the lowest code."""
    lowest = -number.qmax - 1
    return (lowest - low / scale).round_().clamp_(lowest, number.qmax)


def shared(values: torch.Tensor, number: NumberFormat, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(rows, groups): one number for all rows that share a scale, by torch.sum or torch.amax."""
    together = number.rows or len(values)
    if together == 1:
        return values
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % together))
    blocks = padded.view(-1, together, values.shape[1])
    return reduce(blocks, 1).repeat_interleave(together, 0)[: len(values)]
