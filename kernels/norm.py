"""A model's RMSNorm modules on one native call each. Nothing else about them changes: names, weights, results.

Model classes each have an RMSNorm of their own, alike in what they compute, but not all of them. So a module is
exchanged only where it gives on random inputs what the call gives.
"""

from __future__ import annotations

import torch
from torch import nn

from autotune.errors import DeviceError
from autotune.kernels import changes
from autotune.kernels.cpu.between import rms_norm

_EPS = ("variance_epsilon", "eps")  # what model classes call it
_DTYPES = (torch.bfloat16, torch.float32)
_ROWS = 3  # of random inputs that a module is tried on


class FusedRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, rounded before and after the weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight  # (width,)
        self.variance_epsilon = eps

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        changes.note()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        plain = torch.compiler.is_compiling() or x.dtype != weight.dtype or not x.is_cpu
        if plain or (torch.is_grad_enabled() and _traced(x, weight)):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return weight * wide.to(x.dtype)
        return rms_norm(x if x.is_contiguous() else x.contiguous(), weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


@torch.no_grad()
def fuse_norms(model: nn.Module) -> int:
    """Exchange the RMSNorm modules that the native call can stand in for; returns how many. Without a compiler, none.

    Their weights must be in memory: they are tried.
    """
    fused = 0
    for path, module in list(model.named_modules()):
        eps = next((getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)), None)
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or eps is None or not isinstance(weight, nn.Parameter):
            continue
        try:
            exchange = FusedRMSNorm(weight, eps)
            if not _alike(module, exchange):
                continue
        except DeviceError:  # no compiler here, or it fails: `doctor` says so, and the modules work as they are
            return fused
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, exchange.train(module.training))
        fused += 1
    return fused


def _alike(module: nn.Module, exchange: FusedRMSNorm) -> bool:
    """Equal on random inputs, but for the last bits: sums are added up in another order."""
    weight = exchange.weight
    if isinstance(module, FusedRMSNorm) or weight.dim() != 1 or weight.dtype not in _DTYPES or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[0], generator=generator).to(weight.dtype)
    found, expected = exchange(x), module(x)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    error = torch.finfo(weight.dtype).eps * (2 if weight.dtype == torch.bfloat16 else 32)
    return torch.allclose(found.float(), expected.float(), rtol=error, atol=error * float(expected.abs().max()))


def _traced(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.requires_grad or weight.requires_grad
