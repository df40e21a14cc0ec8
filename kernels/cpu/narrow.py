"""Weights of three and two bits in scale groups: less to read than four, for a row at a time.

Packed by `integer`, which says how activations are met; the layouts are `Int3` and `Int2` of `formats.h`. A library of
its own, `narrow.cpp`, so that nobody waits for compiling it who does not ask for these schemes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build, integer
from autotune.kernels.spec import Packed

pack = integer.pack


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    y = torch.empty(rows, packed.out_features, dtype=packed.dtype)
    if _function()(packed.data[0], x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for {rows} rows of {packed.in_features} inputs.", "Fewer rows.")
    return y


def native(packed: Packed) -> tuple[int, int]:
    """Addresses of the C function and of the packed weights' description, for native code that calls it."""
    address = ctypes.cast(_function(), ctypes.c_void_p).value
    assert address is not None
    return address, packed.data[0]


@cache
def _function() -> Any:
    call = build.library("narrow").autotune_narrow
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    call.restype = ctypes.c_int
    return call
