"""One kernel to quantize activations per token (int8 or fp8 e4m3), and one to rescale sums: see `cuda_activations`.

A program takes one row: its largest magnitude first, then the codes; the second reading comes from the cache. Codes are
x / scale in IEEE division, rounded to even by adding and taking off 1.5 * 2^23, so they are those of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.search_space.schemes import NumberFormat


@triton.jit
def quantize_kernel(
    x: tl.tensor,  # (rows, inputs)
    codes: tl.tensor,  # (padded, inputs) int8 or e4m3
    scales: tl.tensor,  # (rows,) fp32
    rows: tl.int32,
    inputs: tl.int32,
    STEPS: tl.constexpr,  # what the largest magnitude is divided by
    LEAST: tl.constexpr,  # the smallest largest magnitude: a row of zeros gets codes of zero
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        inside = (start + lane < inputs) & (row < rows)
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * inputs + start + lane, inside, 0.0).to(tl.float32)))
    scale = tl.div_rn(tl.maximum(tl.max(largest, 0), LEAST), STEPS)
    if row < rows:
        tl.store(scales + row, scale)
    for start in range(0, inputs, BLOCK):
        inside = start + lane < inputs
        value = tl.load(x + row * inputs + start + lane, inside & (row < rows), 0.0).to(tl.float32)
        value = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + scale)
        if INTEGER:
            value = (value + 12582912.0) - 12582912.0
            value = tl.minimum(tl.maximum(value, -128.0), 127.0)
        else:
            value = tl.minimum(tl.maximum(value, -STEPS), STEPS)
        tl.store(codes + row * inputs + start + lane, value.to(codes.dtype.element_ty), inside)


@triton.jit
def quantize_groups_kernel(
    x: tl.tensor,  # (rows, inputs)
    codes: tl.tensor,  # (padded, inputs) e4m3
    scales: tl.tensor,  # (inputs / SIZE, padded) fp32: rows adjacent, as both kernels that read them want
    rows: tl.int32,
    padded: tl.int32,
    inputs: tl.int32,
    STEPS: tl.constexpr,
    LEAST: tl.constexpr,
    SIZE: tl.constexpr,  # inputs that share a scale
    GROUPS: tl.constexpr,  # of them a program
) -> None:
    """fp8 codes with a scale for every group of inputs of a row, in one reading."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (k < inputs) & (row < rows)
    value = tl.load(x + row * inputs + k, inside, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(value), 1), LEAST), tl.zeros([GROUPS], tl.float32) + STEPS)
    value = tl.div_rn(value, tl.zeros([GROUPS, SIZE], tl.float32) + scale[:, None])
    value = tl.minimum(tl.maximum(value, -STEPS), STEPS)
    tl.store(codes + row * inputs + k, value.to(codes.dtype.element_ty), k < inputs)
    tl.store(scales + group.to(tl.int64) * padded + row, scale, group * SIZE < inputs)


@triton.jit
def rescale_kernel(
    sums: tl.tensor,  # (at least rows, outputs) int32 or bf16
    scales: tl.tensor,  # (rows,) fp32
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,  # (rows, outputs)
    outputs: tl.int32,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    value = tl.load(sums + row * outputs + n, inside, 0).to(tl.float32) * tl.load(scales + row)
    if SCALED:
        value *= tl.load(channels + n, inside, 0.0)
    if BIASED:
        value += tl.load(bias + n, inside, 0.0).to(tl.float32)
    tl.store(y + row * outputs + n, value.to(y.dtype.element_ty), inside)


def quantize(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, in) to codes (max(m, rows), in) and fp32 scales (m, 1); codes past m are zeros."""
    from autotune.kernels.reference import SMALLEST_AMAX

    m, inputs = x.shape
    x = x.contiguous()
    integer = number.kind == "int"
    kind = torch.int8 if integer else torch.float8_e4m3fn
    codes = torch.empty(max(m, rows), inputs, dtype=kind, device=x.device)
    scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(inputs))
    quantize_kernel[(codes.shape[0],)](
        x, codes, scales, m, inputs,
        STEPS=127.5 if integer else number.qmax, LEAST=SMALLEST_AMAX, INTEGER=integer, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return codes, scales


def quantize_groups(x: torch.Tensor, number: NumberFormat, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, in) to e4m3 codes (max(m, rows), in) and fp32 scales (in / group, max(m, rows)); codes past m are zeros."""
    from autotune.kernels.reference import SMALLEST_AMAX

    m, inputs = x.shape
    assert number.group_size is not None
    padded, groups = max(m, rows), 8
    codes = torch.empty(padded, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(inputs // number.group_size, padded, dtype=torch.float32, device=x.device)
    quantize_groups_kernel[(padded, triton.cdiv(inputs, groups * number.group_size))](
        x.contiguous(), codes, scales, m, padded, inputs,
        STEPS=number.qmax, LEAST=SMALLEST_AMAX, SIZE=number.group_size, GROUPS=groups, num_warps=4,
    )  # fmt: skip
    return codes, scales


def rescale(
    sums: torch.Tensor, scales: torch.Tensor, channels: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """bf16 sums * scales * channels + bias for sums (at least m, out), scales (m, 1), channels and bias (out,)."""
    m, outputs = scales.shape[0], sums.shape[1]
    y = torch.empty(m, outputs, dtype=torch.bfloat16, device=sums.device)
    block = 1024
    rescale_kernel[(m, triton.cdiv(outputs, block))](
        sums, scales, scales if channels is None else channels, scales if bias is None else bias, y, outputs,
        SCALED=channels is not None, BIASED=bias is not None, BLOCK=block,
    )  # fmt: skip
    return y
