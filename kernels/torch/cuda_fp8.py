"""fp8 e4m3 weights and activations, a scale per token and per output channel: `torch._scaled_mm` (CUDA, cc 8.9 up).

Row-wise scaling: mat1 row-major (rows, in), mat2 column-major (in, out), scale_a (rows, 1), scale_b (1, out), fp32.
Sums are kept in fp32 throughout; `cuda_fp8_fast` lets the tensor cores keep some shorter. Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch.cuda_activations import FP8, quantize


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = torch.device("cuda")
    columns = codes.contiguous().to(device).t()
    channel_scales = scales.view(1, -1).contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = columns.nbytes + channel_scales.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (columns, channel_scales, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return multiply(packed, x, fast=False)


def multiply(packed: Packed, x: torch.Tensor, fast: bool) -> torch.Tensor:
    columns, channel_scales, bias = packed.data
    codes, scales = quantize(x, FP8)
    return torch._scaled_mm(
        codes, columns, scales, channel_scales, bias=bias, out_dtype=packed.dtype, use_fast_accum=fast
    )
