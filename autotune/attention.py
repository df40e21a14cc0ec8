"""Attention of a transformers model on a CPU, two cases of it faster.

One new token: with grouped-query attention several query heads read the same keys. torch's attention takes them one by
one, each a single row, which in bf16 is 4 to 7 times slower than as many rows side by side (torch 2.13; 16 heads on 8,
80 to 512 positions). Prompts and texts that go on, without padding, in bf16: a native kernel, where this CPU has one.
Everything else goes to transformers' own function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autotune.kernels.cpu import flash

NAME = "autotune_sdpa"
_UNUSUAL = {"position_bias", "cache", "softcap"}  # extras that only transformers' own function understands


def fuse_attention(model: nn.Module) -> bool:
    """Let a transformers model that uses `sdpa` attend this way; returns whether it does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return True


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads, new, width); key, value (batch, key heads, positions, width); gives (batch, new, heads,
    width)."""
    if not dropout and _plain(key, attention_mask, more):
        new, shared = query.shape[2], query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if new == 1 and shared > 1:
            return _side_by_side(query, key, value, attention_mask, scale), None
        if new > 1 and not _traced(query, key, value) and flash.serves(query, key, value):
            causal = _causal(module, attention_mask, new, key.shape[2], more)
            if causal is not None:
                return flash.attend(query, key, value, scale, causal), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)


def _side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Of one new token: heads of a key head as rows."""
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], -1, width)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, 1, heads, value.shape[-1])


def _plain(key: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> bool:
    """On a CPU, with a mask that is the same for all heads, and nothing unusual asked for."""
    if key.device.type != "cpu" or torch.compiler.is_compiling() or (mask is not None and mask.shape[1] != 1):
        return False
    return all(more.get(name) is None for name in _UNUSUAL)


def _causal(
    module: nn.Module, mask: torch.Tensor | None, new: int, positions: int, more: dict[str, Any]
) -> bool | None:
    """Whether every token sees the positions up to its own; False: it sees all; None: something else."""
    if mask is not None:  # of a text that goes on, or padded
        before = torch.ones(new, positions, dtype=torch.bool).tril_(positions - new)
        same = mask.dtype == torch.bool and mask.shape[-2:] == before.shape and bool((mask == before).all())
        return True if same else None
    given = more.get("is_causal")  # as transformers' function has it
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    return None if causal and new != positions else causal


def _traced(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(item.requires_grad for item in tensors)
