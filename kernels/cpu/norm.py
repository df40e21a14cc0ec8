"""Root-mean-square normalisation as one call, in `norm.cpp`, where eager torch takes eight."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from autotune.kernels.cpu import build


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension: x (..., width) contiguous, weight (width,), both bf16
    or both fp32.

    Raises:
        DeviceError: `kernel.compiler`.
    """
    y = torch.empty_like(x)
    width = weight.shape[0]
    _function(x.dtype)(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps, torch.get_num_threads()
    )
    return y


@cache
def _function(dtype: torch.dtype) -> Any:
    library = build.library("norm")
    function = library.rms_norm_bf16 if dtype == torch.bfloat16 else library.rms_norm_fp32
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, pointer, size, size, ctypes.c_float, ctypes.c_int)
    function.restype = None
    return function
