"""The dense model with its linear layers exchangeable for reference twins of any scheme: what losses are measured on.

Weights are dequantized from the database and activations are quantized as the scheme says. A model given in fp32 is
computed in fp32. In a larger one, whose layers are given in bf16 (see `model.load_mixed`), layers multiply in bf16 and
only logits in fp32: rounding them alone would cost more than all the rest. `exact` says what the rest costs. Speed
comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autotune.compress.database import WeightDatabase, scheme_of
from autotune.kernels.kv_formats import format_of
from autotune.kernels.products import linear
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.kv_cache import keep_as
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import NumberFormat, scheme

_CACHE_BYTES = 2**30  # dequantized weights are kept where all of them fit
_PIECE_WEIGHTS = 2**22  # temporary fp32 copies are made of this many weights at a time


class ReferenceLinear(nn.Module):
    """y = Q(x) W^T + b with whatever W and Q are set at the moment; y has the dtype of x."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, exact: bool) -> None:
        """`exact`: multiply in the dtype of x, also where the weights are narrower."""
        super().__init__()
        self.dense = weight  # (out, in)
        self.weight = weight
        self.bias = bias
        self.exact = exact
        self.activation: NumberFormat | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is not None:
            x = quantize_activations(x, self.activation)
        if self.weight.dtype == x.dtype:
            y = linear(x, self.weight)
        elif self.exact and not torch.is_grad_enabled():  # for gradients the copies would have to be kept
            pieces = self.weight.split(_rows(self.weight.shape[1]))
            y = torch.cat([linear(x, piece.to(x.dtype)) for piece in pieces], -1)
        else:
            y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class ReferenceModel:
    """Owns the model it is given: its linear layers are replaced."""

    def __init__(self, model: nn.Module, spec: ModelSpec, database: WeightDatabase) -> None:
        self.model = model
        self.spec = spec
        self.database = database
        self._current: dict[str, str] = {}
        self._kv_cache: str | None = None
        self._cache: dict[tuple[str, str], torch.Tensor] = {}
        self.layers: dict[str, tuple[ReferenceLinear, ...]] = {}
        for group in spec.groups:
            self.layers[group.name] = _replace(model, group)
            self._current[group.name] = spec.dtype
        weights = {group.name: group.weights for group in spec.groups}
        total = sum(weights[name] for name, _ in database.entries) * self.dtype.itemsize
        self._keeps = total <= _CACHE_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what they are multiplied in."""
        return next(iter(self.layers.values()))[0].weight.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values()))[0].weight.device

    @property
    def weight_bytes(self) -> int:
        """Of all layer groups, dense."""
        return sum(group.weights for group in self.spec.groups) * self.dtype.itemsize

    def select(self, configuration: Mapping[str, str]) -> None:
        """Set every group, and the KV cache, to the named scheme; what is not named becomes dense."""
        if self._kv_cache != format_of(configuration):
            self._kv_cache = format_of(configuration)
            keep_as(self.model, self._kv_cache)
        for group in self.spec.groups:
            name = configuration.get(group.name, self.spec.dtype)
            if self._current[group.name] != name:
                self._set(group, name)
                self._current[group.name] = name

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Say whose outputs will be asked for: a model that is not held whole passes its blocks for all at once."""

    @torch.inference_mode()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """Causal LM: logits (positions, vocabulary); encoder: last hidden state (positions, hidden)."""
        output = self.model(document.unsqueeze(0))
        states: torch.Tensor = output.last_hidden_state if self.spec.task == "encoder" else output.logits
        return states[0]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Meanwhile every layer multiplies in fp32; slow where the weights are bf16."""
        layers = [layer for layers in self.layers.values() for layer in layers]
        before = [layer.exact for layer in layers]
        try:
            for layer in layers:
                layer.exact = True
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer.exact = value

    def dense_weight(self, group: LayerGroup, rows: slice = slice(None)) -> torch.Tensor:
        """(out, in) fp32: the dense rows of all members, or some of these rows."""
        start, stop, _ = rows.indices(group.out_features)
        parts, offset = [], 0
        for layer in self.layers[group.name]:
            parts.append(layer.dense[max(0, start - offset) : max(0, stop - offset)])
            offset += len(layer.dense)
        return torch.cat(parts).float()

    def weight(self, group: LayerGroup, name: str) -> torch.Tensor:
        """(out, in): the group's weights under a scheme, dequantized."""
        if (group.name, name) in self._cache:
            return self._cache[group.name, name]
        weight = torch.empty(group.out_features, group.in_features, dtype=self.dtype, device=self.device)
        step = _rows(group.in_features)
        for start in range(0, group.out_features, step):
            rows = slice(start, start + step)
            weight[rows] = dequantize(self.database.load(group, name, rows=rows, device=self.device))
        if self._keeps:
            self._cache[group.name, name] = weight
        return weight

    def change(self, group: LayerGroup, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """(out, in) fp32: what a scheme adds to the dense weights, or to some rows of them."""
        if self._keeps:
            return self.weight(group, name)[rows] - self.dense_weight(group, rows)
        made = dequantize(self.database.load(group, name, rows=rows, device=self.device))
        return made.sub_(self.dense_weight(group, rows))

    def _set(self, group: LayerGroup, name: str) -> None:
        layers = self.layers[group.name]
        item = scheme(scheme_of(name))
        for layer in layers:  # what was set before goes before the new weights are made
            layer.weight, layer.activation = layer.dense, item.activation
        if item.is_dense:
            return
        parts = self.weight(group, name).split([member.out_features for member in group.members])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight = part


def _rows(in_features: int) -> int:
    return max(1, _PIECE_WEIGHTS // in_features)


def _replace(model: nn.Module, group: LayerGroup) -> tuple[ReferenceLinear, ...]:
    """Exchange a group's modules."""
    layers = []
    for member in group.members:
        module: Any = model.get_submodule(member.module)
        weight = module.weight.detach()
        layer = ReferenceLinear(weight.t() if member.transposed else weight, module.bias, group.role == "lm_head")
        parent, _, name = member.module.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers.append(layer)
    return tuple(layers)
