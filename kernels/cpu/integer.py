"""int8, int4 and 2:4 weights on integer dot products, CPUs with AVX-512 VNNI or AVX2: our own kernels, compiled here.

Schemes that quantize activations get one int8 plane per token. Schemes that leave them alone get them as 16-bit
(bf16) or 24-bit (fp32) integers in two or three int8 planes: a weight that streams from memory meets two cheap
instructions instead of a conversion to floating point. Layouts and arithmetic are described in `formats.h`,
`activations.h` and `integer.cpp`, which is compiled by `build` on first use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from autotune.errors import InputError
from autotune.kernels.cpu import call
from autotune.kernels.cpu.memory import on_large_pages, padded_bias
from autotune.kernels.packing import compress_24, positions_24
from autotune.kernels.reference import canonical
from autotune.kernels.spec import Form, GroupWeight, Packed
from autotune.search_space.schemes import Scheme, scheme

LANES, STEP = 16, 32  # outputs in a block, inputs in a step
_MOST_INPUTS = 2**16  # 255 * 127 * inputs must stay within int32
_FORMATS = {("dense", 8): 0, ("dense", 4): 1, ("2:4", 8): 2, ("2:4", 4): 3, ("dense", 3): 4, ("dense", 2): 5}

linear = call.NativeLinear("integer", "autotune_linear")
run, native, tensors = linear.run, linear.native, call.tensors


class _Linear(ctypes.Structure):
    """`Linear` of integer.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("blocks", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("steps_per_group", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
    )


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    item = scheme(weight.scheme)
    out_features, in_features = codes.shape
    if in_features > _MOST_INPUTS:
        message = f"{in_features} inputs could overflow the 32-bit sums of {item.name}."
        raise InputError("kernel.limit", message, f"Up to {_MOST_INPUTS} are safe.")
    blocks, steps = -(-out_features // LANES), -(-in_features // STEP)
    padded = torch.zeros(blocks * LANES, steps * STEP, dtype=torch.int8)
    padded[:out_features, :in_features] = codes
    data = on_large_pages(_layout(padded, item))
    lanes_first = torch.zeros(blocks * LANES, scales.shape[1])
    lanes_first[:out_features] = scales
    held = [
        data,
        _scales(lanes_first, item),
        _corrections(padded, lanes_first, item),
        None if weight.bias is None else padded_bias(weight.bias, blocks * LANES),
    ]
    return bind(held, Form(item.name, out_features, in_features, dtype))


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    item, half = scheme(form.scheme), form.dtype == torch.bfloat16
    blocks, steps = -(-form.out_features // LANES), -(-form.in_features // STEP)
    size = item.weight.group_size
    planes = 1 if item.activation else 2 if half else 3
    number = _FORMATS[item.sparsity, item.weight.bits]
    in_group = size // STEP if size else steps
    return call.described(_Linear, held, form, steps * STEP, blocks, steps, in_group, number, planes, half)


def _layout(codes: torch.Tensor, item: Scheme) -> torch.Tensor:
    """Padded codes (outputs, inputs) as bytes, [blocks][steps][bytes of a step]: see formats.h."""
    blocks, steps = codes.shape[0] // LANES, codes.shape[1] // STEP
    if item.sparsity == "dense":
        quads = codes.view(blocks, LANES, steps, 8, 4).permute(0, 2, 3, 1, 4)  # inputs by fours
        if item.weight.bits < 4:
            return _narrow(quads, item.weight.bits)
        values = quads if item.weight.bits == 8 else _nibbles(quads[:, :, 0::2], quads[:, :, 1::2])
        return values.reshape(blocks, steps, -1).contiguous().view(torch.uint8).view(-1)
    kept, places = compress_24(codes)
    chunks = kept.view(blocks, LANES, steps, 4, 4).permute(0, 2, 3, 1, 4)  # survivors by fours: eight inputs
    values = chunks if item.weight.bits == 8 else _nibbles(chunks[:, :, 0::2], chunks[:, :, 1::2])
    spots = positions_24(places, kept.shape[1]).view(blocks, LANES, steps, 4, 4).permute(0, 2, 3, 1, 4)
    packed = spots[:, :, 0] | spots[:, :, 1] << 2 | spots[:, :, 2] << 4 | spots[:, :, 3] << 6
    parts = [values.reshape(blocks, steps, -1).view(torch.uint8), packed.reshape(blocks, steps, -1)]
    return torch.cat(parts, -1).view(-1)


def _narrow(quads: torch.Tensor, bits: int) -> torch.Tensor:
    """Two or three bits of each code (blocks, steps, 8, 16, 4): the upper two by fours, then the lowest of three."""
    blocks, steps = quads.shape[:2]
    upper = (quads >> (bits - 2)).bitwise_and_(3).view(blocks, steps, 2, 4, LANES, 4)
    parts = [upper[:, :, :, 0] << 6 | upper[:, :, :, 1] << 4 | upper[:, :, :, 2] << 2 | upper[:, :, :, 3]]
    if bits == 3:
        places = torch.arange(8, dtype=torch.int8).view(8, 1, 1)
        parts.append(((quads & 1) << places).sum(2, dtype=torch.int8))
    return torch.cat([part.reshape(blocks, steps, -1) for part in parts], -1).contiguous().view(torch.uint8).view(-1)


def _nibbles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (low & 15) | (high << 4)


def _scales(scales: torch.Tensor, item: Scheme) -> torch.Tensor:
    """bf16 [blocks][groups][16]; codes of fewer bits stay at the top of their bytes in the kernel."""
    wide = scales / 2.0 ** (8 - item.weight.bits)
    return wide.view(-1, LANES, scales.shape[1]).transpose(1, 2).to(torch.bfloat16).contiguous()


def _corrections(codes: torch.Tensor, scales: torch.Tensor, item: Scheme) -> torch.Tensor:
    """128 times the sums of the weights: what activations stored plus 128 add to every output."""
    sums = codes.view(codes.shape[0], scales.shape[1] if item.weight.group_size else 1, -1).sum(-1, dtype=torch.int32)
    if item.weight.group_size is None:
        return sums.mul_(128).view(-1)
    return (sums.double() * scales.double()).sum(1).mul_(128.0).float()
