"""One layer group's weights while they are trained: fp32 masters whose mask is fixed and whose codes are made anew
after every step.

The forward pass uses what the codes stand for, and its gradient goes to the masters as if rounding were the identity
(straight-through estimator, arXiv 1308.3432). Pruned masters are zeros that get no gradient, so they stay zeros bit for
bit. Scales follow the largest weight they serve, now and then, because weights outgrow the ones they started with.
Searching them again by plain squared error was tried, and undid what had been gained: it clips large weights, which
compression had weighed by their inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autotune.compress import rounding
from autotune.compress.rounding import Grid
from autotune.kernels import formats
from autotune.kernels.patterns import kept_mask
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight
from autotune.place import at_a_time
from autotune.search_space.schemes import scheme

_PIECE_WEIGHTS = 2**18  # rows are rounded in pieces that stay in cache


class Master:
    """`weight` (out, in) fp32 is what the optimizer moves; `keep` (out, in) bool where it may, None: everywhere."""

    def __init__(self, weight: GroupWeight, device: torch.device | str = "cpu") -> None:
        """Starts from compressed weights: their dequantized numbers, their pattern, their scales."""
        self.scheme = scheme(weight.scheme)
        self.weight = dequantize(weight).contiguous().to(device) + 0.0  # pruned weights may be -0.0, and become +0.0
        sparse = self.scheme.sparsity != "dense"
        self.keep = kept_mask(self.weight, self.scheme).to(device) if sparse else None
        self.grid: Grid | None = None
        if weight.scales is not None:
            zeros = None if weight.zeros is None else weight.zeros.to(device)
            self.grid = Grid(weight.scales.to(device), zeros)
            self._first_scales, self._first_span = self.grid.scales, self._span()
        self._dtype = torch.bfloat16 if self.scheme.weight.bits == 16 else torch.float32  # without scales
        self._bias = weight.bias

    def typical(self) -> float:
        """Root mean square of the weights that are kept: what a step is measured in."""
        count = self.weight.numel() if self.keep is None else int(self.keep.sum())
        return float(self.weight.square().sum(dtype=torch.float64).div(max(1, count)).sqrt())

    def quantized(self, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` (out, in) with the numbers that the codes of the weights stand for."""
        for part in self._pieces():
            if self.grid is None:
                out[part] = self.weight[part].to(self._dtype)
            else:
                levels = self._levels(part)
                scales = self.grid.scales[part].unsqueeze(-1)
                out[part] = levels.mul_(scales).view(-1, self.weight.shape[1])
        return out

    def follow(self) -> None:
        """Scale the scales as the largest weights they serve have grown or shrunk since the start; zero points stay."""
        if self.grid is not None:
            growth = torch.where(self._first_span > 0, self._span() / self._first_span, 1.0)
            wanted, number = self._first_scales * growth, self.scheme.weight
            unit = formats.scale_unit(float(wanted.max())) if number.scale == "e4m3" else 1.0
            self.grid = Grid(formats.round_scales(wanted, number, unit), self.grid.zeros)

    def codes(self) -> GroupWeight:
        """The canonical weights that these round to, as the database keeps them."""
        name, bias = self.scheme.name, self._bias
        if self.grid is None:
            return GroupWeight(name, dense=self.weight.to(self._dtype).cpu(), bias=bias)
        grid, number = self.grid, self.scheme.weight
        codes = torch.empty(self.weight.shape, dtype=formats.code_type(number))
        for part in self._pieces():
            zeros = None if grid.zeros is None else grid.zeros[part].unsqueeze(-1)
            made = formats.encode(self._levels(part), number, zeros)
            codes[part] = made.view(-1, self.weight.shape[1]).cpu()
        zeros = None if grid.zeros is None else grid.zeros.cpu()
        return GroupWeight(name, codes=codes, scales=grid.scales.cpu(), zeros=zeros, bias=bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that changes in training."""
        state = {"weight": self.weight}
        if self.grid is not None:
            state["scales"] = self.grid.scales
            state |= {} if self.grid.zeros is None else {"zeros": self.grid.zeros}
        return state

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.weight.copy_(tensors["weight"])
        if self.grid is not None:
            device = self.weight.device
            zeros = tensors["zeros"].to(device) if "zeros" in tensors else None
            self.grid = Grid(tensors["scales"].to(device), zeros)

    def _span(self) -> torch.Tensor:
        """(rows, groups): the largest weight that each scale serves."""
        assert self.grid is not None
        largest = self.weight.view(*self.grid.scales.shape, -1).abs().amax(-1)
        return rounding.shared(largest, self.scheme.weight, torch.amax)

    def _levels(self, part: slice) -> torch.Tensor:
        """(rows, groups, inputs of a group)"""
        assert self.grid is not None
        scales = self.grid.scales[part].unsqueeze(-1)
        zeros = None if self.grid.zeros is None else self.grid.zeros[part].unsqueeze(-1)
        grouped = self.weight[part].view(len(scales), scales.shape[1], -1)
        return formats.round_to(grouped / scales, self.scheme.weight, zeros)

    def _pieces(self) -> list[slice]:
        rows, columns = self.weight.shape
        step = max(1, at_a_time(self.weight.device, _PIECE_WEIGHTS) // columns)
        return [slice(start, start + step) for start in range(0, rows, step)]
