"""Keys and values of a transformers model kept, and seen by its attention, in a format of `kernels.kv_formats`.

Attention sees what a format makes of keys and values from the first token on, in prompts as in single tokens, whether a
cache is kept or not: a model's function does not depend on how a text is cut into passes, and losses measured on whole
documents are those of decoding. A growing cache's layers are exchanged for coded ones; another kind of cache keeps the
rounded numbers in its own dtype. Single tokens read codes in native layers (`decoder`); everywhere else all rows are
decoded in every call, which is slow.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autotune.attention_cost import attention_of
from autotune.kernels import changes
from autotune.kernels.kv_formats import decode, encode

_CACHE = "past_key_values"


def keep_as(model: nn.Module, name: str | None) -> None:
    """From now on keys and values are `name`, or what they are without a format."""
    changes.note()
    for module in _attentions(model):
        forward = module.forward
        if isinstance(forward, Keeping):
            forward.name = name
        elif name is not None:
            module.forward = Keeping(module, name)


def unsupported(config: Any, causal: bool, device: str) -> str:
    """Why a model's cache is left as it is, or ""."""
    if not causal:
        return "an encoder keeps no keys and values"
    if device != "cpu":
        return f"no kernel reads coded keys and values on a {device} device"
    found = attention_of(config, causal)
    if isinstance(found, str):
        return found
    if any(window is not None for window in found.windows):
        return "some layers look back at a window of positions only, and keep no more"
    return ""


class Keeping:
    """Stands in for an attention module's `forward`: its cache layer is of the format, or what it keeps is rounded."""

    def __init__(self, module: nn.Module, name: str | None) -> None:
        self.module: Any = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name is not None:
            place = _parameters(type(self.module).forward).index(_CACHE)
            if len(args) > place:
                args = (*args[:place], self._cache(args[place]), *args[place + 1 :])
            else:
                kwargs[_CACHE] = self._cache(kwargs.get(_CACHE))
        return type(self.module).forward(self.module, *args, **kwargs)

    def _cache(self, cache: Any) -> Any:
        assert self.name is not None
        layers, index = getattr(cache, "layers", None), self.module.layer_idx
        if layers is None:
            return Rounding(self.name, cache)
        growing, coded = _classes()
        if getattr(cache, "layer_class_to_replicate", None) == growing:
            layers.extend(growing() for _ in range(index + 1 - len(layers)))
        if index >= len(layers):
            return Rounding(self.name, cache)
        if type(layers[index]) is growing:
            layers[index] = coded(self.name).take(layers[index])
        same = type(layers[index]) is coded and layers[index].coded == self.name
        return cache if same else Rounding(self.name, cache)


class Rounding:
    """A cache, or none, that is given what a format makes of keys and values."""

    def __init__(self, name: str, cache: Any) -> None:
        self._name, self._cache = name, cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = (decode(encode(x, self._name), self._name, x.dtype) for x in (keys, values))
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


def coded_format(kept: Any) -> str | None:
    """The format of a cache's layer; None: numbers."""
    return kept.coded if type(kept) is _classes()[1] else None


def is_growing(kept: Any) -> bool:
    """A cache's layer that grows, coded or not, and nothing derived from it."""
    return type(kept) in _classes()


@functools.cache
def _classes() -> tuple[Any, Any]:
    """transformers' layer of a cache that grows, and the coded one."""
    from transformers.cache_utils import DynamicLayer

    class CodedLayer(DynamicLayer):
        """`keys` and `values` are rows of `kv_formats`: (sequences, key heads, positions, width + 4) int8."""

        def __init__(self, coded: str) -> None:
            super().__init__()
            self.coded = coded

        def take(self, other: Any) -> Any:
            """What another layer holds."""
            if other.is_initialized and other.keys.numel():
                self.update(other.keys, other.values)
            return self

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.keys, self.values = (key_states.new_empty(0, dtype=torch.int8) for _ in range(2))

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Codes the new rows; all rows as numbers."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            self.keys = torch.cat([self.keys, encode(key_states, self.coded)], -2)
            self.values = torch.cat([self.values, encode(value_states, self.coded)], -2)
            keys = decode(self.keys, self.coded, key_states.dtype)
            return keys, decode(self.values, self.coded, value_states.dtype)

    return DynamicLayer, CodedLayer


def _attentions(model: nn.Module) -> list[Any]:
    """The innermost modules that are given a cache and know which layer of it is theirs."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and _CACHE in _parameters(type(m).forward)]
    outer = {id(m) for m in found for inside in m.modules() if inside is not m and any(inside is x for x in found)}
    return [m for m in found if id(m) not in outer]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Without self."""
    return tuple(inspect.signature(forward).parameters)[1:]
