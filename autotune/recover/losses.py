"""What the trained model is pulled towards: the dense model's distribution, or its hidden states.

Causal language models: KL(dense || trained) over every position. Encoders: squared error of the last hidden states
against their squared norm. Both are means over positions, and both are what the budget is about.

Training takes half of its KL at temperature 2 (arXiv 1503.02531): there tokens that the dense model thinks unlikely
still say something, and rows of the head that serve rare tokens learn more from each position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from autotune.place import logits_at_a_time


class Divergence(torch.autograd.Function):
    """Sum over positions of KL(softmax(teacher / T) || softmax(logits / T)) T^2, the mean over temperatures T; logits
    (positions, vocabulary).

    The gradient, (softmax(logits / T) - softmax(teacher / T)) T, is made on the way: nothing of the size of the logits
    is kept but itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, temperatures: tuple[float, ...]) -> torch.Tensor:
        gradient = torch.zeros_like(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        step = max(1, logits_at_a_time(logits.device) // logits.shape[1])
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            for t in temperatures:
                wanted = F.log_softmax(teacher[rows].float() / t, -1)
                found = F.log_softmax(logits[rows].float() / t, -1)
                probability = wanted.exp()
                share = wanted.sub_(found).mul_(probability).sum(dtype=torch.float64)
                total += share * (t * t / len(temperatures))
                gradient[rows] += found.exp_().sub_(probability).mul_(t / len(temperatures))
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None, None


def divergence(outputs: torch.Tensor, teacher: torch.Tensor, temperatures: tuple[float, ...] = (1.0,)) -> torch.Tensor:
    """Mean over positions of KL(teacher || outputs), both logits (..., vocabulary), in nats; see `Divergence`."""
    flat = outputs.flatten(0, -2)
    total: torch.Tensor = Divergence.apply(flat, teacher.flatten(0, -2), temperatures)
    return total / len(flat)


def distance(outputs: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states (..., hidden) over the teacher's squared norm."""
    return (outputs - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)
