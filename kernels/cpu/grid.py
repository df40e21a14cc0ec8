"""The search for integer scales as one native call, in `grid.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build
from autotune.kernels.formats import FP16_SMALLEST_NORMAL, LARGEST_SCALE


class _Grid(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "keep", "importance", "scales", "zeros", "shrinks")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "group_size", "tries")),
        *((name, ctypes.c_float) for name in ("most", "least_scale", "largest_scale")),
    )


def available() -> bool:
    """False where nothing can be compiled."""
    return build.available("grid")


def find_grid(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    importance: torch.Tensor,
    shrinks: Sequence[float],
    group_size: int,
    largest_level: float,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales fp32 (out, groups) of least weighted squared error, and zero points int8 where levels are not symmetric.

    Args:
        weight: (out, in) fp32; keep: (out, in) bool, elsewhere weights are zero; importance: (in,) fp32.
        shrinks: what the range is multiplied with, tried in this order.

    Raises:
        DeviceError: `kernel.compiler`, `kernel.memory`.
    """
    weight, importance = weight.contiguous(), importance.contiguous()
    keep = None if keep is None else keep.contiguous()
    rows, inputs = weight.shape
    scales = weight.new_empty(rows, inputs // group_size)
    zeros = None if symmetric else torch.zeros_like(scales, dtype=torch.int8)
    tries = weight.new_tensor(shrinks)
    held = (weight, keep, importance, scales, zeros, tries)
    item = _Grid(
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        *(rows, inputs, group_size, len(tries)),
        *(largest_level, FP16_SMALLEST_NORMAL, LARGEST_SCALE),
    )
    if _function()(ctypes.byref(item), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for scales of {inputs} inputs.", "Close other programs.")
    return scales, zeros


@cache
def _function() -> Any:
    function = build.library("grid").find_grid
    function.argtypes = (ctypes.c_void_p, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
