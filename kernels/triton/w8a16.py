"""int8 weights, activations left alone: decode reads half the bytes of bf16 and multiplies in fp32 or on bf16 tiles.

One row multiplies and adds in fp32, without tensor cores; up to 64 rows go through bf16 tiles, into which codes convert
exactly; more rows unpack W^T into a scratch matrix for cuBLAS. One packed copy, the plain codes (out, in), serves all.
Not yet run on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autotune.kernels.reference import canonical
from autotune.kernels.scratch import scratch
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.triton.launch import (
    INTERPRETED,
    MOST_FUSED_ROWS,
    Config,
    held_bytes,
    home,
    pick,
    product,
    splits_that_fit,
    store_row,
    store_tile,
    summed,
    tile_rows,
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
def one_row_kernel(
    x: tl.tensor,  # (inputs,) bf16
    w: tl.tensor,  # (outputs, inputs) int8
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
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
        sums += codes.to(tl.float32) * values[None, :]
    store_row(tl.sum(sums, 1), y, channels, bias, n, outputs, SPLITS, True, BIASED)


@triton.jit
def few_rows_kernel(
    x: tl.tensor,  # (rows, inputs) bf16
    w: tl.tensor,  # (outputs, inputs) int8
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    BIASED: tl.constexpr,
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
        sums = product(a, b.to(tl.float32).to(tl.bfloat16), sums, WIDE)
    store_tile(sums, y, channels, bias, m, n, rows, outputs, SPLITS, True, BIASED)


@triton.jit
def unpack_kernel(
    w: tl.tensor,  # (outputs, inputs) int8
    channels: tl.tensor,  # (outputs,) fp32
    dense: tl.tensor,  # (outputs, inputs) bf16
    inputs: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < inputs
    value = tl.load(w + n * inputs + k, inside, 0).to(tl.float32) * tl.load(channels + n)
    tl.store(dense + n * inputs + k, value.to(tl.bfloat16), inside)


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    device = home()
    held = codes.contiguous().to(device)
    channels = scales.flatten().contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return Packed(codes.shape[0], codes.shape[1], dtype, held_bytes(held, channels, bias), (held, channels, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    w, channels, bias = packed.data
    rows, inputs, outputs = x.shape[0], packed.in_features, packed.out_features
    x = x.contiguous()
    if rows > MOST_FUSED_ROWS:
        return torch.nn.functional.linear(x, unpacked(packed), bias)
    given = channels if bias is None else bias

    def launch(config: Config) -> torch.Tensor:
        common = {"BIASED": bias is not None, "SPLITS": config.splits, "BN": config.outputs, "BK": config.steps}
        common |= {"num_warps": config.warps, "num_stages": config.stages}
        grid = (triton.cdiv(outputs, config.outputs), config.splits)

        def kernel(y: torch.Tensor) -> None:
            if rows == 1:
                one_row_kernel[grid](x, w, channels, given, y, outputs, inputs, STAGES=config.stages, **common)
            else:
                few_rows_kernel[grid](
                    x, w, channels, given, y, rows, outputs, inputs, BM=tile_rows(rows), WIDE=INTERPRETED, **common
                )

        return summed(kernel, rows, outputs, config, channels, bias, packed.dtype, x.device)

    fitting = splits_that_fit(configs(rows), inputs)
    key = ("w8a16", outputs, inputs, 1 if rows == 1 else tile_rows(rows), x.device)
    return launch(pick(key, fitting, launch))


def configs(rows: int) -> tuple[Config, ...]:
    return ONE_ROW if rows == 1 else FEW_ROWS


def unpacked(packed: Packed) -> torch.Tensor:
    """W (out, in) in the scratch buffer."""
    w, channels, _ = packed.data
    dense = scratch(w.numel(), packed.dtype, w.device, "weight").view(w.shape)
    block = 1024
    unpack_kernel[(w.shape[0], triton.cdiv(w.shape[1], block))](w, channels, dense, w.shape[1], BLOCK=block)
    return dense
