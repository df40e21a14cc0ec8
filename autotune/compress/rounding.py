"""Round-to-nearest quantization with scales chosen by activation-weighted error.

For each scale group, scale = r * amax / qmax with r on a grid in [0.5, 1]; the r that minimises
sum_j E[x_j^2] (w_j - q_j scale)^2 wins (AWQ's clipping search, arXiv 2306.00978, on the second moment of the inputs).
Scales are rounded to 8 significant bits first, so codes and scales mean the same number in bf16, fp16 and fp32.
"""

from __future__ import annotations

import torch

from autotune.kernels.reference import round_scale
from autotune.search_space.schemes import NumberFormat

SHRINK = tuple(1.0 - 0.5 * step / 20 for step in range(20))
_CHUNK_WEIGHTS = 2**18  # rows are handled in pieces that stay in cache: 4x faster than whole matrices


def quantize(
    weight: torch.Tensor,  # (out_features, in_features) fp32
    moment: torch.Tensor | None,  # (in_features,) mean squared input; None weighs all inputs alike
    number: NumberFormat,
    keep: torch.Tensor | None = None,  # (out_features, in_features) bool; False is pruned to exact zero
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 (or float8_e4m3fn) (out, in) and scales fp32 (out, groups)."""
    rows, columns = weight.shape
    size = number.group_size or columns
    dtype = torch.int8 if number.kind == "int" else torch.float8_e4m3fn
    codes = torch.empty(rows, columns, dtype=dtype)
    scales = torch.empty(rows, columns // size)
    importance = torch.ones(columns) if moment is None else moment.float().clamp_min(1e-12)
    importance = importance.view(1, columns // size, size)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        chunk = weight[start : start + step]
        if keep is not None:
            chunk = chunk * keep[start : start + step]
        piece, scale = _quantize_chunk(chunk.reshape(len(chunk), -1, size), importance, number)
        codes[start : start + step] = piece.reshape(len(chunk), columns).to(dtype)
        scales[start : start + step] = scale
    return codes, scales


def _quantize_chunk(
    weight: torch.Tensor,  # (rows, groups, size)
    importance: torch.Tensor,  # (1, groups, size)
    number: NumberFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = weight.abs().amax(-1)  # (rows, groups)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.ones_like(largest)
    buffer, codes = torch.empty_like(weight), torch.empty_like(weight)
    for shrink in SHRINK:
        scale = round_scale(largest * (shrink / number.qmax))
        _encode(weight, scale, number, codes)
        torch.mul(codes, scale.unsqueeze(-1), out=buffer)
        error = buffer.sub_(weight).square_().mul_(importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return _encode(weight, best_scale, number, codes), best_scale


def _encode(weight: torch.Tensor, scale: torch.Tensor, number: NumberFormat, out: torch.Tensor) -> torch.Tensor:
    return round_to(torch.div(weight, scale.unsqueeze(-1), out=out), number)


def round_to(values: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """Weights over scales to the nearest codes, in place."""
    if number.kind == "int":
        return values.round_().clamp_(-number.qmax, number.qmax)
    clamped = values.clamp_(-number.qmax, number.qmax)
    return values.copy_(clamped.to(torch.float8_e4m3fn).float())
