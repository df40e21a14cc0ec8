"""The fp8 kernel of `cuda_fp8` with fast accumulation: Hopper's tensor cores then keep sums in about 14 bits.

Faster where the multiply is what binds. Whether it is accurate enough is for the numerics gate to say, on every shape.
Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch import cuda_fp8


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    return cuda_fp8.pack(weight, dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return cuda_fp8.multiply(packed, x, fast=True)
