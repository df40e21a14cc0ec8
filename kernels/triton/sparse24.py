"""2:4 weights for decode, bf16 (9 bits a weight) or int8 (5): survivors and positions, expanded in registers.

Inputs in quads of four: quad s R + r, for R = inputs / 32, keeps its two survivors at (s, r) of `first` and `second`
(8, R, outputs), and where they were in nibble s of `positions` (R, outputs) int32, two bits each. One row picks, for
each survivor, which of the quad's four activations it meets: half the multiplications. More rows expand each quad's
four elements, zeros included, for tensor-core tiles; beyond 64, W^T is unpacked into a scratch matrix for cuBLAS.
Triton cannot express the sparse tensor-core instruction. Not yet run on a card.
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

# `steps` counts words of 32 inputs.
ONE_ROW = (
    Config(128, 8, 8, warps=4, stages=2),
    Config(256, 4, 16, warps=4, stages=2),
    Config(128, 16, 4, warps=8, stages=2),
    Config(64, 16, warps=8, stages=2),
)
FEW_ROWS = (
    Config(32, 16, warps=4, stages=2),
    Config(64, 16, warps=4, stages=2),
    Config(32, 16, 4, warps=4, stages=2),
)
MOST_SUMS = 2048  # of a tile, for few rows


@triton.jit
def one_row_kernel(
    x: tl.tensor,  # (inputs,) bf16
    first: tl.tensor,  # (8, R, outputs) bf16 or int8
    second: tl.tensor,
    positions: tl.tensor,  # (R, outputs) int32
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    outputs: tl.int32,
    count: tl.int32,  # R
    SCALED: tl.constexpr,
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
        place = tl.load(positions + word[:, None] * outputs + n[None, :], held, 0)
        for s in tl.static_range(8):
            w_at = (s * count + word).to(tl.int64)[:, None] * outputs + n[None, :]
            a = tl.load(first + w_at, held, 0.0, eviction_policy="evict_first").to(tl.float32)
            b = tl.load(second + w_at, held, 0.0, eviction_policy="evict_first").to(tl.float32)
            x_at = x + (s * count + word) * 4
            x0 = tl.load(x_at, inside, 0.0).to(tl.float32)[:, None]
            x1 = tl.load(x_at + 1, inside, 0.0).to(tl.float32)[:, None]
            x2 = tl.load(x_at + 2, inside, 0.0).to(tl.float32)[:, None]
            x3 = tl.load(x_at + 3, inside, 0.0).to(tl.float32)[:, None]
            low, high = (place >> (4 * s)) & 3, (place >> (4 * s + 2)) & 3
            sums += a * tl.where(low == 0, x0, tl.where(low == 1, x1, x2))  # the first survivor is never the last input
            sums += b * tl.where(high == 3, x3, tl.where(high == 2, x2, x1))
    store_row(tl.sum(sums, 0), y, channels, bias, n, outputs, SPLITS, SCALED, BIASED)


@triton.jit
def few_rows_kernel(
    x: tl.tensor,  # (rows, inputs) bf16
    first: tl.tensor,
    second: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    count: tl.int32,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    # Beside 64 rows of activations no registers are left for wide loads: there the compiler is kept from them.
    at = n if BM < 64 else tl.where(n < outputs, n, 0)
    m, lane = tl.arange(0, BM), tl.arange(0, BK)
    inputs = count * 32
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(tl.program_id(1) * BK, count, SPLITS * BK):
        word = start + lane
        inside = word < count
        valid, held = (m < rows)[:, None] & inside[None, :], inside[:, None] & (at < outputs)[None, :]
        place = tl.load(positions + word[:, None] * outputs + at[None, :], held, 0)
        for s in tl.static_range(8):
            w_at = (s * count + word).to(tl.int64)[:, None] * outputs + at[None, :]
            a = tl.load(first + w_at, held, 0.0, eviction_policy="evict_first").to(tl.float32)
            b = tl.load(second + w_at, held, 0.0, eviction_policy="evict_first").to(tl.float32)
            low, high = (place >> (4 * s)) & 3, (place >> (4 * s + 2)) & 3
            x_at = x + m[:, None] * inputs + ((s * count + word) * 4)[None, :]
            for j in tl.static_range(4):
                element = tl.where(low == j, a, 0.0) + tl.where(high == j, b, 0.0)
                sums = product(tl.load(x_at + j, valid, 0.0), element.to(tl.bfloat16), sums, WIDE)
    store_tile(sums, y, channels, bias, m, n, rows, outputs, SPLITS, SCALED, BIASED)


@triton.jit
def unpack_kernel(
    first: tl.tensor,
    second: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    dense: tl.tensor,  # (inputs, outputs) bf16
    outputs: tl.int32,
    count: tl.int32,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    word = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    place = tl.load(positions + word.to(tl.int64) * outputs + n, inside, 0)
    scale = tl.load(channels + n, inside, 0.0) if SCALED else tl.full([BLOCK], 1.0, tl.float32)
    for s in tl.static_range(8):
        at = (s * count + word).to(tl.int64) * outputs + n
        a = tl.load(first + at, inside, 0.0).to(tl.float32) * scale
        b = tl.load(second + at, inside, 0.0).to(tl.float32) * scale
        low, high = (place >> (4 * s)) & 3, (place >> (4 * s + 2)) & 3
        for j in tl.static_range(4):
            element = tl.where(low == j, a, 0.0) + tl.where(high == j, b, 0.0)
            goal = dense + ((s * count + word) * 4 + j).to(tl.int64) * outputs + n
            tl.store(goal, element.to(tl.bfloat16), inside)


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    device = home()
    if weight.dense is not None:
        values, channels = weight.dense.to(device, dtype), None
    else:
        codes, scales = canonical(weight)
        values, channels = codes.to(device), scales.flatten().contiguous().to(device)
    outputs, inputs = values.shape
    kept, places = survivors(values)  # (out, in / 4, 2)
    words = inputs // 32
    arranged = kept.view(outputs, 8, words, 2).permute(3, 1, 2, 0).contiguous()  # (2, 8, words, out)
    pairs = (places[..., 0] | places[..., 1] << 2).view(outputs, 8, words).int()
    positions = torch.zeros(outputs, words, dtype=torch.int32, device=device)
    for s in range(8):
        positions |= pairs[:, s] << (4 * s)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    data = (arranged[0], arranged[1], positions.t().contiguous(), channels, bias)
    return Packed(outputs, inputs, dtype, held_bytes(*data), data)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    first, second, positions, channels, bias = packed.data
    if x.shape[0] > MOST_FUSED_ROWS:
        return through_dense(x, unpacked(packed), bias)
    weights = (first, second, positions, positions if channels is None else channels)
    kinds, chosen, scaled = (one_row_kernel, few_rows_kernel), configs(x.shape[0]), channels is not None
    return multiply(kinds, x, weights, packed, positions.shape[0], channels, bias, chosen, SCALED=scaled)


def configs(rows: int) -> tuple[Config, ...]:
    return ONE_ROW if rows == 1 else tiles_that_fit(FEW_ROWS, rows, MOST_SUMS)


def unpacked(packed: Packed) -> torch.Tensor:
    """W^T (in, out) in the scratch buffer."""
    first, second, positions, channels, _ = packed.data
    dense, count = transposed_scratch(packed, first.device), positions.shape[0]
    unpack_kernel[(count, triton.cdiv(packed.out_features, UNPACK_BLOCK))](
        first, second, positions, positions if channels is None else channels, dense, packed.out_features, count,
        SCALED=channels is not None, BLOCK=UNPACK_BLOCK,
    )  # fmt: skip
    return dense
