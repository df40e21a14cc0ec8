"""int8 weights and activations in one Triton product with the rescaling in its epilogue: no second pass over the sums.

Codes stay (out, in), so both operands of the tensor cores run along the inputs, as 8-bit wgmma wants them. One kernel
serves every number of rows: few rows take narrow tiles, so that enough programs read the weights at once. Not yet run
on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.triton.activations import quantize
from autotune.kernels.triton.launch import Config, multiply_tiles, pack_plain
from autotune.search_space.schemes import NumberFormat

_INT8 = NumberFormat("int", 8)
NARROW = (
    Config(32, 256, rows=16, warps=4, stages=5),
    Config(16, 512, rows=16, warps=4, stages=4),
    Config(64, 256, rows=16, warps=4, stages=4),
    Config(64, 128, rows=16, warps=4, stages=5),
)
MIDDLE = (
    Config(64, 128, rows=64, warps=4, stages=5),
    Config(128, 128, rows=64, warps=4, stages=4),
    Config(32, 256, rows=64, warps=4, stages=4),
)
WIDE = (
    Config(256, 128, rows=128, warps=8, stages=3),
    Config(128, 128, rows=128, warps=8, stages=4),
    Config(128, 128, rows=128, warps=4, stages=4),
    Config(128, 64, rows=128, warps=4, stages=5),
    Config(128, 128, rows=64, warps=4, stages=4),
)


@triton.jit
def multiply_kernel(
    x: tl.tensor,  # (rows, inputs) int8
    w: tl.tensor,  # (outputs, inputs) int8
    scales: tl.tensor,  # (rows,) fp32
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,  # (rows, outputs) bf16
    rows: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """One tile of y; programs of eight neighbouring row tiles share the weights they read from L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(outputs, BN)
    number = tl.program_id(0)
    first = number // (8 * tiles_n) * 8
    band = min(tiles_m - first, 8)
    m = (first + number % (8 * tiles_n) % band) * BM + tl.arange(0, BM)
    n = (number % (8 * tiles_n) // band) * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    in_m, in_n = m < rows, n < outputs
    x_at = x + tl.where(in_m, m, 0).to(tl.int64)[:, None] * inputs + lane[None, :]
    w_at = w + tl.where(in_n, n, 0).to(tl.int64)[None, :] * inputs + lane[:, None]
    sums = tl.zeros([BM, BN], tl.int32)
    for start in range(0, inputs, BK):
        left = inputs - start
        a = tl.load(x_at, lane[None, :] < left, 0)
        b = tl.load(w_at, lane[:, None] < left, 0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    value = sums.to(tl.float32) * tl.load(scales + m, in_m, 0.0)[:, None] * tl.load(channels + n, in_n, 0.0)[None, :]
    if BIASED:
        value += tl.load(bias + n, in_n, 0.0).to(tl.float32)[None, :]
    at = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, value.to(y.dtype.element_ty), in_m[:, None] & in_n[None, :])


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    return pack_plain(weight, codes, scales.flatten(), dtype)


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize(x, _INT8)
    return multiply_tiles(multiply_kernel, codes, scales, packed, configs(x.shape[0]))


def configs(rows: int) -> tuple[Config, ...]:
    return NARROW if rows <= 16 else MIDDLE if rows <= 64 else WIDE
