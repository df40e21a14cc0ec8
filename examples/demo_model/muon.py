"""The Muon optimizer for weight matrices.

Contract
    Muon(matrices, lr, momentum, decay).step()
moves each matrix along its Nesterov momentum after replacing that by (nearly) the closest
semi-orthogonal matrix, so that all directions of a matrix learn at one rate. In a stack
(n, rows, columns) each matrix is taken by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; `decay` is a decoupled weight decay."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        del closure  # the signature is the base class's
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


def orthogonalized(gradient: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of a matrix, or of a stack of them, towards one by Newton-Schulz steps, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = gradient.shape[-2] > gradient.shape[-1]
    x: Tensor = (gradient.mT if tall else gradient).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
