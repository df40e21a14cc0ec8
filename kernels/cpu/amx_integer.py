"""int8, int4 and 2:4 weights for many rows on AMX tiles; few rows go through `integer`, on the same packed weights.

Bit for bit the same outputs: sums are exact integers, and what follows is the same code. Described in
`amx_integer.cpp`. Never run on a CPU with tiles: see `amx`.
"""

from __future__ import annotations

import torch

from autotune.kernels.cpu import amx, integer
from autotune.kernels.cpu.amx import LEAST_ROWS
from autotune.kernels.cpu.call import NativeLinear
from autotune.kernels.spec import GroupWeight, Packed

linear = NativeLinear("amx_integer", "autotune_amx_linear", amx.check)
tensors, bind = integer.tensors, integer.bind
native = integer.native  # for native code that asks for a row at a time


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    """As `integer` does, once tiles are allowed: a kernel that cannot run many rows is refused as a whole."""
    _ = linear.function
    return integer.pack(weight, dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return integer.run(packed, x) if x.shape[0] < LEAST_ROWS else linear.run(packed, x)
