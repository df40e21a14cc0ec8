"""fp8 in blocks of 128 x 128 weights and 128 inputs of a token, as DeepSeek-V3 has it, by cuBLASLt (Hopper only).

`torch.nn.functional.scaled_mm` wants fp32 scales: of the activations (rows, in / 128) with rows adjacent in memory, of
the weights (in / 128, out / 128) with inputs adjacent and padded to a multiple of four; and rows in fours (pytorch,
ScaledBlas.cpp; cuBLAS documentation, "1D and 128x128 2D block scaling"). Not yet run on a card.
"""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, scaled_mm

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch.cuda_activations import FP8_GROUPS, quantize_groups

_ROWS = 4  # their number has to be a multiple
_SCALES = 4  # and that of a block row's scales
_BLOCK = 128


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = torch.device("cuda")
    columns = codes.contiguous().to(device).t()
    blocks = scales[::_BLOCK]  # (out / 128, in / 128)
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[1] % _SCALES)).contiguous().to(device).t()
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = columns.nbytes + padded.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (columns, padded, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    columns, blocks, bias = packed.data
    rows = x.shape[0]
    codes, scales = quantize_groups(x, FP8_GROUPS, -(-rows // _ROWS) * _ROWS)
    y = scaled_mm(
        codes, columns, scales, ScalingType.BlockWise1x128, blocks, ScalingType.BlockWise128x128,
        output_dtype=packed.dtype,
    )[:rows]  # fmt: skip
    return y if bias is None else y + bias
