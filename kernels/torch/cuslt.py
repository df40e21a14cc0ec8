"""2:4 sparse weights on NVIDIA's sparse tensor cores by cuSPARSELt: bf16, int8 and fp8 e4m3 (CUDA, cc 8.0 / 8.9 up).

The hardware wants the sparse operand first, so it computes Y^T = W X^T, with X^T a view of row-major x, and
`transpose_result` gives Y. `alpha` with one number per output is a free per-channel scale (a single number would
synchronize with the host); row scales follow. bf16 ignores alpha and takes the bias. Compressors may keep a -0.0 as a
survivor, so zeros are made positive first. Rows are padded to 8 (16-bit) or 16 (8-bit), and to 32 at least: fewer fail
on some devices, and a single row would make X^T look row-major. The library's algorithm is searched once for every
shape, on the first call with it; calls captured into a CUDA graph use what was found. Not yet run on a card.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch.cuda_activations import FP8, INT8, quantize, rescale

_LEAST_ROWS = 32
_DEFAULT = (0, 1, -1)  # alg_id, split_k, split_k_mode: what the operator takes when it is told nothing
_found: dict[tuple[object, ...], tuple[int, int, int]] = {}


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    device = torch.device("cuda")
    values, channel_scales = _values(weight, dtype)
    compressed = torch._cslt_compress(values.contiguous().to(device))
    alpha = None if channel_scales is None else channel_scales.flatten().contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = sum(part.nbytes for part in (compressed, alpha, bias) if part is not None)
    return Packed(values.shape[0], values.shape[1], dtype, held, (compressed, alpha, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    compressed, alpha, bias = packed.data
    if alpha is None:
        rows = _padded(x.shape[0], 8)
        padded = x if rows == x.shape[0] else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))
        return _multiply(compressed, padded.t(), bias, None, None)[: x.shape[0]]
    codes, scales = quantize(x, INT8 if compressed.dtype == torch.int8 else FP8, _padded(x.shape[0], 16))
    # bf16 is the widest output int8 offers besides int32, which alpha cannot scale; the row scale is a second rounding.
    y = _multiply(compressed, codes.t(), None, alpha, torch.bfloat16)
    return rescale(y, scales, None, bias)


def _padded(rows: int, multiple: int) -> int:
    return max(_LEAST_ROWS, -(-rows // multiple) * multiple)


def _multiply(
    compressed: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """(rows, out) from the compressed weight and activations (in, rows)."""
    algorithm, split, mode = _algorithm(compressed, columns, bias, alpha, out_dtype)
    return torch._cslt_sparse_mm(
        compressed,
        columns,
        bias=bias,
        alpha=alpha,
        out_dtype=out_dtype,
        transpose_result=True,
        alg_id=algorithm,
        split_k=split,
        split_k_mode=mode,
    )


def _algorithm(
    compressed: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[int, int, int]:
    """(alg_id, split_k, split_k_mode) that cuSPARSELt's own search found for this shape, once a process."""
    key = (compressed.numel(), columns.shape, columns.dtype, bias is None, columns.device)
    if key not in _found:
        library = getattr(torch._C, "_cusparselt", None)
        if library is None or torch.cuda.is_current_stream_capturing():
            return _DEFAULT
        try:
            _found[key] = tuple(library.mm_search(compressed, columns, bias, alpha, out_dtype, True)[:3])
        except RuntimeError:  # the search tries algorithms that a shape does not admit; the default may still run
            torch.cuda.synchronize()  # unless the device itself has failed, which this raises again
            _found[key] = _DEFAULT
    return _found[key]


def _values(weight: GroupWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is compressed, free of -0.0, and its channel scales (None for bf16)."""
    if weight.dense is not None:
        return weight.dense.to(dtype) + 0.0, None
    codes, scales = canonical(weight)
    if codes.dtype == torch.float8_e4m3fn:
        return (codes.float() + 0.0).to(codes.dtype), scales
    return codes, scales
