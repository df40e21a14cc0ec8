"""2:4 masks by Wanda's metric |w_ij| * ||x_j||_2 (arXiv 2306.11695): of every four inputs the best two stay."""

from __future__ import annotations

import torch


def mask_24(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """True where a weight stays.

    Args:
        weight: (out_features, in_features) fp32; in_features divisible by 4.
        moment: (in_features,) mean squared input, or None for magnitude pruning.
    """
    score = weight.abs()
    if moment is not None:
        score = score * moment.float().sqrt()
    fours = score.view(len(weight), -1, 4)
    kept = fours.topk(2, dim=-1).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, kept, True).view_as(weight)
