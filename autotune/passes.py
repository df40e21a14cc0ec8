"""Passes of a transformers model on fixed inputs, such that a CUDA graph can hold them: no size changes, nothing waits.

A prompt and the token after it, over a static cache with room for what is generated. Every call does the same work: the
cache is set back to where it was, so that replays neither wander on nor write past its end. An encoder has a prompt
only. Used by the end-to-end measurement and by `benchmarks/gpu`, where pydantic and optuna are not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autotune.errors import DeviceError

_STEP = 16  # positions of a cache come in so many: attention over odd lengths copies its mask first


class StaticRequest:
    """`prefill` and `decode` give the last position's logits (batch, 1, vocabulary); encoders' prefill, its states."""

    def __init__(self, model: nn.Module, batch: int, prompt: int, room: int, device: torch.device) -> None:
        """`room`: positions of the cache, prompt included, and the token after it if it is to be decoded.

        Raises:
            DeviceError: `device.static_cache` for a model that transformers cannot run over one.
        """
        config: Any = model.config
        generator = torch.Generator(device).manual_seed(0)
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (batch, prompt + 1), generator=generator, device=device)
        self.model, self.prompt = model, prompt
        self.ids, self.next_ids = ids[:, :prompt].contiguous(), ids[:, prompt:].contiguous()
        self.places = torch.arange(prompt + 1, device=device).unsqueeze(0)  # (1, prompt + 1)
        generates: bool = model.can_generate()  # type: ignore[operator]
        self.cache = _static_cache(model, -(-max(room, prompt) // _STEP) * _STEP) if generates else None

    def prefill(self) -> torch.Tensor:
        if self.cache is None:
            states: torch.Tensor = self.model(self.ids).last_hidden_state
            return states
        return self._run(self.ids, 0)

    def decode(self) -> torch.Tensor:
        """One token after the prompt, which `prefill` must have put into the cache once."""
        return self._run(self.next_ids, self.prompt)

    def _run(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        assert self.cache is not None
        _rewind(self.cache, past)
        places = self.places[:, past : past + ids.shape[1]]
        output = self.model(ids, past_key_values=self.cache, position_ids=places, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits
        return logits


def _static_cache(model: nn.Module, room: int) -> Any:
    from transformers import StaticCache

    if not getattr(model, "_can_compile_fullgraph", True):
        hint = "Measure it on the CPU with --target cpu."
        what = f"{type(model).__name__} does not run over a static cache, so its passes cannot be recorded."
        raise DeviceError("device.static_cache", what, hint)
    config: Any = model.config
    return StaticCache(config=config, max_cache_len=room)


def _rewind(cache: Any, past: int) -> None:
    """Set what the layers count, in tensors or not, back to so many positions; in a graph, by two launches."""
    counters = []
    for layer in cache.layers:
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, torch.Tensor):
            counters.append(length)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = past
    if counters:
        torch._foreach_zero_(counters)
        torch._foreach_add_(counters, past)
