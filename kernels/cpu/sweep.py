"""GPTQ's sweep of integer formats as one native call, in `sweep.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build


@dataclass(frozen=True)
class Rows:
    """One format's rows. Levels are whole numbers, `lowest` to `highest` less the zero point where there is one."""

    weight: torch.Tensor  # (out, in) fp32
    scales: torch.Tensor  # (out, groups) fp32
    zeros: torch.Tensor | None  # (out, groups) int8
    keep: torch.Tensor | None  # (out, in) bool; elsewhere levels are zero
    group_size: int
    lowest: float
    highest: float
    pattern: int = 0  # inputs in a row of which the sweep itself keeps half; they lie together in `order`


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "zeros", "keep", "levels")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "group_size", "pattern")),
        *((name, ctypes.c_float) for name in ("lowest", "highest")),
    )


def available() -> bool:
    """False where nothing can be compiled."""
    return build.available("sweep")


def sweep(formats: Sequence[Rows], upper: torch.Tensor, order: torch.Tensor) -> list[torch.Tensor]:
    """Levels (out, in) fp32 of every format.

    Args:
        upper: (in, in) fp32, U of the inverse Hessian U^T U with inputs in `order` (in,).

    Raises:
        DeviceError: `kernel.compiler`, `kernel.memory`.
    """
    held: list[torch.Tensor] = []

    def address(tensor: torch.Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        held.append(tensor.to(dtype).contiguous())
        return held[-1].data_ptr()

    levels = [torch.empty_like(item.weight, memory_format=torch.contiguous_format) for item in formats]
    items = (_Rows * len(formats))(
        *(
            _Rows(
                address(item.weight, torch.float32),
                address(item.scales, torch.float32),
                address(item.zeros, torch.int8),
                address(item.keep, torch.bool),
                made.data_ptr(),
                *(len(made), item.scales.shape[1], item.group_size, item.pattern, item.lowest, item.highest),
            )
            for item, made in zip(formats, levels, strict=True)
        )
    )
    factor = [address(upper, torch.float32), address(order, torch.int32)]
    if _function()(items, len(formats), *factor, len(order), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for a sweep over {len(order)} inputs.", "Close other programs.")
    return levels


@cache
def _function() -> Any:
    function = build.library("sweep").sweep
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, size, pointer, pointer, size, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
