"""bf16 dense linear layer on CUDA devices: `F.linear` (cuBLAS). Not yet run on a card."""

from __future__ import annotations

import torch

from autotune.kernels.spec import GroupWeight, Packed, dense_of


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    dense = dense_of(weight).to("cuda", dtype)
    bias = None if weight.bias is None else weight.bias.to("cuda", dtype)
    held = dense.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(dense.shape[0], dense.shape[1], dtype, held, (dense, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    dense, bias = packed.data
    return torch.nn.functional.linear(x, dense, bias)
