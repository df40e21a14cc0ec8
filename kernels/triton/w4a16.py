"""int4 weights with a scale per group of inputs, activations left alone: decode reads a quarter of bf16's bytes.

Eight codes are the nibbles of one int32, words (inputs / 8, outputs) with outputs contiguous. Nibble s of the r-th
word of a group of g inputs is input s g/8 + r of it, so that a tile of words meets contiguous activations. A nibble
becomes a number without a conversion: put at bit 16 and combined with 0x43080000 it is the fp32 (at bit 0 with 0x4308
the bf16) 136 + code, exactly; 136 times the sum of the activations is taken off once a word (or a group). The idea of
biased exponents is Marlin's and FasterTransformer's. More than 64 rows unpack W^T into a scratch matrix. Not yet run on
a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.triton.launch import (
    MOST_FUSED_ROWS,
    UNPACK_BLOCK,
    Config,
    held_bytes,
    home,
    multiply,
    product,
    store_row,
    store_tile,
    through_dense,
    transposed_scratch,
)

# `steps` counts words of 8 inputs.
ONE_ROW = (
    Config(64, 32, warps=4, stages=4),
    Config(32, 64, warps=4, stages=4),
    Config(64, 64, warps=8, stages=3),
    Config(128, 32, warps=8, stages=3),
    Config(64, 32, 4, warps=4, stages=3),
    Config(128, 16, 8, warps=4, stages=3),
)
FEW_ROWS = (
    Config(64, 16, warps=4, stages=4),
    Config(64, 32, warps=4, stages=3),
    Config(128, 16, warps=4, stages=4),
    Config(64, 16, 4, warps=4, stages=4),
)


@triton.jit
def one_row_kernel(
    x: tl.tensor,  # (inputs,) bf16
    words: tl.tensor,  # (inputs / 8, outputs) int32
    scales: tl.tensor,  # (inputs / group, outputs) bf16
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    outputs: tl.int32,
    count: tl.int32,  # words down a column
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EIGHTH: tl.constexpr,  # words of a group
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    sums = tl.zeros([BK, BN], tl.float32)
    for start in tl.range(tl.program_id(1) * BK, count, SPLITS * BK, num_stages=STAGES):
        word = start + lane
        inside = word < count
        held = inside[:, None] & (n < outputs)[None, :]
        packed = tl.load(words + word[:, None] * outputs + n[None, :], held, 0, eviction_policy="evict_first")
        scale = tl.load(scales + (word // EIGHTH)[:, None] * outputs + n[None, :], held, 0.0)
        x_at = x + word // EIGHTH * (8 * EIGHTH) + word % EIGHTH
        part = tl.zeros([BK, BN], tl.float32)
        total = tl.zeros([BK], tl.float32)
        for s in tl.static_range(8):
            value = tl.load(x_at + s * EIGHTH, inside, 0.0).to(tl.float32)
            bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
            part += ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) * value[:, None]
            total += value
        sums += (part - 136.0 * total[:, None]) * scale.to(tl.float32)
    store_row(tl.sum(sums, 0), y, scales, bias, n, outputs, SPLITS, False, BIASED)


@triton.jit
def few_rows_kernel(
    x: tl.tensor,  # (rows, inputs) bf16
    words: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    count: tl.int32,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    EIGHTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Where a tile is one group, its scale goes on the sums; else it goes on the weights, which then round to bf16."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m, lane = tl.arange(0, BM), tl.arange(0, BK)
    in_m = m < rows
    inputs = count * 8
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(tl.program_id(1) * BK, count, SPLITS * BK):
        word = start + lane
        inside = word < count
        held = inside[:, None] & (n < outputs)[None, :]
        packed = tl.load(words + word[:, None] * outputs + n[None, :], held, 0, eviction_policy="evict_first")
        x_at = x + m[:, None] * inputs + (word // EIGHTH * (8 * EIGHTH) + word % EIGHTH)[None, :]
        valid = in_m[:, None] & inside[None, :]
        if BK == EIGHTH:
            part = tl.zeros([BM, BN], tl.float32)
            total = tl.zeros([BM], tl.float32)
            for s in tl.static_range(8):
                a = tl.load(x_at + s * EIGHTH, valid, 0.0)
                b = (((packed >> (4 * s)) & 0xF) ^ 0x4308).to(tl.int16).to(tl.bfloat16, bitcast=True)
                part = product(a, b, part, WIDE)
                total += tl.sum(a.to(tl.float32), 1)
            scale = tl.load(scales + start // EIGHTH * outputs + n, n < outputs, 0.0).to(tl.float32)
            sums += (part - 136.0 * total[:, None]) * scale[None, :]
        else:
            scale = tl.load(scales + (word // EIGHTH)[:, None] * outputs + n[None, :], held, 0.0)
            for s in tl.static_range(8):
                a = tl.load(x_at + s * EIGHTH, valid, 0.0)
                bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
                code = ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) - 136.0
                sums = product(a, (code * scale.to(tl.float32)).to(tl.bfloat16), sums, WIDE)
    store_tile(sums, y, scales, bias, m, n, rows, outputs, SPLITS, False, BIASED)


@triton.jit
def unpack_kernel(
    words: tl.tensor,
    scales: tl.tensor,
    dense: tl.tensor,  # (inputs, outputs) bf16
    outputs: tl.int32,
    EIGHTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    word = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    packed = tl.load(words + word.to(tl.int64) * outputs + n, inside, 0)
    scale = tl.load(scales + (word // EIGHTH).to(tl.int64) * outputs + n, inside, 0.0).to(tl.float32)
    first = word // EIGHTH * (8 * EIGHTH) + word % EIGHTH
    for s in tl.static_range(8):
        bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
        code = ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) - 136.0
        at = dense + (first + s * EIGHTH).to(tl.int64) * outputs + n
        tl.store(at, (code * scale).to(tl.bfloat16), inside)


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = home()
    eighth = codes.shape[1] // scales.shape[1] // 8
    words = nibbles_of(codes.to(device), eighth)
    held = scales.t().contiguous().to(device, torch.bfloat16)  # exact: canonical scales have 8 significant bits
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    size = held_bytes(words, held, bias)
    return Packed(codes.shape[0], codes.shape[1], dtype, size, (words, held, bias))


def nibbles_of(codes: torch.Tensor, eighth: int) -> torch.Tensor:
    """int8 codes (out, in) to int32 words (in / 8, out), nibble s of word r from input s eighth + r of its group."""
    outputs, inputs = codes.shape
    grouped = codes.view(outputs, inputs // (8 * eighth), 8, eighth)
    words = torch.zeros(outputs, grouped.shape[1], eighth, dtype=torch.int32, device=codes.device)
    for s in range(8):
        words |= (grouped[:, :, s].int() & 15) << (4 * s)
    return words.view(outputs, -1).t().contiguous()


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    words, scales, bias = packed.data
    eighth = words.shape[0] // scales.shape[0]
    if x.shape[0] > MOST_FUSED_ROWS:
        return through_dense(x, unpacked(packed), bias)
    kinds, chosen = (one_row_kernel, few_rows_kernel), configs(x.shape[0])
    return multiply(kinds, x, (words, scales), packed, words.shape[0], None, bias, chosen, EIGHTH=eighth)


def configs(rows: int) -> tuple[Config, ...]:
    """More than 32 rows leave registers for 16 words at a time, not for 32."""
    few = FEW_ROWS if rows <= 32 else tuple(config for config in FEW_ROWS if config.steps <= 16)
    return ONE_ROW if rows == 1 else few


def unpacked(packed: Packed) -> torch.Tensor:
    """W^T (in, out) in the scratch buffer."""
    words, scales, _ = packed.data
    eighth = words.shape[0] // scales.shape[0]
    dense = transposed_scratch(packed, words.device)
    grid = (words.shape[0], triton.cdiv(packed.out_features, UNPACK_BLOCK))
    unpack_kernel[grid](words, scales, dense, packed.out_features, EIGHTH=eighth, BLOCK=UNPACK_BLOCK)
    return dense
