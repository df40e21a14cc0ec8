"""One new token through a transformers decoder, embedding to last norm, with all layers as one native call.

Layers that take single tokens natively (`decoder`) still cost 90 us of Python each, measured between their calls: the
weights of a layer push its code and data out of the caches. Where a model does nothing else between its layers, one call
runs them all. Whether it does is asked of its structure, and then of its numbers: the first token that finds every layer
trusted runs both ways, and must give the same bits. Masks, hooks, wanted intermediate results, other caches, training and
`torch.compile` go to transformers' own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from autotune.cache_room import Room, holds, with_room
from autotune.decoder import Layers, OneToken, Ready, fit, may
from autotune.kernels.norm import FusedRMSNorm

_CHILDREN = {"embed_tokens", "layers", "norm", "rotary_emb"}
_TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
_OUTPUTS = ["last_hidden_state", "past_key_values"]


def fuse_decoders(model: nn.Module) -> int:
    """Let the decoders whose layers all take single tokens natively run them as one; returns how many might."""
    found = [module for module in model.modules() if _is_common(module)]
    for module in found:
        module.forward = OneStep(module)
    return len(found)


def _is_common(decoder: nn.Module) -> bool:
    config, children = getattr(decoder, "config", None), dict(decoder.named_children())
    if set(children) != _CHILDREN or config is None or not len(children["layers"]):  # type: ignore[arg-type]
        return False
    windows = getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or ()) - {
        "full_attention"
    }
    steps = [layer.__dict__.get("forward") for layer in children["layers"].children()]
    return (
        not windows
        and type(children["embed_tokens"]) is nn.Embedding
        and isinstance(children["norm"], FusedRMSNorm)
        and all(isinstance(step, OneToken) for step in steps)
        and [step.index for step in steps if step] == list(range(len(steps)))
    )


class OneStep:
    """Stands in for a decoder's `forward`."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder: Any = decoder
        self._trusted: bool | None = None  # None: not tried yet
        self._layers: Layers | None = None
        self._output: Any = None  # transformers' class
        self._hooks_seen = -1  # torch's count of hooks when there were none here

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layers": None, "_hooks_seen": -1}  # pointers and hooks are of this very object

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._trusted is not False and not args and self._is_token(kwargs):
            output = self._token(kwargs)
            if output is not None:
                return output
        return self._slow(*args, **kwargs)

    def _slow(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def _is_token(self, given: dict[str, Any]) -> bool:
        """A token a sequence, continuing a cache, and nothing wanted but the last state."""
        ids, cache, config = given.get("input_ids"), given.get("past_key_values"), self.decoder.config
        if ids is None or cache is None or ids.dim() != 2 or ids.shape[1] != 1:
            return False
        if any(value is not None and value is not False for name, value in given.items() if name not in _TAKEN):
            return False
        kept = config.use_cache if given.get("use_cache") is None else given["use_cache"]
        whole = config.return_dict if given.get("return_dict") is None else given["return_dict"]
        return bool(kept and whole) and not (config.output_hidden_states or config.output_attentions)

    def _token(self, given: dict[str, Any]) -> Any:
        """The decoder's output, or None where this is not a case for the native call."""
        decoder, cache, steps = self.decoder, given["past_key_values"], self._steps()
        if steps is None:
            return None
        x = decoder.embed_tokens(given["input_ids"])
        kept = [step.kept(cache) for step in steps]
        if not may(decoder, x) or None in kept or not self._is_open(given.get("attention_mask"), kept):
            return None
        ready = [step.prepared(x) for step in steps]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), kept[0].keys.shape[2])
        angles = decoder.rotary_emb(x, positions)
        if not _fits(ready, kept, x, angles):
            return None
        if self._layers is None or any(a is not b for a, b in zip(self._layers.ready, ready, strict=True)):
            self._layers = Layers(ready)  # type: ignore[arg-type]
        if self._trusted is None:
            return self._try(x, angles, kept, given)
        rooms = [with_room(item) for item in kept]
        y = self._layers.run(x, angles, rooms)
        for room, item in zip(rooms, kept, strict=True):
            room.show(item)
        return self._output(last_hidden_state=decoder.norm(y), past_key_values=cache)

    def _try(self, x: torch.Tensor, angles: Any, kept: list[Any], given: dict[str, Any]) -> Any:
        """Both ways, the native one on copies; the decoder's own answer is returned."""
        assert self._layers is not None
        fast = self.decoder.norm(self._layers.run(x, angles, [Room.of(item, item.keys.shape[2] + 1) for item in kept]))
        slow = self._slow(**given)
        if bool(slow.last_hidden_state.isfinite().all()):  # else the question stays open
            self._output = type(slow)
            self._trusted = list(slow) == _OUTPUTS and torch.equal(slow.last_hidden_state, fast)
        return slow

    def _steps(self) -> list[OneToken] | None:
        """The layers, if all are trusted and nobody watches or has changed them; else None."""
        layers = list(self.decoder.layers._modules.values())
        steps = [layer.__dict__.get("forward") for layer in layers]
        if len(steps) != self.decoder.config.num_hidden_layers or self.decoder.gradient_checkpointing:
            return None
        for step, layer in zip(steps, layers, strict=True):
            if not (isinstance(step, OneToken) and step.trusted and step.layer is layer):
                return None
        if self._hooks_seen != RemovableHandle.next_id:
            if _watched(self.decoder.layers):
                return None
            self._hooks_seen = RemovableHandle.next_id
        return steps  # type: ignore[return-value]

    def _is_open(self, mask: Any, kept: list[Any]) -> bool:
        """Every position is seen: all layers keep as many, and none of them is masked."""
        filled = kept[0].keys.shape[2]
        if any(item.keys.shape[2] != filled for item in kept):
            return False
        if mask is None:
            return True
        whole = isinstance(mask, torch.Tensor) and mask.shape == (kept[0].keys.shape[0], filled + 1)
        return whole and bool(mask.all())


def _fits(ready: list[Ready | None], kept: list[Any], x: torch.Tensor, angles: Any) -> bool:
    if not fit(angles, x):
        return False
    rotary = angles[0].shape[2]
    return all(a is not None and holds(a.layer, b, x, rotary) for a, b in zip(ready, kept, strict=True))


def _watched(layers: nn.Module) -> bool:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in layers.modules())
