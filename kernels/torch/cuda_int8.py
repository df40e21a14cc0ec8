"""int8 weights and activations by `torch._int_mm` (CUDA): exact int32 sums, rescaled by a second kernel.

cuBLASLt refuses 16 rows or fewer, so rows are padded to `_LEAST_ROWS`. Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import SMALLEST_AMAX, canonical
from autotune.kernels.spec import GroupWeight, Packed

_LEAST_ROWS = 32


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = torch.device("cuda")
    columns = codes.contiguous().to(device).t()
    channel_scales = scales.view(1, -1).contiguous().to(device)
    bias = torch.zeros((), device=device) if weight.bias is None else weight.bias.to(device).float()
    held = columns.nbytes + channel_scales.nbytes + (0 if weight.bias is None else bias.nbytes)
    return Packed(codes.shape[0], codes.shape[1], dtype, held, (columns, channel_scales, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    columns, channel_scales, bias = packed.data
    codes, scales = quantize(x)
    sums = torch._int_mm(pad_rows(codes, _LEAST_ROWS), columns)[: x.shape[0]]
    return torch.addcmul(bias, sums * channel_scales, scales).to(packed.dtype)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (rows, in) and fp32 scales (rows, 1)."""
    scales = x.abs().amax(1, keepdim=True).float().clamp_(min=SMALLEST_AMAX).div_(127.5)
    return x.div(scales).round_().clamp_(-128.0, 127.0).to(torch.int8), scales


def pad_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x with rows of zeros added up to a multiple."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % multiple))
