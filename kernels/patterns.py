"""Sparsity patterns as masks: which weights of highest score a pattern lets stay, and masks as bits for storage.

2:4 and 4:8 keep half of every four or eight inputs, 50% (unstructured) half of every row: always as many a row, so that
what stays is a matrix too.
"""

from __future__ import annotations

import torch

from autotune.errors import InputError
from autotune.kernels.packing import movable, pack_bits, unpack_bits
from autotune.search_space.schemes import Scheme, survivors


def choose(score: torch.Tensor, item: Scheme) -> torch.Tensor:
    """(out, in) bool: True where the scheme's pattern keeps a weight, those of the largest scores."""
    if item.sparsity == "2:4":
        return best_two(score)
    rows, inputs = score.shape
    block = item.block or inputs
    blocks = score.view(rows, inputs // block, block)
    best = blocks.topk(survivors(item.sparsity, block), -1, sorted=False).indices
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True).view(rows, inputs)


def best_two(score: torch.Tensor) -> torch.Tensor:
    """(out, in) bool: True for the two largest of every four along the inputs; of equals the earlier."""
    a, b, c, d = score.view(len(score), -1, 4).unbind(-1)
    # Six comparisons; a weight stays where it loses at most one of its three. 4x faster than topk and scatter.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    count = torch.int8
    wins = [
        ab.to(count) + ac.to(count) + ad.to(count),
        (~ab).to(count) + bc.to(count) + bd.to(count),
        (~ac).to(count) + (~bc).to(count) + cd.to(count),
        (~ad).to(count) + (~bd).to(count) + (~cd).to(count),
    ]
    return (torch.stack(wins, -1) >= 2).view_as(score)


def compress(values: torch.Tensor, item: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) in the scheme's pattern to what stays (out, survivors) and where, uint8 (out, ceil(in / 8)), bit i of
    a byte for its i-th input. Where more than the pattern asks are zero, the first of them are kept as zeros.

    Raises:
        InputError: `packing.pattern` when a block keeps more than the pattern allows.
    """
    mask = kept_mask(values, item)
    return movable(values)[mask].view(values.dtype).view(len(values), -1), pack_bits(mask)


def kept_mask(values: torch.Tensor, item: Scheme) -> torch.Tensor:
    """(out, in) bool: the non-zeros, and the first zeros of a block where the pattern would keep more."""
    rows, inputs = values.shape
    block = item.block or inputs
    kept = survivors(item.sparsity, block)
    mask = (values != 0).view(rows, inputs // block, block)
    short = kept - mask.sum(-1, keepdim=True)
    if bool((short < 0).any()):
        bad = int((short < 0).sum())
        what = f"{bad} blocks of {block} inputs have more than {kept} non-zeros, as {item.sparsity} allows."
        raise InputError("packing.pattern", what, "Prune first.")
    if bool((short > 0).any()):
        mask = mask | (~mask & ((~mask).cumsum(-1) <= short))
    return mask.view(rows, inputs)


def expand(values: torch.Tensor, bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """The tensor (out, in) that `compress` was given."""
    mask = unpack_bits(bits, in_features)
    source = movable(values)
    full = torch.zeros(mask.shape, dtype=source.dtype, device=source.device)
    return full.masked_scatter_(mask, source).view(values.dtype)
