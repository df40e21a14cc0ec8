"""int8, int4 and 2:4 weights for many rows on AMX tiles; few rows go through `integer`, on the same packed weights.

Bit for bit the same outputs: sums are exact integers, and what follows is the same code. Described in
`amx_integer.cpp`. Never run on a CPU with tiles: see `amx`.
"""

from __future__ import annotations

from functools import partial

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import amx, integer
from autotune.kernels.cpu.amx import LEAST_ROWS
from autotune.kernels.spec import GroupWeight, Packed

_function = partial(amx.function, "amx_integer", "autotune_amx_linear")
native = integer.native  # for native code that asks for a row at a time


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    """As `integer` does, once tiles are allowed: a kernel that cannot run many rows is refused as a whole."""
    _function()
    return integer.pack(weight, dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    if rows < LEAST_ROWS:
        return integer.run(packed, x)
    y = torch.empty(rows, packed.out_features, dtype=packed.dtype)
    if _function()(packed.data[0], x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for {rows} rows of {packed.in_features} inputs.", "Fewer rows.")
    return y
