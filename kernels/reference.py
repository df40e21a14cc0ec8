"""The torch twin of every scheme: what a kernel must compute, from canonical codes and scales.

Weights: W = codes * scales, one scale per output channel or per group of inputs; exact in fp32, because a code has at
most 8 significant bits and a scale (see `round_scale`) has at most 8. Activations are quantized symmetrically per token
from their fp32 values, as compressed-tensors does it when its checkpoints run: int8 with scale amax / 127.5 and codes
clamp(round(x / scale), -128, 127), fp8 e4m3 with scale amax / 448. Ties go to even. Slow and plain on purpose: kernels
are compared with it, nothing is timed with it.
"""

from __future__ import annotations

import math

import torch

from autotune.errors import InputError
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import NumberFormat, Scheme, scheme

FP16_SMALLEST_NORMAL = 2.0**-14
LARGEST_SCALE = 255.0 * 2**8  # 8 significant bits, just under fp16's largest number
SMALLEST_AMAX = 1e-30  # a token of zeros gets this scale, and codes of exactly zero
_CHUNK_WEIGHTS = 2**22  # random tensors are made in pieces of this size to keep temporaries small


def round_scale(scales: torch.Tensor) -> torch.Tensor:
    """The nearest fp32 numbers that bf16 and fp16 hold exactly: 8 significant bits, within fp16's normal range.

    Scales under 2^-14 become 2^-14: smaller ones would be subnormal in fp16, which some runtimes flush to zero.
    """
    return scales.to(torch.bfloat16).float().clamp(FP16_SMALLEST_NORMAL, LARGEST_SCALE)


def dequantize(weight: GroupWeight) -> torch.Tensor:
    """W as fp32 (out, in)."""
    if weight.dense is not None:
        return weight.dense.float()
    codes, scales = canonical(weight)
    grouped = codes.float().view(codes.shape[0], scales.shape[1], -1)  # (out, groups, inputs of a group)
    return grouped.mul_(scales.unsqueeze(-1)).view(codes.shape)


def canonical(weight: GroupWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a quantized weight.

    Raises:
        InputError: `kernel.weight` when it has none, or when their shapes do not belong together.
    """
    codes, scales = weight.codes, weight.scales
    if codes is None or scales is None:
        raise InputError("kernel.weight", f"a {weight.scheme} weight needs codes and scales, and this one lacks them.")
    size = scheme(weight.scheme).weight.group_size or codes.shape[1]
    if tuple(scales.shape) != (codes.shape[0], codes.shape[1] // size) or codes.shape[1] % size:
        shapes = f"codes {tuple(codes.shape)}, scales {tuple(scales.shape)}"
        raise InputError("kernel.weight", f"{weight.scheme}: {shapes} do not fit scale groups of {size} inputs.")
    return codes, scales


def activation_codes(x: torch.Tensor, number: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (fp32 values of the format, shape of x) and scales (fp32, one per token, shape (..., 1))."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    if number.kind == "int":
        steps = 2.0**number.bits - 1.0
        scales = largest / (steps / 2.0)
        return (wide / scales).round_().clamp_(-number.qmax - 1.0, number.qmax), scales
    scales = largest / number.qmax
    codes = (wide / scales).clamp_(-number.qmax, number.qmax)
    return codes.to(torch.float8_e4m3fn).float(), scales


def quantize_activations(x: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """Fake quantization: x rounded to what the format holds, in the dtype of x. Tokens of zeros stay exact zeros."""
    codes, scales = activation_codes(x, number)
    return (codes * scales).to(x.dtype)


def reference_linear(weight: GroupWeight, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """y = x W^T + b for x (..., in) in `dtype` (default: that of x), activations quantized where the scheme says so.

    Activation codes come from x as given, whatever `dtype` is: float64 makes the sums exact, it moves no rounding.
    """
    dtype = dtype or x.dtype
    activation = scheme(weight.scheme).activation
    if activation is None:
        inputs = x.to(dtype)
    else:
        codes, scales = activation_codes(x, activation)
        inputs = codes.to(dtype) * scales.to(dtype)
    y = inputs @ dequantize(weight).to(dtype).T
    return y if weight.bias is None else y + weight.bias.to(dtype)


def random_weight(
    name: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    bias: bool,
    generator: torch.Generator,
) -> GroupWeight:
    """A plausible weight for profiling and tests: full-range codes, scales that differ, outputs of magnitude one.

    It is made on the generator's device.
    """
    item, device = scheme(name), generator.device
    made_bias = torch.randn(out_features, generator=generator, device=device).to(dtype) if bias else None
    if item.weight.bits >= 16:
        dense = torch.empty(out_features, in_features, dtype=dtype, device=device)
        dense.normal_(0.0, in_features**-0.5, generator=generator)
        _prune(dense, item, generator)
        return GroupWeight(name, dense=dense, bias=made_bias)
    codes = _random_codes(item, out_features, in_features, generator)
    _prune(codes, item, generator)
    groups = in_features // (item.weight.group_size or in_features)
    typical = 1.0 / (item.weight.qmax * math.sqrt(in_features))
    uniform = torch.rand(out_features, groups, generator=generator, device=device)
    scales = round_scale((0.5 + 2.0 * uniform) * typical)
    return GroupWeight(name, codes=codes, scales=scales, bias=made_bias)


def _random_codes(item: Scheme, out_features: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """int8 codes uniform over -qmax..qmax, or e4m3 codes of a normal distribution that reaches its largest number."""
    shape, device = (out_features, in_features), generator.device
    if item.weight.kind == "int":
        bound = int(item.weight.qmax)
        return torch.randint(-bound, bound + 1, shape, dtype=torch.int8, generator=generator, device=device)
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for rows in codes.split(_rows_of_chunk(in_features)):
        values = torch.randn(rows.shape, generator=generator, device=device).mul_(item.weight.qmax / 4.0)
        rows.copy_(values.clamp_(-item.weight.qmax, item.weight.qmax))
    return codes


def _prune(values: torch.Tensor, item: Scheme, generator: torch.Generator) -> None:
    """Zero a random two of every four inputs, in place."""
    if item.sparsity != "2:4":
        return
    pairs = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    kept = torch.tensor(pairs, device=values.device)
    quads = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
    for rows in quads.split(_rows_of_chunk(values.shape[1])):
        quarter = (rows.shape[0], rows.shape[1] // 4)
        chosen = torch.randint(0, 6, quarter, generator=generator, device=values.device)
        rows.mul_(kept.to(rows.dtype)[chosen].view(rows.shape))
    if values.is_floating_point() and quads is values:
        values.add_(0.0)  # -0.0 + 0.0 is +0.0: compressors may take a negative zero for a survivor


def _rows_of_chunk(in_features: int) -> int:
    return max(1, _CHUNK_WEIGHTS // in_features)
