"""bf16 weights, dense or 2:4 (9 bits a weight, half the multiplications), on CPUs with AVX-512 bf16 instructions.

The layouts are described in `bf16.cpp`, which is compiled by `build` on first use.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build
from autotune.kernels.cpu.memory import on_large_pages, padded_bias
from autotune.kernels.packing import compress_24, positions_24
from autotune.kernels.spec import GroupWeight, Packed, dense_of
from autotune.search_space.schemes import scheme

LANES, STEP = 16, 32  # outputs in a block, inputs in a step


class _Linear(ctypes.Structure):
    """`Linear` of bf16.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("blocks", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("sparse", ctypes.c_int32),
    )


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    dense = dense_of(weight).to(torch.bfloat16)
    out_features, in_features = dense.shape
    blocks, steps = -(-out_features // LANES), -(-in_features // STEP)
    padded = torch.zeros(blocks * LANES, steps * STEP, dtype=torch.bfloat16)
    padded[:out_features, :in_features] = dense
    sparse = scheme(weight.scheme).sparsity == "2:4"
    data = on_large_pages(_sparse(padded) if sparse else _dense(padded))
    bias = None if weight.bias is None else padded_bias(weight.bias, blocks * LANES)
    pointer = None if bias is None else bias.data_ptr()
    linear = _Linear(data.data_ptr(), pointer, out_features, in_features, steps * STEP, blocks, steps, sparse)
    held = data.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(out_features, in_features, dtype, held, (ctypes.addressof(linear), linear, data, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    y = torch.empty(rows, packed.out_features, dtype=packed.dtype)
    if _function()(packed.data[0], x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for {rows} rows of {packed.in_features} inputs.", "Fewer rows.")
    return y


def native(packed: Packed) -> tuple[int, int]:
    """Addresses of the C function and of the packed weights' description, for native code that calls it."""
    address = ctypes.cast(_function(), ctypes.c_void_p).value
    assert address is not None
    return address, packed.data[0]


@cache
def _function() -> Any:
    call = build.library("bf16").autotune_bf16
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    call.restype = ctypes.c_int
    return call


def _dense(dense: torch.Tensor) -> torch.Tensor:
    """Padded weights as bytes: [blocks][steps][16 pairs][16 outputs][2 inputs]."""
    pairs = dense.view(dense.shape[0] // LANES, LANES, dense.shape[1] // 2, 2).transpose(1, 2)
    return pairs.contiguous().view(torch.uint8).view(-1)


def _sparse(dense: torch.Tensor) -> torch.Tensor:
    """Padded weights as bytes: [blocks][steps][8 quads][16 outputs][2 survivors] and their positions."""
    blocks, steps = dense.shape[0] // LANES, dense.shape[1] // STEP
    kept, places = compress_24(dense)
    values = kept.view(blocks, LANES, steps, 8, 2).permute(0, 2, 3, 1, 4).contiguous().view(torch.uint8)
    spots = positions_24(places, kept.shape[1]).view(blocks, LANES, steps, 8, 2).permute(0, 2, 3, 1, 4)
    low, high = (_two_bits(spots[:, :, half : half + 4]) for half in (0, 4))
    words = torch.stack([low, high], -1)  # of 16 bits: [blocks][steps][16 outputs][2 survivors]
    return torch.cat([values.view(blocks, steps, -1), words.reshape(blocks, steps, -1)], -1).view(-1)


def _two_bits(spots: torch.Tensor) -> torch.Tensor:
    """Four positions of 2 bits in a byte: (blocks, steps, 4, ...) -> (blocks, steps, ...)."""
    return spots[:, :, 0] | spots[:, :, 1] << 2 | spots[:, :, 2] << 4 | spots[:, :, 3] << 6
