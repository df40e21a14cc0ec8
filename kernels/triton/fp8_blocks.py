"""fp8 in blocks of 128 x 128 weights and 128 inputs of a token (DeepSeek-V3, arXiv 2412.19437), one Triton product.

A step takes 128 inputs: the tensor cores' sums of one block, however few bits they keep them in, are scaled and added
in fp32 outside of them. A tile's outputs lie in one block, so a step has one scale of the weights and one a row of the
activations. Codes stay (out, in). Few rows take narrow tiles, so that enough programs read the weights at once. From
compute capability 8.9 on. Not yet run on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.triton.activations import quantize_groups
from autotune.kernels.triton.launch import INTERPRETED, Config, multiply_tiles, pack_plain, product
from autotune.search_space.schemes import NumberFormat

BLOCK = 128  # of outputs and of inputs that share a scale
_FP8 = NumberFormat("float", 8, BLOCK)
NARROW = (
    Config(32, BLOCK, rows=16, warps=4, stages=4),
    Config(16, BLOCK, rows=16, warps=4, stages=5),
    Config(64, BLOCK, rows=16, warps=4, stages=4),
)
MIDDLE = (
    Config(64, BLOCK, rows=64, warps=4, stages=4),
    Config(128, BLOCK, rows=64, warps=8, stages=3),
    Config(32, BLOCK, rows=64, warps=4, stages=4),
)
WIDE = (
    Config(128, BLOCK, rows=128, warps=8, stages=3),
    Config(64, BLOCK, rows=128, warps=8, stages=3),
    Config(128, BLOCK, rows=64, warps=4, stages=3),
)


@triton.jit
def multiply_kernel(
    x: tl.tensor,  # (rows, inputs) e4m3
    w: tl.tensor,  # (outputs, inputs) e4m3
    scales: tl.tensor,  # (inputs / 128, rows) fp32
    blocks: tl.tensor,  # (outputs / 128, inputs / 128) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,  # (rows, outputs) bf16
    rows: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One tile of y; programs of eight neighbouring row tiles share the weights they read from L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(outputs, BN)
    number = tl.program_id(0)
    first = number // (8 * tiles_n) * 8
    band = min(tiles_m - first, 8)
    tile_n = number % (8 * tiles_n) // band
    m = (first + number % (8 * tiles_n) % band) * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    in_m, in_n = m < rows, n < outputs
    count = inputs // BK
    x_at = x + tl.where(in_m, m, 0).to(tl.int64)[:, None] * inputs + lane[None, :]
    w_at = w + tl.where(in_n, n, 0).to(tl.int64)[None, :] * inputs + lane[:, None]
    scale_at = scales + tl.where(in_m, m, 0)
    block_at = blocks + tile_n * BN // 128 * count
    sums = tl.zeros([BM, BN], tl.float32)
    for step in range(count):
        part = product(tl.load(x_at), tl.load(w_at), tl.zeros([BM, BN], tl.float32), WIDE)
        sums += part * (tl.load(scale_at) * tl.load(block_at + step))[:, None]
        x_at += BK
        w_at += BK
        scale_at += rows
    if BIASED:
        sums += tl.load(bias + n, in_n, 0.0).to(tl.float32)[None, :]
    at = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), in_m[:, None] & in_n[None, :])


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    return pack_plain(weight, codes, scales[::BLOCK], dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize_groups(x, _FP8)
    return multiply_tiles(multiply_kernel, codes, scales, packed, configs(x.shape[0]), WIDE=INTERPRETED)


def configs(rows: int) -> tuple[Config, ...]:
    return NARROW if rows <= 16 else MIDDLE if rows <= 64 else WIDE
