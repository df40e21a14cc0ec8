"""2:4 weights of 4 bits with a scale for every 128 inputs: 3.125 bits a weight, the fewest of any scheme here.

Eight quads of four inputs take three int32: `first` and `second` survivors as nibbles, and a nibble with two bits set
where they were. Four masks of whole nibbles turn them into the quads' elements 0 to 3, eight nibbles each, zeros where
pruned (about twenty integer instructions for 32 weights); from there on it is `w4a16`. Nibble s of the r-th word of a
scale group is its quad 4 s + r. Beyond 64 rows W^T is unpacked into a scratch matrix for cuBLAS. Not yet run on a card.
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
    tiles_that_fit,
    transposed_scratch,
)
from autotune.kernels.triton.survivors import survivors

# `steps` counts words of 32 inputs; a scale group has four.
ONE_ROW = (
    Config(64, 16, warps=4, stages=3),
    Config(32, 32, warps=4, stages=3),
    Config(64, 32, warps=8, stages=2),
    Config(64, 16, 4, warps=4, stages=2),
    Config(128, 8, 8, warps=4, stages=2),
)
FEW_ROWS = (
    Config(32, 16, warps=4, stages=3),
    Config(64, 16, warps=4, stages=2),
    Config(32, 16, 4, warps=4, stages=3),
)
MOST_SUMS = 2048  # of a tile, for few rows


@triton.jit
def expand(first: tl.tensor, second: tl.tensor, places: tl.tensor, j: tl.constexpr) -> tl.tensor:
    """Element j of eight quads as nibbles, 0 where pruned."""
    mine = (places >> j) & 0x11111111
    mine = (mine << 4) - mine
    if j == 0:
        return first & mine
    if j == 3:
        return second & mine
    if j == 1:  # the second survivor if element 0 is one
        edge = places & 0x11111111
        edge = (edge << 4) - edge
        return (first ^ ((first ^ second) & edge)) & mine
    edge = (places >> 3) & 0x11111111  # the first survivor if element 3 is one
    edge = (edge << 4) - edge
    return (second ^ ((first ^ second) & edge)) & mine


@triton.jit
def one_row_kernel(
    x: tl.tensor,  # (inputs,) bf16
    first: tl.tensor,  # (inputs / 32, outputs) int32
    second: tl.tensor,
    places: tl.tensor,
    scales: tl.tensor,  # (inputs / 128, outputs) bf16
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    outputs: tl.int32,
    count: tl.int32,  # words down a column
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
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
        at = word[:, None] * outputs + n[None, :]
        a = tl.load(first + at, held, 0, eviction_policy="evict_first")
        b = tl.load(second + at, held, 0, eviction_policy="evict_first")
        where = tl.load(places + at, held, 0, eviction_policy="evict_first")
        scale = tl.load(scales + (word // 4)[:, None] * outputs + n[None, :], held, 0.0)
        x_at = x + word // 4 * 128 + word % 4 * 4
        part = tl.zeros([BK, BN], tl.float32)
        total = tl.zeros([BK], tl.float32)
        for j in tl.static_range(4):
            packed = expand(a, b, where, j)
            for s in tl.static_range(8):
                value = tl.load(x_at + s * 16 + j, inside, 0.0).to(tl.float32)
                bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
                part += ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) * value[:, None]
                total += value
        sums += (part - 136.0 * total[:, None]) * scale.to(tl.float32)
    store_row(tl.sum(sums, 0), y, scales, bias, n, outputs, SPLITS, False, BIASED)


@triton.jit
def few_rows_kernel(
    x: tl.tensor,  # (rows, inputs) bf16
    first: tl.tensor,
    second: tl.tensor,
    places: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    count: tl.int32,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """A tile spans several scale groups: scales go on the weights, which then round to bf16."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m, lane = tl.arange(0, BM), tl.arange(0, BK)
    inputs = count * 32
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(tl.program_id(1) * BK, count, SPLITS * BK):
        word = start + lane
        inside = word < count
        held = inside[:, None] & (n < outputs)[None, :]
        at = word[:, None] * outputs + n[None, :]
        a = tl.load(first + at, held, 0, eviction_policy="evict_first")
        b = tl.load(second + at, held, 0, eviction_policy="evict_first")
        where = tl.load(places + at, held, 0, eviction_policy="evict_first")
        scale = tl.load(scales + (word // 4)[:, None] * outputs + n[None, :], held, 0.0).to(tl.float32)
        x_at = x + m[:, None] * inputs + (word // 4 * 128 + word % 4 * 4)[None, :]
        valid = (m < rows)[:, None] & inside[None, :]
        for j in tl.static_range(4):
            packed = expand(a, b, where, j)
            for s in tl.static_range(8):
                bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
                code = ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) - 136.0
                activations = tl.load(x_at + s * 16 + j, valid, 0.0)
                sums = product(activations, (code * scale).to(tl.bfloat16), sums, WIDE)
    store_tile(sums, y, scales, bias, m, n, rows, outputs, SPLITS, False, BIASED)


@triton.jit
def unpack_kernel(
    first: tl.tensor,
    second: tl.tensor,
    places: tl.tensor,
    scales: tl.tensor,
    dense: tl.tensor,  # (inputs, outputs) bf16
    outputs: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    word = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    at = word.to(tl.int64) * outputs + n
    a, b = tl.load(first + at, inside, 0), tl.load(second + at, inside, 0)
    where = tl.load(places + at, inside, 0)
    scale = tl.load(scales + (word // 4).to(tl.int64) * outputs + n, inside, 0.0).to(tl.float32)
    for j in tl.static_range(4):
        packed = expand(a, b, where, j)
        for s in tl.static_range(8):
            bits = packed << (16 - 4 * s) if s < 4 else packed >> (4 * s - 16)
            code = ((bits & 0x000F0000) ^ 0x43080000).to(tl.float32, bitcast=True) - 136.0
            k = word // 4 * 128 + word % 4 * 4 + s * 16 + j
            tl.store(dense + k.to(tl.int64) * outputs + n, (code * scale).to(tl.bfloat16), inside)


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = home()
    outputs, inputs = codes.shape
    kept, places = survivors(codes.to(device))  # (out, in / 4, 2)
    bits = (1 << places[..., 0]) | (1 << places[..., 1])
    words = tuple(_words(nibbles) for nibbles in (kept[..., 0], kept[..., 1], bits))
    held = scales.t().contiguous().to(device, torch.bfloat16)  # exact: canonical scales have 8 significant bits
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    data = (*words, held, bias)
    return Packed(outputs, inputs, dtype, held_bytes(*data), data)


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """(out, quads) to int32 (quads / 8, out): nibble s of word r is quad 4 s + r of its 32."""
    grouped = nibbles.view(nibbles.shape[0], -1, 8, 4).int() & 15  # (out, groups, s, r)
    words = torch.zeros(grouped.shape[0], grouped.shape[1], 4, dtype=torch.int32, device=nibbles.device)
    for s in range(8):
        words |= grouped[:, :, s] << (4 * s)
    return words.view(nibbles.shape[0], -1).t().contiguous()


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    *weights, bias = packed.data
    if x.shape[0] > MOST_FUSED_ROWS:
        return through_dense(x, unpacked(packed), bias)
    kinds, chosen = (one_row_kernel, few_rows_kernel), configs(x.shape[0])
    return multiply(kinds, x, tuple(weights), packed, packed.in_features // 32, None, bias, chosen)


def configs(rows: int) -> tuple[Config, ...]:
    return ONE_ROW if rows == 1 else tiles_that_fit(FEW_ROWS, rows, MOST_SUMS)


def unpacked(packed: Packed) -> torch.Tensor:
    """W^T (in, out) in the scratch buffer."""
    first, second, places, scales, _ = packed.data
    dense = transposed_scratch(packed, first.device)
    grid = (first.shape[0], triton.cdiv(packed.out_features, UNPACK_BLOCK))
    unpack_kernel[grid](first, second, places, scales, dense, packed.out_features, BLOCK=UNPACK_BLOCK)
    return dense
