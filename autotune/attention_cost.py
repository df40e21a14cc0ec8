"""What attention reads, keeps and multiplies, from a config alone: bytes of the KV cache and operations by context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PLAIN = {"full_attention", "sliding_attention"}  # what a config may call its layers for this arithmetic to hold


@dataclass(frozen=True)
class Attention:
    """`windows`: of every layer, the positions it looks back at, None for all of them."""

    windows: tuple[int | None, ...]
    heads: int
    key_heads: int  # keys, and values, each have so many
    width: int  # of a head
    causal: bool  # an encoder looks both ways and keeps nothing

    def cache_bytes(self, context: int, batch: int, width_bytes: int) -> int:
        """Of keys and values of so many positions of `batch` sequences."""
        return self.cached_rows(context, batch) * self.width * width_bytes

    def cached_rows(self, context: int, batch: int) -> int:
        """How many heads' keys and values are kept, of `width` numbers each."""
        if not self.causal:
            return 0
        return 2 * sum(min(context, window or context) for window in self.windows) * self.key_heads * batch

    def operations(self, new: int, context: int, batch: int) -> int:
        """Of scores and weighted sums for the last `new` of `context` positions, a multiply-add counted as two."""
        pairs = sum(self._pairs(new, context, window) for window in self.windows)
        return 4 * pairs * self.heads * self.width * batch

    def _pairs(self, new: int, context: int, window: int | None) -> int:
        """(position, position it looks at) pairs of one layer."""
        if not self.causal:
            return new * context
        reach = min(window or context, context)
        growing = max(0, min(context, reach) - (context - new))  # positions that still see all before them
        first = context - new + 1
        return growing * (2 * first + growing - 1) // 2 + (new - growing) * reach


def attention_of(config: Any, causal: bool) -> Attention | str:
    """The attention that a transformers config describes, or why this arithmetic does not hold for it."""
    if getattr(config, "kv_lora_rank", None):
        return "it keeps latent vectors, and how many bytes they take depends on the runtime"
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int) or not isinstance(heads, int) or not heads:
        return "its config names no attention heads"
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if unknown := set(kinds) - _PLAIN:
        return f"layers of {' and '.join(sorted(unknown))} keep something else"
    window = getattr(config, "sliding_window", None)
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if not getattr(config, "layer_types", None) and window and getattr(config, "use_sliding_window", True):
        windows = (window,) * layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Attention(windows, heads, getattr(config, "num_key_value_heads", None) or heads, width, causal)
