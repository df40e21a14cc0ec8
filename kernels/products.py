"""fp32 products on a CPU by the faster of the two libraries that torch carries.

torch multiplies fp32 matrices with MKL, which on AMD's CPUs stays with 256-bit vectors. oneDNN, which torch takes for
bf16, does not: on Zen 5 it is 1.9 to 2.3 times as fast from 64 rows on. Losses, compression and recovery are fp32
products for the most part. Everywhere else, and for few rows, these are torch's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from autotune.targets.detect import detect_cpu

_FEW = 4  # rows that both take as long for
_PIECE = 2**22  # numbers of a sum that are made at a time


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T: x (..., in), weight (out, in), any strides; gradients go to both."""
    if not _served(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)  # type: ignore[no-any-return]
    return _product(x, weight)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (rows, inner) @ b (inner, columns), any strides."""
    return linear(a, b.t())


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds a^T b to `total` (columns of a, columns of b): a and b (rows, columns), all fp32."""
    if not _served(a.t(), b.t()):
        total.addmm_(a.t(), b)
        return
    step = max(_FEW, _PIECE // total.shape[1])
    for part, columns in zip(total.split(step), a.split(step, 1), strict=True):
        part += linear(columns.t(), b.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        of_x = linear(gradient, weight.t()) if needs_x else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        return of_x, linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None


def _served(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
        and x.numel() >= _FEW * x.shape[-1] > 0
        and weight.numel() > 0
        and not torch.compiler.is_compiling()
        and differs()
    )


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of weights with gaps oneDNN has a plain loop only, a thousand times slower
    product: torch.Tensor = _operator(x, weight, None, "none", [], "")
    return product


def _operator(*arguments: Any) -> Any:
    return torch.ops.mkldnn._linear_pointwise(*arguments)


@cache
def differs() -> bool:
    """Whether oneDNN has vectors here that MKL does not use, and so is taken."""
    cpu = detect_cpu()
    operator = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return operator and torch.backends.mkl.is_available() and "AMD" in cpu.model and "avx512f" in cpu.features
