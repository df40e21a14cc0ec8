"""bf16 weights, dense or 2:4 (9 bits a weight, half the multiplications), on CPUs with AVX-512 bf16 instructions.

The layouts are described in `bf16.cpp`, which is compiled by `build` on first use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from autotune.kernels.cpu import call
from autotune.kernels.cpu.memory import on_large_pages, padded_bias
from autotune.kernels.packing import compress_24, positions_24
from autotune.kernels.spec import Form, GroupWeight, Packed, dense_of
from autotune.search_space.schemes import scheme

LANES, STEP = 16, 32  # outputs in a block, inputs in a step

linear = call.NativeLinear("bf16", "autotune_bf16")
run, native, tensors = linear.run, linear.native, call.tensors


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
    return bind((data, bias), Form(weight.scheme, out_features, in_features, dtype))


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    blocks, steps = -(-form.out_features // LANES), -(-form.in_features // STEP)
    sparse = scheme(form.scheme).sparsity == "2:4"
    return call.described(_Linear, held, form, steps * STEP, blocks, steps, sparse)


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
