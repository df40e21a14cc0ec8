"""Wanda's metric |w_ij| * ||x_j||_2 (arXiv 2306.11695): of every four inputs, or of a row, the best stay."""

from __future__ import annotations

import torch

from autotune.kernels.patterns import best_two


def score(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """(out, in): what losing a weight would cost.

    Args:
        weight: (out_features, in_features) fp32.
        moment: (in_features,) mean squared input, or None for magnitude pruning.
    """
    magnitude = weight.abs()
    return magnitude if moment is None else magnitude * moment.float().sqrt()


def mask_24(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """True where a weight stays at 2:4; in_features divisible by 4."""
    return best_two(score(weight, moment))
