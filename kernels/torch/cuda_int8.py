"""int8 weights and activations by `torch._int_mm` (CUDA): exact int32 sums, rescaled by a second kernel.

cuBLASLt refuses 16 rows or fewer, so fewer than `_LEAST_ROWS` are padded to them. Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch.cuda_activations import INT8, quantize, rescale

_LEAST_ROWS = 32
_MULTIPLE = 8  # of rows: cuBLASLt's int8 products on tensor cores want 32-bit aligned columns of the output


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = torch.device("cuda")
    columns = codes.contiguous().to(device).t()
    channels = scales.flatten().contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = columns.nbytes + channels.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (columns, channels, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    columns, channels, bias = packed.data
    codes, scales = quantize(x, INT8, max(_LEAST_ROWS, -(-x.shape[0] // _MULTIPLE) * _MULTIPLE))
    return rescale(torch._int_mm(codes, columns), scales, channels, bias)
