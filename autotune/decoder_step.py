"""One new token through a transformers decoder, embedding to last norm, with all layers as one native call.

Layers that take single tokens natively (`decoder`) still cost 90 us of Python each, measured between their calls: the
weights of a layer push its code and data out of the caches. Where a model does nothing else between its layers, one
call runs them all. Whether it does is asked of its structure, and then of its numbers: the first token that finds every
layer trusted runs both ways, and must give the same bits. Masks, hooks, wanted intermediate results, other caches,
training and `torch.compile` go to transformers' own code.

What was found out is kept and looked at again only where something changed: a step has cold caches ahead of it, and
each object that it asks costs a tenth of a microsecond or more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from autotune.cache_room import Rooms, alike_layers, holds
from autotune.common_layer import may
from autotune.decoder import Layers, OneToken, fit
from autotune.kernels import changes
from autotune.kernels.norm import FusedRMSNorm

_CHILDREN = {"embed_tokens", "layers", "norm", "rotary_emb"}
_TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
_OUTPUTS = ["last_hidden_state", "past_key_values"]
_AHEAD = 64  # positions
_LENGTHLESS = {"default", "linear", "llama3", "yarn"}  # kinds of rotary angles that know nothing of the text's length
_numbers = itertools.count()
_MOST_BYTES = 2**29  # of a cache: when a longer one grew, all of its layers would lie in memory twice


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


@dataclass(frozen=True)
class _Plan:
    """What was found out about the layers, and all that would have to change for it to be wrong."""

    number: int  # no other plan of this process has it
    steps: tuple[OneToken, ...]
    layers: Layers
    rows: int
    dtype: torch.dtype
    changes: int
    hooks: int  # that torch had counted
    places: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[Any, ...]]  # dictionaries, keys, and what is there

    def is_current(self, x: torch.Tensor) -> bool:
        if self.changes != changes.count() or self.hooks != RemovableHandle.next_id:
            return False
        if x.shape[0] > self.rows or x.dtype != self.dtype:
            return False
        return all(place.get(name) is member for place, name, member in zip(*self.places, strict=True))


class _Angles:
    """Cosines and sines of positions, a block ahead: one by one they are a dozen operators in every step."""

    def __init__(self) -> None:
        self._first = -1
        self._of: tuple[Any, Any] = (None, None)
        self._ahead: tuple[torch.Tensor, ...] = ()  # (1, positions, turned numbers) each

    def of(self, rotary: Any, x: torch.Tensor, given: torch.Tensor | None, filled: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines, as `rotary` gives them, of the positions given, or of the next one."""
        single = given is None or given.numel() == 1
        if not single or getattr(rotary, "rope_type", None) not in _LENGTHLESS:
            positions = torch.full((1, 1), filled) if given is None else given
            return rotary(x, positions)  # type: ignore[no-any-return]
        position = filled if given is None else int(given)
        first = position // _AHEAD * _AHEAD
        of = (rotary, rotary.inv_freq)
        if (
            self._first != first
            or self._of[0] is not of[0]
            or self._of[1] is not of[1]
            or self._ahead[0].dtype != x.dtype
        ):
            self._ahead = rotary(x, torch.arange(first, first + _AHEAD).unsqueeze(0))
            self._first, self._of = first, of
        return tuple(item.narrow(1, position - first, 1) for item in self._ahead)


class OneStep:
    """Stands in for a decoder's `forward`."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder: Any = decoder
        self.trusted: bool | None = None  # None: not tried yet
        self._plan: _Plan | None = None
        self._output: Any = None  # transformers' class
        self._angles = _Angles()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None, "_angles": _Angles()}  # pointers and hooks are of this very object

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trusted is not False and not args and self._is_token(kwargs):
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
        decoder, cache = self.decoder, given["past_key_values"]
        x = decoder.embed_tokens(given["input_ids"])
        plan = self._planned(x)
        rooms = None if plan is None else _rooms(plan, cache, x)
        if plan is None or rooms is None or not _is_open(given.get("attention_mask"), rooms):
            return None
        angles = self._angles.of(decoder.rotary_emb, x, given.get("position_ids"), rooms.filled)
        if not fit(angles, x) or angles[0].shape[2] > plan.steps[0].layer.self_attn.head_dim:
            return None
        y = decoder.norm(plan.layers.run(x, angles, rooms))
        if self.trusted is None:
            return self._judge(y, given)
        rooms.show()
        return self._output(last_hidden_state=y, past_key_values=cache)

    def _judge(self, fast: torch.Tensor, given: dict[str, Any]) -> Any:
        """The decoder's own answer. What the native call wrote lies behind what the cache shows."""
        slow = self._slow(**given)
        if bool(slow.last_hidden_state.isfinite().all()):  # else the question stays open
            self._output = type(slow)
            self.trusted = list(slow) == _OUTPUTS and torch.equal(slow.last_hidden_state, fast)
        return slow

    def _planned(self, x: torch.Tensor) -> _Plan | None:
        """How to run the layers, if all are trusted and nobody watches or might want gradients; else None."""
        if torch.is_grad_enabled() or not may(self.decoder, x):
            return None
        if self._plan is None or not self._plan.is_current(x):
            self._plan = None if _watched(self.decoder) else _plan(self.decoder, x)
        return self._plan


def _plan(decoder: Any, x: torch.Tensor) -> _Plan | None:
    seen = changes.count(), RemovableHandle.next_id
    steps, layers, config = [], decoder.layers._modules, vars(decoder.config)
    if config.get("num_hidden_layers") != len(layers):  # transformers would run the first ones only
        return None
    places: list[tuple[dict[str, Any], str, Any]] = [(config, "num_hidden_layers", config["num_hidden_layers"])]
    for name, layer in layers.items():
        step = vars(layer).get("forward")
        item = step.prepared(x) if isinstance(step, OneToken) and step.layer is layer and step.trusted else None
        if item is None or layer.training:
            return None
        steps.append((step, item))
        places += [(layers, name, layer), (vars(layer), "forward", step), (vars(layer), "training", False)]
        places += item.places
    ready = [item for _, item in steps]
    return _Plan(
        number=next(_numbers),
        steps=tuple(step for step, _ in steps),
        layers=Layers(ready),
        rows=min(item.rows for item in ready),
        dtype=x.dtype,
        changes=seen[0],
        hooks=seen[1],
        places=tuple(zip(*places, strict=True)),  # type: ignore[arg-type]
    )


def _rooms(plan: _Plan, cache: Any, x: torch.Tensor) -> Rooms | None:
    """The buffer behind the cache; None where these layers could not use it."""
    layers = getattr(cache, "layers", ())
    rooms: Rooms | None = getattr(cache, "_autotune_rooms", None)
    if rooms is not None and rooms.checked == plan.number and rooms.serves(layers) and rooms.sequences == x.shape[0]:
        return rooms
    kept = [step.kept(cache) for step in plan.steps]
    if None in kept or len(layers) != len(kept) or not alike_layers(kept):
        return None
    if not all(holds(item.layer, a, x, 0) for item, a in zip(plan.layers.ready, kept, strict=True)):
        return None
    if rooms is None or not rooms.serves(layers):
        if sum(item.keys.nbytes + item.values.nbytes for item in kept) > _MOST_BYTES:
            cache._autotune_rooms = None
            return None
        rooms = cache._autotune_rooms = Rooms(kept)
    rooms.checked = plan.number
    return rooms


def _is_open(mask: Any, rooms: Rooms) -> bool:
    """No position is masked."""
    if mask is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.shape == (rooms.sequences, rooms.filled + 1) and bool(mask.all())


def _watched(decoder: Any) -> bool:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(
        module._forward_hooks or module._forward_pre_hooks for module in (decoder.rotary_emb, *decoder.layers.modules())
    )
