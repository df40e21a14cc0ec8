"""What methods need of a Hessian: damped, so that it can be inverted, and the factor that a sweep follows.

Damping adds a share of the mean diagonal to the diagonal. A tenth, not the hundredth that GPTQ takes: inputs in the
compressed model are not those of the dense one, and the model's own loss is lower for it though the layer's is not
(docs/measured.md). An input that calibration never saw has that diagonal alone: nothing is moved on to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autotune.errors import InputError

DAMPING = 0.1
_RAISE = 10.0  # damping grows by this while the factorization fails
_MOST = 1e6
_HINT = "Try another --data, or --dtype fp32; --compression wanda needs no Hessian."


@dataclass(frozen=True)
class SweepFactor:
    """`upper`: U of H^-1 = U^T U with inputs taken in `order` (in,), both directions; (in, in) fp32."""

    order: torch.Tensor
    upper: torch.Tensor


def damped(hessian: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """(in, in): H with `share` of its mean diagonal added to the diagonal."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal += max(share * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    return result


def sweep_factor(hessian: torch.Tensor, share: float = DAMPING, together: int = 1) -> SweepFactor:
    """Inputs by falling diagonal (GPTQ's act-order: the loudest are rounded first, while others can still make up for
    it), and the Cholesky factor of the inverse in that order. Damping is raised while the matrix is not definite.

    Args:
        together: so many neighbours stay neighbours, ordered by their sum.

    Raises:
        InputError: `compression.hessian` when no damping helps: activations are not finite.
    """
    loudness = hessian.diagonal().view(-1, together).sum(1)
    blocks = loudness.argsort(descending=True, stable=True)
    order = (blocks.unsqueeze(1) * together + torch.arange(together, device=blocks.device)).view(-1)
    while share < _MOST:
        ordered = damped(hessian, share)[order][:, order]
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(upper.isfinite().all()):
            return SweepFactor(order, upper)
        share *= _RAISE
    raise InputError("compression.hessian", "a layer's inputs are not finite on the calibration text.", _HINT)
