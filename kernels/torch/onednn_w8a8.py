"""int8 weights and int8 activations on oneDNN (`onednn.qlinear_pointwise`), CPUs with VNNI instructions.

oneDNN takes one activation scale a call and is fast for unsigned activations only, so tokens are sent as u8 = s8 + 128
with scale 1 and zero point 128; it returns sums times the channel scale in fp32, and the row scale and the bias follow
here. The integer sums are exact (int32), so this is the arithmetic of a per-token int8 checkpoint. Without VNNI oneDNN
multiplies pairs in saturating 16 bits, which is wrong for full-range codes: hence the feature in the kernel's limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from autotune.errors import InputError
from autotune.kernels.reference import SMALLEST_AMAX, canonical
from autotune.kernels.reordered import kept
from autotune.kernels.spec import Form, GroupWeight, Packed

_PLAIN: tuple[Any, ...] = ("none", [], "")  # no activation function after the multiply
_MOST_INPUTS = 2**16  # 255 * 127 * inputs must stay within int32


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    out_features, in_features = codes.shape
    if in_features > _MOST_INPUTS:
        message = f"{in_features} inputs could overflow the 32-bit sums of w8a8-int8."
        raise InputError("kernel.limit", message, f"Up to {_MOST_INPUTS} are safe.")
    channel_scales = scales.flatten().contiguous()
    bias = None if weight.bias is None else weight.bias.float()
    held = codes.nbytes + channel_scales.nbytes + (0 if bias is None else bias.nbytes)
    form = Form(weight.scheme, out_features, in_features, dtype)
    return form.packed(_data(_reordered(codes), channel_scales, bias), held)


def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    _, channel_scales, _, bias = packed.data
    return None, channel_scales, bias


def plain(packed: Packed) -> torch.Tensor:
    """The codes (out, in) as they were before oneDNN reordered them."""
    codes: torch.Tensor = packed.data[0].to_dense().t().contiguous()
    return codes


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    codes, channel_scales, bias = held
    return form.packed(_data(kept(codes, _reordered), channel_scales, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    reordered, channel_scales, zero_points, bias = packed.data
    codes, scales = _quantize(x)
    if x.shape[0] == 1:  # one token: oneDNN takes its scale, and writes the output dtype itself (0.85 of the time)
        one: torch.Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
            codes, scales.view(1), _zero_point(), reordered, channel_scales, zero_points, bias, 1.0, 0, x.dtype, *_PLAIN
        )
        return one
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, reordered, channel_scales, zero_points, None, 1.0, 0, torch.float32, *_PLAIN
    )
    y = y.mul_(scales) if bias is None else torch.addcmul(bias, y, scales, out=y)
    return y.to(packed.dtype)


def _reordered(codes: torch.Tensor) -> torch.Tensor:
    opaque: torch.Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return opaque


def _data(reordered: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None) -> tuple[Any, ...]:
    assert scales is not None
    return reordered, scales, torch.zeros(len(scales), dtype=torch.int64), bias


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """u8 codes (rows, in), 128 more than the signed ones, and fp32 scales (rows, 1)."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_(min=SMALLEST_AMAX).div_(127.5)
    steps = wide.div(scales) if wide is x else wide.div_(scales)
    # -127.5 rounds to -128, which fits; +127.5 rounds to 128, which does not.
    return steps.round_().add_(128.0).clamp_(max=255.0).to(torch.uint8), scales


@cache
def _zero_point() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor([128])
