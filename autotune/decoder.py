"""One new token through a transformers decoder layer as one native call, where the layer is of the common kind.

That kind is Llama's, Mistral's and Qwen's: RMSNorm, q/k/v with or without norms a head, rotary positions, grouped-query
attention, a gated MLP with SiLU, two residual sums. Whether a layer is of it is asked of its structure, and then of its
numbers: the first token runs both ways, and a layer that answers differently stays as it is. Prompts go through
`prompt`; masks, other caches, training, hooks and `torch.compile` to transformers' own code.

Keys and values, or their codes (`kv_cache`), are kept in buffers with room to grow (`cache_room`). Where nothing else
is done between layers either, `decoder_step` runs all of them as one call. A model serves one thread at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autotune.cache_room import Room, Rooms, holds, with_room
from autotune.common_layer import (
    DTYPES,
    alike,
    groups_of,
    hooks_inside,
    is_common,
    may,
    members_of,
    wanted_format,
)
from autotune.kernels.cpu import decoder as native
from autotune.kernels.linear import Alternative, FusedGroup
from autotune.kv_cache import coded_format, is_growing
from autotune.prompt import Prompt

_MOST_ROWS = 64  # sequences at once; more are a prompt's business


def fuse_decoder_layers(model: nn.Module) -> int:
    """Let the layers that can take single tokens natively do so; returns how many might. Without a compiler, none."""
    found = [module for module in model.modules() if is_common(module)]
    if not found or not native.available():
        return 0
    for module in found:
        module.forward = OneToken(module)
    return len(found)


@dataclass
class Ready:
    """A layer's native description for the kernels selected, and all that its pointers point to."""

    groups: tuple[FusedGroup, ...]
    choices: tuple[Alternative | None, ...]
    places: tuple[tuple[dict[str, Any], str, Any], ...]  # where groups' first members are, and these
    weights: tuple[tuple[dict[str, Any], str, Any], ...]  # the same of norms
    rows: int
    dtype: torch.dtype
    layer: native.Layer
    room: dict[str, torch.Tensor]
    kept: list[Any] = field(default_factory=list)
    failed: list[list[BaseException]] = field(default_factory=list)

    def is_current(self) -> bool:
        """Nobody has put other groups or weights into the layer, or selected other kernels, since."""
        for modules, name, member in (*self.places, *self.weights):
            if modules[name] is not member:
                return False
        return all(group.choice is choice for group, choice in zip(self.groups, self.choices, strict=True))


class Layers:
    """Layers that run one behind the other as one native call."""

    def __init__(self, ready: Sequence[Ready]) -> None:
        self.ready = tuple(ready)
        self._stack = native.Stack([item.layer for item in ready])
        self._tokens = native.Tokens()

    def run(self, x: torch.Tensor, angles: Any, room: Room | Rooms) -> torch.Tensor:
        """x (sequences, 1, hidden) through the layers; keys and values are written behind what the room holds."""
        cosines, sines = angles
        y, tokens = torch.empty_like(x), self._tokens
        tokens.x, tokens.y, tokens.count = x.data_ptr(), y.data_ptr(), x.shape[0]
        tokens.cosines, tokens.sines = cosines.data_ptr(), sines.data_ptr()
        tokens.rotary, tokens.rotary_stride = cosines.shape[-1], cosines.stride(0) if cosines.shape[0] > 1 else 0
        room.put(self._stack.items)
        if native.step(self._stack, tokens, torch.get_num_threads()):
            raise next(errors.pop() for item in self.ready for errors in item.failed if errors)
        return y


class OneToken:
    """Stands in for a decoder layer's `forward`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.index: int = layer.self_attn.layer_idx  # type: ignore[union-attr, assignment]
        self._trusted: bool | None = None  # None: not tried yet
        self._ready: Ready | None = None
        self._alone: Layers | None = None
        self._hooks: list[Any] = []
        self._prompt = Prompt(layer)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None, "_alone": None, "_hooks": []}  # pointers and hooks are of this very one

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and hidden_states.dim() == 3:
            y = self._quick(hidden_states, kwargs)
            if y is not None:
                return y
        return self._slow(hidden_states, *args, **kwargs)

    def _quick(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        if x.shape[1] == 1:
            return None if self._trusted is False else self._token(x, given)
        return self._prompt.run(x, given) if self._may(x, given) else None

    def _slow(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    @property
    def trusted(self) -> bool:
        """Tried, and found to give what the layer gives."""
        return self._trusted is True

    def _token(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        """The layer's output, or None where this is not a case for the native call."""
        angles, kept = given.get("position_embeddings"), self.kept(given.get("past_key_values"))
        if kept is None or angles is None or given.get("attention_mask") is not None or not self._may(x, given):
            return None
        ready = self.prepared(x)
        if ready is None or not (fit(angles, x) and holds(ready.layer, kept, x, angles[0].shape[2])):
            return None
        if self._trusted is None:
            return None if None in ready.choices else self._try(ready, x, angles, kept, given)
        room = with_room(kept)
        y = self._run(ready, x, angles, room)
        room.show(kept)
        return y

    def kept(self, cache: Any) -> Any:
        """The cache's layer, if it is one that grows, already holds something, and that in the format wanted."""
        layers = getattr(cache, "layers", ())
        kept: Any = layers[self.index] if self.index < len(layers) else None
        if not is_growing(kept) or not kept.is_initialized:
            return None
        if kept.keys.dim() != 4 or not kept.keys.shape[2] or kept.keys.shape != kept.values.shape:
            return None
        return kept if coded_format(kept) == wanted_format(self.layer) else None  # the slow way makes it so

    def _may(self, x: torch.Tensor, given: dict[str, Any]) -> bool:
        self._hooks = self._hooks or hooks_inside(self.layer)
        if torch.is_grad_enabled() and self.layer.input_layernorm.weight.requires_grad:
            return False
        return may(self.layer, x) and not (any(self._hooks) or given.get("output_attentions"))

    def _try(self, ready: Ready, x: torch.Tensor, angles: Any, kept: Any, given: dict[str, Any]) -> torch.Tensor:
        """Both ways, the native one on copies; the layer's own answer is returned."""
        position = kept.keys.shape[2]
        room = Room.of(kept, position + 1)
        fast = self._run(ready, x, angles, room)
        slow = self._slow(x, **given)
        pairs = ((fast - x, slow - x), *room.beside(kept))
        if bool(slow.isfinite().all()):  # else the question stays open
            self._trusted = all(alike(a, b) for a, b in pairs)
        return slow

    def _run(self, ready: Ready, x: torch.Tensor, angles: Any, room: Room) -> torch.Tensor:
        if self._alone is None or self._alone.ready[0] is not ready:
            self._alone = Layers([ready])
        return self._alone.run(x, angles, room)

    def prepared(self, x: torch.Tensor) -> Ready | None:
        """The native description for the kernels that are selected now; None where the groups are not the usual."""
        ready = self._ready
        if ready is not None and ready.rows >= x.shape[0] and ready.dtype == x.dtype and ready.is_current():
            return ready
        found = groups_of(self.layer)
        if (
            found is None
            or len(x) > _MOST_ROWS
            or x.dtype not in DTYPES
            or any(g.choice and g.choice.packed.dtype != x.dtype for g in found)
        ):
            return None
        self._ready = _describe(self.layer, found, len(x), x.dtype)
        return self._ready


def _describe(layer: Any, groups: tuple[FusedGroup, ...], rows: int, dtype: torch.dtype) -> Ready:
    attention = layer.self_attn
    qkv, o, gate_up, down = groups
    width = attention.head_dim
    sizes = {
        "normed": qkv.in_features,
        "projected": max(qkv.out_features, gate_up.out_features),
        "attended": o.in_features,
        "gated": down.in_features,
    }
    room = {name: torch.zeros(rows, size, dtype=dtype) for name, size in sizes.items()}
    norms = {
        "input": layer.input_layernorm,
        "post": layer.post_attention_layernorm,
        "q": getattr(attention, "q_norm", None),
        "k": getattr(attention, "k_norm", None),
    }
    choices = tuple(group.choice for group in groups)
    places = tuple((modules, names[0], modules[names[0]]) for modules, names in members_of(layer))
    weights = tuple((norm._parameters, "weight", norm.weight) for norm in norms.values() if norm is not None)
    ready = Ready(groups, choices, places, weights, rows, dtype, native.Layer(), room)
    inputs = ("normed", "attended", "normed", "gated")
    outputs = ("projected", "normed", "projected", "normed")
    products = [_product(ready, *item) for item in zip(groups, choices, inputs, outputs, strict=True)]
    ready.layer = native.layer(
        dict(zip(("qkv", "o", "gate_up", "down"), products, strict=True)),
        room,
        **{f"{name}_norm": None if norm is None else norm.weight.data_ptr() for name, norm in norms.items()},
        **{f"{name}_eps": 0.0 if norm is None else norm.variance_epsilon for name, norm in norms.items()},
        scaling=attention.scaling,
        bf16=dtype == torch.bfloat16,
        hidden=qkv.in_features,
        heads=qkv.sizes[0] // width,
        key_heads=qkv.sizes[1] // width,
        width=width,
        inner=down.in_features,
        rows=rows,
    )
    return ready


def _product(ready: Ready, group: FusedGroup, choice: Alternative | None, source: str, target: str) -> native.Product:
    """By the kernel's own C function where it has one, else through Python."""
    outputs = group.out_features
    if choice is None:
        row_bytes = ctypes.c_int64(outputs * ready.room[source].element_size())
        ready.kept.append(row_bytes)
        return native.zeros_product(outputs, row_bytes)
    if choice.native is not None:
        ready.kept.append(choice)
        return native.native_product(choice.native, outputs)

    def call(rows: int) -> None:
        ready.room[target].view(-1)[: rows * outputs].copy_(group.compute(ready.room[source][:rows]).view(-1))

    product, function, failed = native.python_product(call, outputs)
    ready.kept.append(function)
    ready.failed.append(failed)
    return product


def fit(angles: tuple[torch.Tensor, ...], x: torch.Tensor) -> bool:
    """Angles, cosines and sines, each (1 or sequences, 1, turned numbers), as the native call reads them."""
    cosines, sines = angles
    shape = cosines.shape
    if len(shape) != 3 or shape[1] != 1 or shape[0] not in (1, x.shape[0]) or shape != sines.shape:
        return False
    return cosines.dtype == sines.dtype == x.dtype and cosines.is_contiguous() and sines.is_contiguous()
