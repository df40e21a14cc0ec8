"""int8 weights, activations left alone, on CPUs: torch's weight-only operator, and a dense multiply for many rows.

`_weight_int8pack_mm` reads the plain int8 codes but does one dot product after the other, so its time grows with the
rows. From `_DENSE_ROWS` on, the codes are converted (exactly) into a scratch buffer and multiplied densely, with the
channel scales applied to the output. One stored copy serves both routes. For bf16 the operator reads past the end, or
returns wrong sums, when the inputs are not a multiple of 16 (torch 2.13, AVX-512): `pack` refuses them.
"""

from __future__ import annotations

import torch

from autotune.errors import InputError
from autotune.kernels.reference import canonical
from autotune.kernels.scratch import scratch
from autotune.kernels.spec import GroupWeight, Packed

_MULTIPLE = 16
_DENSE_ROWS = 16  # measured: both routes cost the same at 12 to 20 rows


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    if codes.shape[1] % _MULTIPLE:
        message = f"{codes.shape[1]} inputs are not a multiple of {_MULTIPLE}; torch's int8 operator would crash."
        raise InputError("kernel.limit", message, "Keep this layer dense.")
    codes = codes.contiguous()
    channel_scales = scales.flatten().to(dtype)  # exact: canonical scales have 8 significant bits
    bias = None if weight.bias is None else weight.bias.to(dtype)
    held = codes.nbytes + channel_scales.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (codes, channel_scales, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    codes, scales, bias = packed.data
    if x.shape[0] < _DENSE_ROWS:
        y = torch._weight_int8pack_mm(x, codes, scales)
    else:
        dense = scratch(codes.numel(), packed.dtype, x.device, "weight").view(codes.shape).copy_(codes)
        y = torch.nn.functional.linear(x, dense).mul_(scales)
    return y if bias is None else y.add_(bias)
