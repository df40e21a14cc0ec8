"""A prompt through a decoder layer of the common kind, with what is done between its products in one pass each.

Norms, rotary positions, residual sums and the gate are a dozen operators in transformers, each of which reads and
writes every activation. Attention is the model's own (`attention`). A layer is trusted once its answer to the first
prompt's first tokens is that of transformers' own code; masks, caches that already hold something or are of another
kind, training, hooks and `torch.compile` go there too.
"""

from __future__ import annotations

from typing import Any

import torch

from autotune import attention
from autotune.common_layer import DTYPES, alike, groups_of, wanted_format
from autotune.kernels.cpu import between
from autotune.kernels.linear import ZEROS, FusedGroup
from autotune.kernels.norm import FusedRMSNorm
from autotune.kv_cache import coded_format, is_growing

_TRIED = 32  # tokens that run both ways
Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (sequences or 1, tokens, turned numbers) each
Groups = tuple[FusedGroup, ...]
_TAKEN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position"}


class Prompt:
    """What a layer makes of many tokens."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.trusted: bool | None = None  # None: not tried yet

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        """The layer's output for x (sequences, tokens, hidden), or None where this is not a case for it.

        Args:
            given: the other arguments of the layer's `forward`.
        """
        angles: Any = given.get("position_embeddings")
        cache = given.get("past_key_values")
        if self.trusted is False or not self._takes(x, angles, cache, given):
            return None
        groups = groups_of(self.layer)
        if groups is None or (self.trusted is None and not self._try(x, angles, groups)):
            return None
        return self._through(x, angles, cache, groups)

    def _takes(self, x: torch.Tensor, angles: Any, cache: Any, given: dict[str, Any]) -> bool:
        own = self.layer.self_attn
        if any(value is not None and value is not False for name, value in given.items() if name not in _TAKEN):
            return False
        if given.get("attention_mask") is not None or not _is_empty(cache, own.layer_idx):
            return False
        return (
            x.dtype in DTYPES
            and all(norm.weight.dtype == x.dtype for norm in self.layer.modules() if isinstance(norm, FusedRMSNorm))
            and angles is not None
            and all(_fits(item, x, own.head_dim) for item in angles)
            and wanted_format(self.layer) is None
            and getattr(own.config, "_attn_implementation", None) == attention.NAME
        )

    def _try(self, x: torch.Tensor, angles: Angles, groups: Groups) -> bool:
        """Whether the first tokens go as they do in transformers' own code; nothing is kept of them."""
        if any(group.active == ZEROS for group in groups):
            return False  # the question stays open
        few = x[:, :_TRIED].contiguous()
        turned = (angles[0][:, :_TRIED].contiguous(), angles[1][:, :_TRIED].contiguous())
        slow = type(self.layer).forward(self.layer, few, attention_mask=None, position_embeddings=turned)
        if not bool(slow.isfinite().all()):
            return False
        self.trusted = alike(self._through(few, turned, None, groups) - few, slow - few)
        return self.trusted

    def _through(self, x: torch.Tensor, angles: Angles, cache: Any, groups: Groups) -> torch.Tensor:
        layer, own = self.layer, self.layer.self_attn
        qkv, o, gate_up, down = groups
        sums = x.reshape(-1, x.shape[-1]).clone()  # (tokens of all sequences, hidden), as all rows here
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        rows = qkv.compute(between.rms_norm(sums, first.weight, first.variance_epsilon))
        norms = [getattr(own, name, None) for name in ("q_norm", "k_norm")]
        heads, key_heads = (size // own.head_dim for size in qkv.sizes[:2])
        weights = [(None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon) for norm in norms]
        between.turn(rows, angles, (heads, key_heads), own.head_dim, (weights[0], weights[1]))
        query, key, value = _heads(rows, x.shape, (heads, key_heads, key_heads), own.head_dim)
        if cache is not None:
            key, value = cache.update(key, value, own.layer_idx)
        attended, _ = attention.attention(own, query, key, value, None, scaling=own.scaling)
        y = o.compute(attended.reshape(len(sums), -1))
        y = gate_up.compute(between.add_norm(y, sums, second.weight, second.variance_epsilon))
        return sums.add_(down.compute(between.gate(y))).view(x.shape)


def _heads(rows: torch.Tensor, shape: torch.Size, heads: tuple[int, ...], width: int) -> tuple[torch.Tensor, ...]:
    """Rows of all heads side by side as (sequences, heads, tokens, width) of queries, of keys and of values."""
    query, key, value = rows.view(*shape[:2], -1, width).transpose(1, 2).split(heads, 1)
    return query, key, value


def _is_empty(cache: Any, index: int) -> bool:
    """There is none, or its layer grows, keeps numbers as they are, and has none yet."""
    if cache is None:
        return True
    layers = getattr(cache, "layers", ())
    kept: Any = layers[index] if index < len(layers) else None
    return is_growing(kept) and coded_format(kept) is None and not kept.get_seq_length()


def _fits(angles: torch.Tensor, x: torch.Tensor, width: int) -> bool:
    """(1 or sequences, tokens, turned numbers), contiguous."""
    shape = angles.shape
    sequences, tokens = x.shape[:2]
    return (
        len(shape) == 3
        and shape[0] in (1, sequences)
        and shape[1] == tokens
        and shape[2] <= width
        and angles.dtype == x.dtype
        and angles.is_contiguous()
    )
