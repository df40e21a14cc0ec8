"""bf16 weights, dense or 2:4, for many rows on AMX tiles; few rows go through `bf16`, on the same packed weights.

Described in `amx_bf16.cpp`. Never run on a CPU with tiles: see `amx`.
"""

from __future__ import annotations

import torch

from autotune.kernels.cpu import amx, bf16
from autotune.kernels.cpu.amx import LEAST_ROWS
from autotune.kernels.cpu.call import NativeLinear
from autotune.kernels.spec import GroupWeight, Packed

linear = NativeLinear("amx_bf16", "autotune_amx_bf16", amx.check)
tensors, bind = bf16.tensors, bf16.bind
native = bf16.native  # for native code that asks for a row at a time


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    """As `bf16` does, once tiles are allowed: a kernel that cannot run many rows is refused as a whole."""
    _ = linear.function
    return bf16.pack(weight, dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return bf16.run(packed, x) if x.shape[0] < LEAST_ROWS else linear.run(packed, x)
