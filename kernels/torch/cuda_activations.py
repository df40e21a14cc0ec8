"""What the integer and fp8 kernels on CUDA do around their multiply: quantize activations per token, rescale sums.

With Triton each is one kernel (`kernels.triton.activations`); without it the torch operators below do the same in
several. `rows` asks for rows of zeros at the end, which libraries with a least number of rows need: the quantizer
writes them itself, so that nothing is copied for it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from autotune.kernels.reference import SMALLEST_AMAX
from autotune.search_space.schemes import NumberFormat

INT8 = NumberFormat("int", 8)
FP8 = NumberFormat("float", 8)
FP8_GROUPS = NumberFormat("float", 8, 128)


def quantize(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, in) to codes (max(m, rows), in) and fp32 scales (m, 1); codes past m are zeros."""
    if fused():
        from autotune.kernels.triton import activations

        return activations.quantize(x, number, rows)
    return quantize_torch(x, number, rows)


def quantize_groups(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, in) to fp8 codes (max(m, rows), in) and fp32 scales (max(m, rows), in / group), rows adjacent in memory."""
    if fused():
        from autotune.kernels.triton import activations

        codes, scales = activations.quantize_groups(x, number, rows)
        return codes, scales.t()
    return quantize_groups_torch(x, number, rows)


def rescale(
    sums: torch.Tensor, scales: torch.Tensor, channels: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """bf16 sums * scales * channels + bias for sums (at least m, out), scales (m, 1), channels and bias (out,)."""
    if fused():
        from autotune.kernels.triton import activations

        return activations.rescale(sums, scales, channels, bias)
    return rescale_torch(sums, scales, channels, bias)


def quantize_torch(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.abs().amax(1, keepdim=True).float().clamp_(min=SMALLEST_AMAX)
    if number.kind == "int":
        scales = largest.div_(127.5)
        codes = x.float().div_(scales).round_().clamp_(-128.0, 127.0).to(torch.int8)
    else:
        scales = largest.div_(number.qmax)
        codes = x.float().div_(scales).clamp_(-number.qmax, number.qmax).to(torch.float8_e4m3fn)
    return _padded(codes, rows), scales


def quantize_groups_torch(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    assert number.group_size is not None
    more = torch.nn.functional.pad(x, (0, 0, 0, max(0, rows - x.shape[0])))
    codes, scales = quantize_torch(more.reshape(-1, number.group_size), FP8)
    return codes.view(more.shape), scales.view(more.shape[0], -1).t().contiguous().t()


def rescale_torch(
    sums: torch.Tensor, scales: torch.Tensor, channels: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    y = sums[: scales.shape[0]] * (scales if channels is None else scales * channels)
    return (y if bias is None else y.add_(bias)).to(torch.bfloat16)


@cache
def fused() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None and find_spec("autotune.kernels.triton.activations") is not None


def _padded(codes: torch.Tensor, rows: int) -> torch.Tensor:
    if codes.shape[0] >= rows:
        return codes
    more = torch.zeros(rows - codes.shape[0], codes.shape[1], dtype=torch.uint8, device=codes.device)
    return torch.cat([codes.view(torch.uint8), more]).view(codes.dtype)
