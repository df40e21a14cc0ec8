"""2:4 sparse weights on NVIDIA's sparse tensor cores by cuSPARSELt: bf16, int8 and fp8 e4m3 (CUDA, cc 8.0 / 8.9 up).

The hardware wants the sparse operand first, so it computes Y^T = W X^T, with X^T a view of row-major x, and
`transpose_result` gives Y. `alpha` with one number per output is a free per-channel scale (a single number would
synchronize with the host); row scales follow. bf16 ignores alpha and takes the bias. Compressors may keep a -0.0 as a
survivor, so zeros are made positive first. Rows are padded to 8 (16-bit) or 16 (8-bit). Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch import cuda_fp8, cuda_int8
from autotune.search_space.schemes import scheme


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    device = torch.device("cuda")
    values, channel_scales = _values(weight, dtype)
    compressed = torch._cslt_compress(values.contiguous().to(device))
    alpha = None if channel_scales is None else channel_scales.flatten().contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = sum(part.nbytes for part in (compressed, alpha, bias) if part is not None)
    activation = scheme(weight.scheme).activation
    kind = "none" if activation is None else activation.kind
    return Packed(values.shape[0], values.shape[1], dtype, held, (kind, compressed, alpha, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    kind, compressed, alpha, bias = packed.data
    rows = x.shape[0]
    if kind == "none":
        columns = cuda_int8.pad_rows(x, 8).t()
        return torch._cslt_sparse_mm(compressed, columns, bias=bias, transpose_result=True)[:rows]
    codes, scales = cuda_int8.quantize(x) if kind == "int" else cuda_fp8.quantize(x)
    columns = cuda_int8.pad_rows(codes, 16).t()
    # bf16 is the widest output int8 offers besides int32, which alpha cannot scale; the row scale is a second rounding.
    y = torch._cslt_sparse_mm(compressed, columns, alpha=alpha, out_dtype=torch.bfloat16, transpose_result=True)
    scaled = y[:rows] * scales
    return (scaled if bias is None else scaled.add_(bias)).to(packed.dtype)


def _values(weight: GroupWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is compressed, free of -0.0, and its channel scales (None for bf16)."""
    if weight.dense is not None:
        return weight.dense.to(dtype) + 0.0, None
    codes, scales = canonical(weight)
    if codes.dtype == torch.float8_e4m3fn:
        return (codes.float() + 0.0).to(codes.dtype), scales
    return codes, scales
