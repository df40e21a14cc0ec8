"""One new token's attention with the query heads of a key head side by side, as rows of one product.

With grouped-query attention several query heads read the same keys. torch's attention on a CPU takes them one by one,
each a single row, which in bf16 is 4 to 7 times slower than as many rows at once (torch 2.13; 16 heads on 8, 80 to 512
positions). Everything else goes to transformers' own function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NAME = "autotune_sdpa"
_UNUSUAL = {"position_bias", "cache", "softcap"}  # extras that only transformers' own function understands


def pack_query_heads(model: nn.Module) -> bool:
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
    batch, heads, new, _ = query.shape
    shared = heads // key.shape[1]
    if new > 1 or shared == 1 or not _plain(key, attention_mask, more):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    rows = query.reshape(batch, key.shape[1], shared, query.shape[-1])
    output = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, new, heads, value.shape[-1]), None


def _plain(key: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> bool:
    """On a CPU, with a mask that is the same for all heads, and nothing unusual asked for."""
    if key.device.type != "cpu" or torch.compiler.is_compiling() or (mask is not None and mask.shape[1] != 1):
        return False
    return all(more.get(name) is None for name in _UNUSUAL)
