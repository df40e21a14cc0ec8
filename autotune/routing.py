"""Tokens to experts without the host, for the few tokens of a decode step: what a CUDA graph can hold.

Routing as transformers does it asks the host how many tokens every expert gets, which launches so much work as there
is. A graph always launches the same. Two such ways, by which moves fewer bytes of weights:

- every token's own experts, each pair of both by itself, on copies that the device chooses (`kernels.bank`);
- all experts on all tokens, and what a token was not sent to does not count: weights are read once, where they lie.

Products of few rows take as long as reading their weights, so the second is no more work while tokens are few. Beyond
`MOST_TOKENS` it is: then the host routes, once a layer, and the pass is launched and not recorded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from autotune.kernels.bank import COST
from autotune.kernels.linear import FusedGroup, GroupSlice

MOST_TOKENS = 64  # as many rows as weight-only kernels take at once


def takes(experts: nn.ModuleList, tokens: int) -> bool:
    """Whether so many tokens go to these experts without the host: their packed weights are there for it."""
    if tokens > MOST_TOKENS or torch.compiler.is_compiling():
        return False
    first = cast(Any, experts[0])
    return all(isinstance(layer, GroupSlice) and layer.group.banked for layer in (first.gate_proj, first.down_proj))


def routed(experts: nn.ModuleList, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden (tokens, hidden), chosen and weights (tokens, experts a token) -> (tokens, hidden)."""
    if COST * chosen.numel() < len(experts):
        return by_choice(experts, hidden, chosen, weights)
    return by_all(experts, hidden, chosen, weights)


def by_choice(
    experts: nn.ModuleList, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every pair of a token and an expert as a product of one row."""
    tokens, each = chosen.shape
    numbers, first = chosen.reshape(-1), cast(Any, experts[0])
    inner: FusedGroup = first.gate_proj.group
    gate, up = _rows(inner, numbers, hidden.repeat_interleave(each, 0)).split(inner.sizes, -1)
    y = _rows(first.down_proj.group, numbers, first.act_fn(gate) * up) * weights.reshape(-1, 1)
    return y.view(tokens, each, -1).sum(1).to(hidden.dtype)


def by_all(experts: nn.ModuleList, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert on every token; where a token was not sent, not even an overflow counts."""
    shares = weights.new_zeros(len(hidden), len(experts)).scatter(1, chosen, weights)
    sent = torch.zeros_like(shares, dtype=torch.bool).scatter(1, chosen, True)
    y = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    for number, expert in enumerate(experts):
        own = slice(number, number + 1)
        y = y + (expert(hidden) * shares[:, own]).masked_fill(~sent[:, own], 0.0)
    return y.to(hidden.dtype)


def _rows(first: FusedGroup, numbers: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (n, in) through the experts of these numbers, of which `first` is one: (n, out)."""
    if first.choice is None:
        return x.new_zeros(len(x), first.out_features)
    return cast(Any, first.choice.bank).compute(numbers, x.contiguous())  # type: ignore[no-any-return]
