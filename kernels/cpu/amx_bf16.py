"""bf16 weights, dense or 2:4, for many rows on AMX tiles; few rows go through `bf16`, on the same packed weights.

Described in `amx_bf16.cpp`. Never run on a CPU with tiles: see `amx`.
"""

from __future__ import annotations

from functools import partial

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import amx, bf16
from autotune.kernels.cpu.amx import LEAST_ROWS
from autotune.kernels.spec import GroupWeight, Packed

_function = partial(amx.function, "amx_bf16", "autotune_amx_bf16")
native = bf16.native  # for native code that asks for a row at a time


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    """As `bf16` does, once tiles are allowed: a kernel that cannot run many rows is refused as a whole."""
    _function()
    return bf16.pack(weight, dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    if rows < LEAST_ROWS:
        return bf16.run(packed, x)
    y = torch.empty(rows, packed.out_features, dtype=packed.dtype)
    if _function()(packed.data[0], x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for {rows} rows of {packed.in_features} inputs.", "Fewer rows.")
    return y
