"""Number formats as arithmetic: which numbers a format holds, rounding to them, and how its codes are written.

A weight is level * scale. Levels are integers (code minus zero point), e4m3 numbers, or 16 numbers in a table, which
4-bit codes are the places of: e2m1 by sign and magnitude as OCP Microscaling 1.0 writes it, NF4 in rising order. Codes
of tables are kept as signed nibbles, as 4-bit integers are.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from autotune.search_space.schemes import NumberFormat

FP16_SMALLEST_NORMAL = 2.0**-14
LARGEST_SCALE = 255.0 * 2**8  # 8 significant bits, just under fp16's largest number
_E4M3_LARGEST = 448.0
_E4M3_SMALLEST = 2.0**-9
_FP32_FRACTION, _FP32_BIAS = 23, 127  # bits of the fraction, and what is added to exponents
_UNITS = (-20, 7)  # exponents of NVFP4's scale of a tensor: with e4m3 they cover what fp16 holds as normal numbers

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution over its largest, zero among them.
_NF4_BELOW = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
_NF4_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


def has_table(number: NumberFormat) -> bool:
    return number.bits == 4 and number.kind != "int"


def code_type(number: NumberFormat) -> torch.dtype:
    return torch.float8_e4m3fn if number.kind == "float" and number.bits == 8 else torch.int8


def round_to(values: torch.Tensor, number: NumberFormat, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """Weights over scales to the nearest levels, in place; `zeros` fits the shape of `values` by broadcasting."""
    if has_table(number):
        levels, between, _ = _sorted(number, values.device)
        return values.copy_(levels[torch.bucketize(values, between)])
    if number.kind == "float":
        clamped = values.clamp_(-number.qmax, number.qmax)
        return values.copy_(clamped.to(torch.float8_e4m3fn).float())
    if zeros is None:
        return values.round_().clamp_(-number.qmax, number.qmax)
    offset = zeros.to(values.dtype)
    values.round_()
    torch.maximum(values, -number.qmax - 1 - offset, out=values)
    return torch.minimum(values, number.qmax - offset, out=values)


def encode(levels: torch.Tensor, number: NumberFormat, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """The codes, int8 or float8_e4m3fn, of levels that the format holds."""
    if has_table(number):
        _, between, places = _sorted(number, levels.device)
        return places[torch.bucketize(levels, between)]
    if number.kind == "float":
        return levels.to(torch.float8_e4m3fn)
    return (levels if zeros is None else levels + zeros).to(torch.int8)


def decode(codes: torch.Tensor, number: NumberFormat, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """The levels of codes, fp32."""
    if has_table(number):
        return table(number).to(codes.device)[codes.bitwise_and(15).int()]
    wide = codes.float()
    return wide if zeros is None else wide.sub_(zeros)


@cache
def table(number: NumberFormat) -> torch.Tensor:
    """(16,) fp32: the level of every unsigned 4-bit code."""
    with torch.inference_mode(False):
        if number.kind == "nf":
            return torch.tensor(_NF4_BELOW + _NF4_ABOVE)
        return torch.tensor(_E2M1 + tuple(-level for level in _E2M1)) + 0.0  # no -0.0


@cache
def pairs(number: NumberFormat, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 2): the levels of the two codes of every byte, that in the low nibble first."""
    with torch.inference_mode(False):
        levels, byte = table(number), torch.arange(256)
        return torch.stack([levels[byte & 15], levels[byte >> 4]], 1).to(device, dtype)


@cache
def _sorted(number: NumberFormat, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(levels rising, the middles between them, the signed code of each)."""
    with torch.inference_mode(False):
        levels, first = table(number).unique(return_inverse=True)
        places = torch.empty(len(levels), dtype=torch.int8)
        places[first.flip(0)] = torch.arange(16, dtype=torch.int8).flip(0)  # of two zeros the positive one
        signed = torch.where(places > 7, places - 16, places)
        return levels.to(device), ((levels[1:] + levels[:-1]) / 2).to(device), signed.to(device)


def round_scale(scales: torch.Tensor) -> torch.Tensor:
    """The nearest fp32 numbers that bf16 and fp16 hold exactly: 8 significant bits, within fp16's normal range.

    Scales under 2^-14 become 2^-14: smaller ones would be subnormal in fp16, which some runtimes flush to zero.
    """
    return scales.to(torch.bfloat16).float().clamp(FP16_SMALLEST_NORMAL, LARGEST_SCALE)


def round_scales(scales: torch.Tensor, number: NumberFormat, unit: float = 1.0) -> torch.Tensor:
    """Scales as the format can write them; `unit` is the tensor's own scale where it has one (see `scale_unit`)."""
    if number.scale == "e8m0":
        return powers_of_two(scales.log2().round_().clamp_(-14, 15))  # what fp16 holds as normal numbers
    if number.scale == "e4m3":
        least = max(_E4M3_SMALLEST, FP16_SMALLEST_NORMAL / unit)
        return (scales / unit).clamp_(least, _E4M3_LARGEST).to(torch.float8_e4m3fn).float().mul_(unit)
    return round_scale(scales)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^n in fp32, n within -126 and 127, by its bits: exp2 of another device may be off by the last one."""
    return (exponents.int() + _FP32_BIAS << _FP32_FRACTION).view(torch.float32)


def exponents(powers: torch.Tensor) -> torch.Tensor:
    """The n, int32, of fp32 numbers that are 2^n."""
    return (powers.contiguous().view(torch.int32) >> _FP32_FRACTION) - _FP32_BIAS


def scale_unit(largest: float) -> float:
    """The power of two that e4m3 scales up to `largest` are multiples of. NVFP4 allows any fp32 number there; with a
    power of two every product is exact, and floating-point scales lose nothing by it."""
    exponent = math.ceil(math.log2(largest / _E4M3_LARGEST)) if largest > 0 else _UNITS[0]
    return 2.0 ** min(max(exponent, _UNITS[0]), _UNITS[1])
