"""What all Triton kernels share: where they run, how a configuration is chosen, the sum over splits of the inputs.

Triton's interpreter (`TRITON_INTERPRET=1`, set before this is imported) runs kernels on CPU tensors; it multiplies bf16
tiles as if their bits were integers, so `product` widens them there.

Outputs past the end are masked, not led to a column that exists: adjacent outputs are loaded 16 bytes at a time, and
copied ahead into shared memory, only where the compiler sees that their addresses are adjacent.

A configuration is timed on the first call of a shape and kept for the process. A call that is being captured into a
CUDA graph cannot time anything and takes the first; the profiler and the runtime call once before they capture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from autotune.kernels.scratch import scratch
from autotune.kernels.spec import GroupWeight, Packed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_FUSED_ROWS = 64  # beyond, weight-only kernels unpack to a scratch matrix and leave the product to cuBLAS
UNPACK_BLOCK = 256  # outputs that a program unpacks
_REPEATS = 5
_chosen: dict[tuple[object, ...], int] = {}


@dataclass(frozen=True)
class Config:
    """Tile of outputs, steps of inputs taken at a time, parts the inputs are split in, and how it is compiled."""

    outputs: int
    steps: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    rows: int = 16


def home() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


def pick(key: tuple[object, ...], configs: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The fastest configuration for `key`; those that do not compile or do not fit the device leave."""
    if len(configs) == 1 or INTERPRETED:
        return configs[0]
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = [_time_s(launch, config) for config in configs]
        _chosen[key] = min(range(len(times)), key=times.__getitem__)
    return configs[_chosen[key]]


def _time_s(launch: Callable[[Config], object], config: Config) -> float:
    """The fastest of a few calls; infinite for a configuration that needs more than the device has."""
    try:
        launch(config)
    except (triton.runtime.errors.TritonError, triton.compiler.errors.CompilationError, RuntimeError):
        return float("inf")
    best = float("inf")
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(config)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def tile_rows(rows: int) -> int:
    """Rows of a tile: a power of two from 16 to 64."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def tiles_that_fit(configs: Sequence[Config], rows: int, most: int) -> tuple[Config, ...]:
    """Configurations whose tile of sums is at most so large: beyond, registers spill to memory."""
    return tuple(config for config in configs if config.outputs * tile_rows(rows) <= most)


def splits_that_fit(configs: Sequence[Config], steps: int) -> tuple[Config, ...]:
    """Configurations whose splits all get work of `steps` steps; the first without a split always fits."""
    return tuple(config for config in configs if config.splits == 1 or config.splits * config.steps <= steps)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, sums: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """sums + a b; WIDE: in fp32, for the interpreter."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee" if WIDE else "tf32")


@triton.jit
def finish_kernel(
    parts: tl.tensor,  # (splits, rows, outputs) fp32
    channels: tl.tensor,  # (outputs,) fp32
    bias: tl.tensor,  # (outputs,)
    y: tl.tensor,  # (rows, outputs)
    rows: tl.int32,
    outputs: tl.int32,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row's part of the outputs: the sum over splits, times the channel's scale, plus the bias."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * rows + row) * outputs + n, inside, 0.0)
    if SCALED:
        total *= tl.load(channels + n, inside, 0.0)
    if BIASED:
        total += tl.load(bias + n, inside, 0.0).to(tl.float32)
    tl.store(y + row * outputs + n, total.to(y.dtype.element_ty), inside)


@triton.jit
def store_row(
    sums: tl.tensor,  # (BN,) fp32
    y: tl.tensor,  # (1, outputs), or parts (splits, 1, outputs) fp32
    channels: tl.tensor,
    bias: tl.tensor,
    n: tl.tensor,
    outputs: tl.int32,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
) -> None:
    """One row's sums: finished, or left as this split's part."""
    inside = n < outputs
    if SPLITS == 1:
        if SCALED:
            sums *= tl.load(channels + n, inside, 0.0)
        if BIASED:
            sums += tl.load(bias + n, inside, 0.0).to(tl.float32)
        tl.store(y + n, sums.to(y.dtype.element_ty), inside)
    else:
        tl.store(y + tl.program_id(1) * outputs + n, sums, inside)


@triton.jit
def store_tile(
    sums: tl.tensor,  # (BM, BN) fp32
    y: tl.tensor,  # (rows, outputs), or parts (splits, rows, outputs) fp32
    channels: tl.tensor,
    bias: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rows: tl.int32,
    outputs: tl.int32,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
) -> None:
    """The same for a tile of rows."""
    in_n = n < outputs
    inside = (m < rows)[:, None] & in_n[None, :]
    at = m[:, None] * outputs + n[None, :]
    if SPLITS == 1:
        if SCALED:
            sums *= tl.load(channels + n, in_n, 0.0)[None, :]
        if BIASED:
            sums += tl.load(bias + n, in_n, 0.0).to(tl.float32)[None, :]
        tl.store(y + at, sums.to(y.dtype.element_ty), inside)
    else:
        tl.store(y + tl.program_id(1) * rows * outputs + at, sums, inside)


def finish(parts: torch.Tensor, channels: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y = parts summed over splits, times channels, plus bias. In fixed order: two runs give the same bits."""
    splits, rows, outputs = parts.shape
    block = 256
    finish_kernel[(rows, triton.cdiv(outputs, block))](
        parts, parts if channels is None else channels, parts if bias is None else bias, y, rows, outputs,
        SPLITS=splits, SCALED=channels is not None, BIASED=bias is not None, BLOCK=block,
    )  # fmt: skip


def summed(
    launch: Callable[[torch.Tensor], object],
    rows: int,
    outputs: int,
    config: Config,
    channels: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """y (rows, outputs) from a kernel that writes y itself, or its splits' parts that are then added up."""
    y = torch.empty(rows, outputs, dtype=dtype, device=device)
    if config.splits == 1:
        launch(y)
        return y
    parts = torch.empty(config.splits, rows, outputs, dtype=torch.float32, device=device)
    launch(parts)
    finish(parts, channels, bias, y)
    return y


def multiply(
    functions: tuple[Any, Any],
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    packed: Packed,
    count: int,
    channels: torch.Tensor | None,
    bias: torch.Tensor | None,
    configs: Sequence[Config],
    **constants: object,
) -> torch.Tensor:
    """x W^T + b of a weight-only kernel for few rows, in the configuration that is fastest for the shape.

    Args:
        functions: for one row, and for a tile of rows. Both take (x, *weights, bias, y, [rows,] outputs, count).
        count: steps of the inputs, in what configurations count them in.
        channels: scales of the outputs, where the function leaves them to the end.
        constants: what the functions want besides tiles, splits and stages.
    """
    rows, outputs = x.shape[0], packed.out_features
    x, given = x.contiguous(), weights[-1] if bias is None else bias

    def launch(config: Config) -> torch.Tensor:
        common = {**constants, "BIASED": bias is not None, "SPLITS": config.splits, "BN": config.outputs}
        common |= {"BK": config.steps, "num_warps": config.warps, "num_stages": config.stages}
        grid = (triton.cdiv(outputs, config.outputs), config.splits)

        def kernel(y: torch.Tensor) -> None:
            if rows == 1:
                functions[0][grid](x, *weights, given, y, outputs, count, STAGES=config.stages, **common)
            else:
                sizes = {"BM": tile_rows(rows), "WIDE": INTERPRETED, **common}
                functions[1][grid](x, *weights, given, y, rows, outputs, count, **sizes)

        return summed(kernel, rows, outputs, config, channels, bias, packed.dtype, x.device)

    kind = (functions[0], weights[0].dtype, *sorted(constants.items()))
    key = (*kind, outputs, count, 1 if rows == 1 else tile_rows(rows), x.device)
    return launch(pick(key, splits_that_fit(configs, count), launch))


def multiply_tiles(
    function: Any,
    codes: torch.Tensor,
    scales: torch.Tensor,
    packed: Packed,
    configs: Sequence[Config],
    **constants: object,
) -> torch.Tensor:
    """x W^T + b of quantized activations in one product, for any number of rows, in the fastest configuration.

    Args:
        function: takes (codes, weights, scales of activations, scales of weights, bias, y, rows, outputs, inputs).
        packed: of `pack_plain`'s kind: codes (out, in), their scales, the bias.
        constants: what the function wants besides tiles.
    """
    weights, own, bias = packed.data
    rows, inputs, outputs = codes.shape[0], packed.in_features, packed.out_features
    y = torch.empty(rows, outputs, dtype=packed.dtype, device=codes.device)

    def launch(config: Config) -> None:
        grid = (triton.cdiv(rows, config.rows) * triton.cdiv(outputs, config.outputs),)
        function[grid](
            codes, weights, scales, own, own if bias is None else bias, y, rows, outputs, inputs,
            BIASED=bias is not None, BM=config.rows, BN=config.outputs, BK=config.steps,
            num_warps=config.warps, num_stages=config.stages, **constants,
        )  # fmt: skip

    key = (function, outputs, inputs, triton.next_power_of_2(rows), codes.device)
    launch(pick(key, configs, launch))
    return y


def pack_plain(weight: GroupWeight, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Packed:
    """Codes (out, in) as they are, scales as given, and the bias: on the device."""
    device = home()
    held, own = codes.contiguous().to(device), scales.contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return Packed(codes.shape[0], codes.shape[1], dtype, held_bytes(held, own, bias), (held, own, bias))


def through_dense(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b for many rows, with W^T (in, out) unpacked."""
    return x @ dense if bias is None else torch.addmm(bias, x, dense)


def transposed_scratch(packed: Packed, device: torch.device) -> torch.Tensor:
    """Where W^T (in, out) is unpacked to: shared by all layers."""
    shape = (packed.in_features, packed.out_features)
    return scratch(shape[0] * shape[1], packed.dtype, device, "weight").view(shape)


def held_bytes(*parts: Any) -> int:
    return sum(part.nbytes for part in parts if part is not None)
