"""int8 or fp8 weights, activations left alone: decode reads half of bf16's bytes and multiplies in fp32 or bf16 tiles.

One row multiplies and adds in fp32, without tensor cores; up to 64 rows go through bf16 tiles, into which codes convert
exactly; more rows unpack W^T into a scratch matrix for cuBLAS. One packed copy, the plain codes (out, in), serves all.
e4m3 codes become numbers without an instruction for it, so that Ampere runs them too: their seven lower bits put into
those of an fp32 number make one 2^120 times too small, exact down to e4m3's subnormal numbers. Not yet run on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.kernels.reference import canonical
from autotune.kernels.scratch import scratch
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.triton.launch import (
    MOST_FUSED_ROWS,
    Config,
    multiply,
    pack_plain,
    product,
    store_row,
    store_tile,
)

ONE_ROW = (
    Config(8, 1024, warps=4, stages=3),
    Config(16, 512, warps=4, stages=3),
    Config(8, 2048, warps=8, stages=2),
    Config(16, 512, 2, warps=4, stages=3),
    Config(16, 512, 8, warps=4, stages=3),
)
FEW_ROWS = (
    Config(32, 128, warps=4, stages=5),
    Config(64, 128, warps=4, stages=4),
    Config(32, 256, warps=4, stages=4),
    Config(32, 128, 4, warps=4, stages=4),
)


@triton.jit
def number_of(codes: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """fp32 numbers of int8 codes, or of e4m3 codes read as int8."""
    if FLOAT:
        bits = codes.to(tl.int32)
        bits = ((bits & 0x7F) << 20) | (bits & -2147483648)  # the sign of a code is that of its int32
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return codes.to(tl.float32)


@triton.jit
def one_row_kernel(
    x: tl.tensor,  # (inputs,) bf16
    w: tl.tensor,  # (outputs, inputs) int8, also of e4m3 codes
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
    FLOAT: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    w_at = w + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * inputs
    sums = tl.zeros([BN, BK], tl.float32)
    for start in tl.range(tl.program_id(1) * BK, inputs, SPLITS * BK, num_stages=STAGES):
        k = start + lane
        inside = k < inputs
        values = tl.load(x + k, inside, 0.0).to(tl.float32)
        codes = tl.load(w_at + k[None, :], inside[None, :], 0, eviction_policy="evict_first")
        sums += number_of(codes, FLOAT) * values[None, :]
    store_row(tl.sum(sums, 1), y, channels, bias, n, outputs, SPLITS, True, BIASED)


@triton.jit
def few_rows_kernel(
    x: tl.tensor,  # (rows, inputs) bf16
    w: tl.tensor,
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
    FLOAT: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m, lane = tl.arange(0, BM), tl.arange(0, BK)
    w_at = w + tl.where(n < outputs, n, 0).to(tl.int64)[None, :] * inputs
    x_at = x + tl.where(m < rows, m, 0)[:, None] * inputs
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(tl.program_id(1) * BK, inputs, SPLITS * BK):
        k = start + lane
        inside = k < inputs
        a = tl.load(x_at + k[None, :], inside[None, :], 0.0)
        b = tl.load(w_at + k[:, None], inside[:, None], 0, eviction_policy="evict_first")
        sums = product(a, number_of(b, FLOAT).to(tl.bfloat16), sums, WIDE)
    store_tile(sums, y, channels, bias, m, n, rows, outputs, SPLITS, True, BIASED)


@triton.jit
def unpack_kernel(
    w: tl.tensor,
    channels: tl.tensor,  # (outputs,) fp32
    dense: tl.tensor,  # (outputs, inputs) bf16
    inputs: tl.int32,
    FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < inputs
    value = number_of(tl.load(w + n * inputs + k, inside, 0), FLOAT) * tl.load(channels + n)
    tl.store(dense + n * inputs + k, value.to(tl.bfloat16), inside)


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    return pack_plain(weight, codes, scales.flatten(), dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    w, channels, bias = packed.data
    if x.shape[0] > MOST_FUSED_ROWS:
        return torch.nn.functional.linear(x, unpacked(packed), bias)
    codes, kinds, floating = w.view(torch.int8), (one_row_kernel, few_rows_kernel), w.dtype != torch.int8
    chosen = configs(x.shape[0])
    return multiply(kinds, x, (codes, channels), packed, packed.in_features, channels, bias, chosen, FLOAT=floating)


def configs(rows: int) -> tuple[Config, ...]:
    return ONE_ROW if rows == 1 else FEW_ROWS


def unpacked(packed: Packed) -> torch.Tensor:
    """W (out, in) in the scratch buffer."""
    w, channels, _ = packed.data
    dense = scratch(w.numel(), packed.dtype, w.device, "weight").view(w.shape)
    block = 1024
    unpack_kernel[(w.shape[0], triton.cdiv(w.shape[1], block))](
        w.view(torch.int8), channels, dense, w.shape[1], FLOAT=w.dtype != torch.int8, BLOCK=block
    )
    return dense
