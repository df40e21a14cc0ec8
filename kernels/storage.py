"""Canonical weights as the tensors that are stored, at their true size, and back: exact for every scheme.

`values`: codes bit-packed row by row (or 8- and 16-bit floats as they are), of a sparse scheme only what stays;
`positions`: where that was, 2 bits a survivor (2:4) or a bit a weight; `scales`: bf16, or a byte each, one row of them
for the rows that share it; `unit`: NVFP4's scale of the tensor; `zeros`: zero points, bit-packed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autotune.kernels import patterns
from autotune.kernels.formats import exponents, powers_of_two, scale_unit
from autotune.kernels.packing import compress_24, expand_24, pack_codes, unpack_codes
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import NumberFormat, Scheme, scheme, survivors

_E8M0_BIAS = 127


def pack(weight: GroupWeight) -> dict[str, torch.Tensor]:
    """Canonical weights as the tensors that are stored; the inverse of `unpack`."""
    item = scheme(weight.scheme)
    tensors: dict[str, torch.Tensor] = {}
    values = weight.dense if weight.codes is None else weight.codes
    assert values is not None
    if item.sparsity == "2:4":
        values, tensors["positions"] = compress_24(values)
    elif item.sparsity != "dense":
        values, tensors["positions"] = patterns.compress(values, item)
    if weight.scales is not None:
        tensors |= _pack_scales(weight.scales[:: item.weight.rows or len(weight.scales)], item.weight)
    if weight.zeros is not None:
        tensors["zeros"] = pack_codes(weight.zeros, item.weight.bits)
    tensors["values"] = pack_codes(values, item.weight.bits) if values.dtype == torch.int8 else values
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(
    item: Scheme,
    in_features: int,
    tensors: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None = None,
    first_row: int = 0,
) -> GroupWeight:
    """The canonical weights behind stored tensors.

    Args:
        first_row: of some rows only, how many rows the first of `scales` serves before them.
    """
    number = item.weight
    values = tensors["values"]
    if values.dtype == torch.uint8:
        values = unpack_codes(values, number.bits, survivors(item.sparsity, in_features))
    if item.sparsity == "2:4":
        values = expand_24(values, tensors["positions"])
    elif item.sparsity != "dense":
        values = patterns.expand(values, tensors["positions"], in_features)
    if number.bits >= 16:
        return GroupWeight(item.name, dense=values, bias=bias)
    scales, zeros = unpack_grid(number, tensors, len(values), in_features, first_row)
    return GroupWeight(item.name, codes=values, scales=scales, bias=bias, zeros=zeros)


def unpack_grid(
    number: NumberFormat, tensors: Mapping[str, torch.Tensor], rows: int, in_features: int, first_row: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales fp32 (rows, groups) and zero points."""
    scales = _unpack_scales(tensors, number)
    if number.rows != 1:
        scales = scales.repeat_interleave(number.rows or rows, 0)[first_row : first_row + rows]
    groups = in_features // (number.group_size or in_features)
    return scales, None if number.symmetric else unpack_codes(tensors["zeros"], number.bits, groups)


def stored_rows(item: Scheme, key: str, start: int, stop: int) -> slice:
    """Rows of a stored tensor that rows `start` to `stop` of the weight need."""
    share = item.weight.rows
    if key == "unit" or (key == "scales" and share is None):
        return slice(0, 1)
    return slice(start // share, -(-stop // share)) if key == "scales" and share else slice(start, stop)


def _pack_scales(scales: torch.Tensor, number: NumberFormat) -> dict[str, torch.Tensor]:
    if number.scale == "e8m0":
        return {"scales": exponents(scales).add_(_E8M0_BIAS).to(torch.uint8)}
    if number.scale == "e4m3":
        unit = scale_unit(float(scales.max()))
        return {"scales": (scales / unit).to(torch.float8_e4m3fn), "unit": torch.tensor([unit], device=scales.device)}
    return {"scales": scales.to(torch.bfloat16)}  # exact: 8 significant bits


def _unpack_scales(tensors: Mapping[str, torch.Tensor], number: NumberFormat) -> torch.Tensor:
    scales = tensors["scales"].float()
    if number.scale == "e8m0":
        return powers_of_two(scales - _E8M0_BIAS)
    return scales * tensors["unit"] if number.scale == "e4m3" else scales
