"""The metric of HWPQ / SwiftPrune (arXiv 2501.16376) for masks: the fast mode, one pass and no Hessian.

With H = x x^T + c I for one vector x of input norms, OBS gives the error of removing a weight in closed form,

    L_ij = w_ij^2 / (1 - x_j^2 / S),   S = sum_j x_j^2,

exact for a single sample. With many inputs x_j^2 / S is near zero and L is near w^2: close to magnitude, with a boost
for inputs that are very loud. The article's running threshold selects without sorting; two of four need none.
"""

from __future__ import annotations

import torch

from autotune.kernels.patterns import best_two


def score(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(out, in): what losing a weight would cost; `moment` (in,) mean squared input."""
    share = moment / moment.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return weight.square() / (1 - share).clamp_min(1e-6)


def mask_24(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """True where a weight (out, in) stays at 2:4."""
    return best_two(score(weight, moment))
