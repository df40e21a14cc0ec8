"""One new token through a transformers decoder layer as one native call, where the layer is of the common kind.

That kind is Llama's, Mistral's and Qwen's: RMSNorm, q/k/v with or without norms a head, rotary positions, grouped-query
attention, a gated MLP with SiLU, two residual sums. Whether a layer is of it is asked of its structure, and then of its
numbers: the first token runs both ways, and a layer that answers differently stays as it is. Prompts, masks, other
caches, training, hooks and `torch.compile` go to transformers' own code.

Keys and values, or their codes (`kv_cache`), are kept in buffers with room to grow, behind the cache's own tensors,
which are views of what is filled. A model serves one thread at a time.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autotune.kernels.cpu import decoder as native
from autotune.kernels.kv_formats import NATIVE, decode, row_bytes
from autotune.kernels.linear import Alternative, FusedGroup, GroupSlice
from autotune.kernels.norm import FusedRMSNorm
from autotune.kv_cache import Keeping, coded_format, is_growing

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_MOST_ROWS = 64  # sequences at once; more are a prompt's business
_SAME = 0.02  # of what the layer adds to its input: roundings differ, and 8-bit activations turn them into steps
_DTYPES = (torch.bfloat16, torch.float32)
_ROOM = 256  # positions to grow into, at least


def fuse_decoder_layers(model: nn.Module) -> int:
    """Let the layers that can take single tokens natively do so; returns how many might. Without a compiler, none."""
    found = [module for module in model.modules() if _is_common(module)]
    if not found or not native.available():
        return 0
    for module in found:
        module.forward = OneToken(module)
    return len(found)


def _is_common(layer: nn.Module) -> bool:
    if {name for name, _ in layer.named_children()} != _CHILDREN:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    inside = {name for name, _ in attention.named_children()}  # type: ignore[union-attr]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in sorted(_HEAD_NORMS & inside)]
    return (
        inside in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and {name for name, _ in mlp.named_children()} == _MLP  # type: ignore[union-attr]
        and "silu" in type(mlp.act_fn).__name__.lower()  # type: ignore[union-attr]
        and all(isinstance(norm, FusedRMSNorm) for norm in norms)
        and not list(attention.parameters(recurse=False))  # type: ignore[union-attr]
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
    )


@dataclass
class _Ready:
    """A layer's native description for the kernels selected, and all that its pointers point to."""

    groups: tuple[FusedGroup, ...]
    choices: tuple[Alternative | None, ...]
    places: tuple[tuple[dict[str, Any], str, Any], ...]  # where groups' first members and norms' weights are, and these
    rows: int
    dtype: torch.dtype
    layer: native.Layer
    tokens: native.Tokens
    room: dict[str, torch.Tensor]
    kept: list[Any] = field(default_factory=list)
    failed: list[list[BaseException]] = field(default_factory=list)
    y: torch.Tensor | None = None  # where the running step writes

    def is_current(self) -> bool:
        """Nobody has put other groups or weights into the layer, or selected other kernels, since."""
        for modules, name, member in self.places:
            if modules[name] is not member:
                return False
        return all(group.choice is choice for group, choice in zip(self.groups, self.choices, strict=True))


class OneToken:
    """Stands in for a decoder layer's `forward`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self._index: int = layer.self_attn.layer_idx  # type: ignore[union-attr, assignment]
        self._trusted: bool | None = None  # None: not tried yet
        self._ready: _Ready | None = None
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None, "_hooks": []}  # pointers and hooks are of this very object

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._trusted is not False and not args and hidden_states.dim() == 3 and hidden_states.shape[1] == 1:
            y = self._token(hidden_states, kwargs)
            if y is not None:
                return y
        return self._slow(hidden_states, *args, **kwargs)

    def _slow(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    def _token(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        """The layer's output, or None where this is not a case for the native call."""
        angles, kept = given.get("position_embeddings"), _kept(given.get("past_key_values"), self._index)
        if kept is None or angles is None or given.get("attention_mask") is not None or not self._may(x, given):
            return None
        ready = self._prepared(x)
        if ready is None or not (_fit(angles[0], angles[1], x) and _holds(ready.layer, kept, x, angles[0].shape[2])):
            return None
        if coded_format(kept) != _wanted(self.layer):  # the slow way makes it so
            return None
        if self._trusted is None:
            return None if None in ready.choices else self._try(ready, x, angles, kept, given)
        room = _with_room(kept)
        y = self._run(ready, x, angles, room)
        room.show(kept)
        return y

    def _may(self, x: torch.Tensor, given: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling() or not x.is_contiguous() or x.device.type != "cpu" or self.layer.training:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.layer.input_layernorm.weight.requires_grad):
            return False
        self._hooks = self._hooks or _hooks(self.layer)
        return not (any(self._hooks) or given.get("output_attentions"))

    def _try(self, ready: _Ready, x: torch.Tensor, angles: Any, kept: Any, given: dict[str, Any]) -> torch.Tensor:
        """Both ways, the native one on copies; the layer's own answer is returned."""
        position = kept.keys.shape[2]
        room = _Room(_grown(kept.keys, position + 1), _grown(kept.values, position + 1), position, coded_format(kept))
        fast = self._run(ready, x, angles, room)
        slow = self._slow(x, **given)
        pairs = ((fast - x, slow - x), *room.beside(kept))
        if bool(slow.isfinite().all()):  # else the question stays open
            self._trusted = all(_alike(a, b) for a, b in pairs)
        return slow

    def _run(self, ready: _Ready, x: torch.Tensor, angles: Any, room: _Room) -> torch.Tensor:
        cosines, sines = angles
        y, tokens = torch.empty_like(x), ready.tokens
        ready.y = y
        tokens.x, tokens.y, tokens.count = x.data_ptr(), y.data_ptr(), x.shape[0]
        tokens.cosines, tokens.sines = cosines.data_ptr(), sines.data_ptr()
        tokens.rotary, tokens.rotary_stride = cosines.shape[-1], cosines.stride(0) if cosines.shape[0] > 1 else 0
        tokens.keys, tokens.values = room.keys.data_ptr(), room.values.data_ptr()
        tokens.capacity, tokens.position, tokens.kept = room.keys.shape[2], room.filled, NATIVE[room.coded]
        if native.step(ready.layer, tokens, torch.get_num_threads()):
            raise next(errors.pop() for errors in ready.failed if errors)
        return y

    def _prepared(self, x: torch.Tensor) -> _Ready | None:
        """The native description for the kernels that are selected now; None where the groups are not the usual."""
        ready = self._ready
        if ready is not None and ready.rows >= x.shape[0] and ready.dtype == x.dtype and ready.is_current():
            return ready
        found = _groups(self.layer)
        if (
            found is None
            or len(x) > _MOST_ROWS
            or x.dtype not in _DTYPES
            or any(g.choice and g.choice.packed.dtype != x.dtype for g in found)
        ):
            return None
        self._ready = _describe(self.layer, found, len(x), x.dtype)
        return self._ready


def _members(layer: nn.Module) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Where the groups' members are: the modules that hold them, and their names, in the order of rows."""
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    assert attention is not None and mlp is not None
    return [
        (attention._modules, ("q_proj", "k_proj", "v_proj")),
        (attention._modules, ("o_proj",)),
        (mlp._modules, ("gate_proj", "up_proj")),
        (mlp._modules, ("down_proj",)),
    ]


def _groups(layer: nn.Module) -> tuple[FusedGroup, ...] | None:
    """q/k/v, o, gate/up and down, if that is how the layer's products are grouped."""
    groups = []
    for modules, names in _members(layer):
        members = [modules[name] for name in names]
        if not all(isinstance(member, GroupSlice) for member in members):
            return None
        group = members[0].group
        if len(group.sizes) != len(names) or any(m.group is not group or m.index != i for i, m in enumerate(members)):
            return None
        groups.append(group)
    return tuple(groups)


def _describe(layer: Any, groups: tuple[FusedGroup, ...], rows: int, dtype: torch.dtype) -> _Ready:
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
    places = tuple((modules, names[0], modules[names[0]]) for modules, names in _members(layer))
    places += tuple((norm._parameters, "weight", norm.weight) for norm in norms.values() if norm is not None)
    ready = _Ready(groups, choices, places, rows, dtype, native.Layer(), native.Tokens(), room)
    inputs = ("normed", "attended", "normed", "gated")
    outputs = ("projected", None, "projected", "normed")
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


def _product(
    ready: _Ready, group: FusedGroup, choice: Alternative | None, source: str, target: str | None
) -> native.Product:
    """By the kernel's own C function where it has one, else through Python; `target` None: the step's own output."""
    outputs = group.out_features
    if choice is None:
        row_bytes = ctypes.c_int64(outputs * ready.room[source].element_size())
        ready.kept.append(row_bytes)
        return native.zeros_product(outputs, row_bytes)
    if choice.native is not None:
        ready.kept.append(choice)
        return native.native_product(choice.native, outputs)

    def call(rows: int) -> None:
        out = ready.y if target is None else ready.room[target]
        assert out is not None
        out.view(-1)[: rows * outputs].copy_(group.compute(ready.room[source][:rows]).view(-1))

    product, function, failed = native.python_product(call, outputs)
    ready.kept.append(function)
    ready.failed.append(failed)
    return product


def _wanted(layer: Any) -> str | None:
    """The format that the layer's keys and values are to be kept in."""
    forward = layer.self_attn.forward
    return forward.name if isinstance(forward, Keeping) else None


def _kept(cache: Any, index: int) -> Any:
    """The cache's layer, if it is one that grows and already holds something; else None."""
    layers = getattr(cache, "layers", ())
    kept: Any = layers[index] if index < len(layers) else None
    if not is_growing(kept) or not kept.is_initialized:
        return None
    return kept if kept.keys.dim() == 4 and kept.keys.shape[2] and kept.keys.shape == kept.values.shape else None


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found.float() - expected.float()).norm()) <= _SAME * float(expected.float().norm())


def _fit(cosines: torch.Tensor, sines: torch.Tensor, x: torch.Tensor) -> bool:
    """Angles (1 or sequences, 1, turned numbers) as the native call reads them."""
    shape = cosines.shape
    if len(shape) != 3 or shape[1] != 1 or shape[0] not in (1, x.shape[0]) or shape != sines.shape:
        return False
    return cosines.dtype == sines.dtype == x.dtype and cosines.is_contiguous() and sines.is_contiguous()


def _holds(layer: native.Layer, kept: Any, x: torch.Tensor, rotary: int) -> bool:
    """The cache is of these sequences and of this layer's heads: the native call asks no more."""
    sequences, heads, _, elements = kept.keys.shape
    coded = coded_format(kept)
    dtype = x.dtype if coded is None else torch.int8
    same = kept.keys.dtype == kept.values.dtype == dtype and kept.keys.device == kept.values.device == x.device
    row = row_bytes(coded, layer.width, 1)
    return same and (sequences, heads, elements) == (x.shape[0], layer.key_heads, row) and rotary <= layer.width


def _with_room(kept: Any) -> _Room:
    """The buffers behind a cache layer's keys and values, with room for one position more.

    They serve only as long as the cache holds the very views that were put there: after anything else (it was cropped,
    reordered, copied, grown by transformers) they are made anew from what it holds.
    """
    room: _Room | None = getattr(kept, "_autotune_room", None)
    if room is None or kept.keys is not room.shown_keys or kept.values is not room.shown_values or room.full:
        filled = kept.keys.shape[2]
        capacity = filled + max(_ROOM, filled // 2)
        keys, values = _grown(kept.keys, capacity), _grown(kept.values, capacity)
        room = kept._autotune_room = _Room(keys, values, filled, coded_format(kept))
    return room


@dataclass
class _Room:
    """Keys and values (sequences, key heads, capacity, width or row of codes) of a cache layer, `filled` so far, and
    what it shows."""

    keys: torch.Tensor
    values: torch.Tensor
    filled: int
    coded: str | None
    shown_keys: torch.Tensor | None = None
    shown_values: torch.Tensor | None = None

    @property
    def full(self) -> bool:
        return self.filled == self.keys.shape[2]

    def beside(self, kept: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Its numbers beside those of a cache layer."""
        pairs = ((self.keys, kept.keys), (self.values, kept.values))
        if self.coded is None:
            return list(pairs)
        return [(decode(a, self.coded, torch.float32), decode(b, self.coded, torch.float32)) for a, b in pairs]

    def show(self, kept: Any) -> None:
        """One position more was filled."""
        self.filled += 1
        kept.keys = self.shown_keys = self.keys.narrow(2, 0, self.filled)
        kept.values = self.shown_values = self.values.narrow(2, 0, self.filled)


def _grown(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, filled, width = tensor.shape
    grown = tensor.new_empty(batch, heads, capacity, width)
    grown[:, :, :filled] = tensor
    return grown


def _hooks(layer: nn.Module) -> list[Any]:
    """The hooks of all modules inside: live collections, empty as long as nobody watches."""
    inside = [module for module in layer.modules() if module is not layer]
    return [hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks)]
