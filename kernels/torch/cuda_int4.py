"""int4 weights with a scale per group of inputs by torch's tinygemm kernel, `_weight_int4pack_mm` (CUDA, cc 8.0 up).

It computes (q - 8) * scale + zero for unsigned q in bf16, so canonical codes go in as q = code + 8 with zero 0: exact.
Good for up to about 4 rows, far slower than dense for many. Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed

_INNER_K_TILES = (8, 4, 2)  # tiles of 16 inputs that a thread block takes at a time: as many as divide the inputs


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    out_features, in_features = codes.shape
    device = torch.device("cuda")
    unsigned = (codes.to(device) + 8).to(torch.uint8)
    tiles = next(count for count in _INNER_K_TILES if in_features % (16 * count) == 0)
    nibbles = torch._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], tiles)
    scales_zeros = torch.zeros(scales.shape[1], out_features, 2, dtype=dtype, device=device)
    scales_zeros[..., 0] = scales.T.to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = nibbles.nbytes + scales_zeros.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(out_features, in_features, dtype, held, (nibbles, scales_zeros, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    nibbles, scales_zeros, bias = packed.data
    y = torch._weight_int4pack_mm(x, nibbles, packed.in_features // scales_zeros.shape[0], scales_zeros)
    return y if bias is None else y.add_(bias)
