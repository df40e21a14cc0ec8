"""fp8 e4m3 weights and activations, a scale per token and per output channel: `torch._scaled_mm` (CUDA, cc 8.9 up).

Row-wise scaling: mat1 row-major (rows, in), mat2 column-major (in, out), scale_a (rows, 1), scale_b (1, out), fp32.
Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import SMALLEST_AMAX, canonical
from autotune.kernels.spec import GroupWeight, Packed

_LARGEST = 448.0


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = torch.device("cuda")
    columns = codes.contiguous().to(device).t()
    channel_scales = scales.view(1, -1).contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = columns.nbytes + channel_scales.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (columns, channel_scales, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    columns, channel_scales, bias = packed.data
    codes, scales = quantize(x)
    return torch._scaled_mm(codes, columns, scales, channel_scales, bias=bias, out_dtype=packed.dtype)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes (rows, in) and fp32 scales (rows, 1)."""
    scales = x.abs().amax(1, keepdim=True).float().clamp_(min=SMALLEST_AMAX).div_(_LARGEST)
    codes = x.div(scales).clamp_(-_LARGEST, _LARGEST)
    return codes.to(torch.float8_e4m3fn), scales
