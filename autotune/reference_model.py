"""The dense model with its linear layers exchangeable for reference twins of any scheme: what losses are measured on.

Weights are dequantized from the database and activations are quantized as the scheme says, all in the model's own
floating point (fp32 where it fits, because bf16 arithmetic alone costs about 1e-4 nats). Speed comes from elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autotune.compress.database import WeightDatabase
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import NumberFormat, scheme

_CACHE_BYTES = 2 * 2**30


class ReferenceLinear(nn.Module):
    """y = Q(x) W^T + b with whatever W and Q are set at the moment."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.dense = weight  # (out, in)
        self.weight = weight
        self.bias = bias
        self.activation: NumberFormat | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is not None:
            x = quantize_activations(x, self.activation)
        return F.linear(x, self.weight, self.bias)


class ReferenceModel:
    """Owns the model it is given: its linear layers are replaced."""

    def __init__(self, model: nn.Module, spec: ModelSpec, database: WeightDatabase) -> None:
        self.model = model
        self.spec = spec
        self.database = database
        self._current: dict[str, str] = {}
        self._cache: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._cached_bytes = 0
        self.layers: dict[str, tuple[ReferenceLinear, ...]] = {}
        for group in spec.groups:
            self.layers[group.name] = _replace(model, group)
            self._current[group.name] = spec.dtype

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.layers.values()))[0].weight.dtype

    def select(self, configuration: Mapping[str, str]) -> None:
        """Set every group to the named scheme; groups not named become dense."""
        for group in self.spec.groups:
            name = configuration.get(group.name, self.spec.dtype)
            if self._current[group.name] != name:
                self._set(group, name)
                self._current[group.name] = name

    @torch.inference_mode()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """Causal LM: logits (positions, vocabulary); encoder: last hidden state (positions, hidden)."""
        output = self.model(document.unsqueeze(0))
        states: torch.Tensor = output.last_hidden_state if self.spec.task == "encoder" else output.logits
        return states[0]

    def dense_weight(self, group: LayerGroup) -> torch.Tensor:
        """(out, in): the dense rows of all members."""
        return self._cached(group, self.spec.dtype, lambda: torch.cat([x.dense for x in self.layers[group.name]]))

    def weight(self, group: LayerGroup, name: str) -> torch.Tensor:
        """(out, in): the group's weights under a scheme, dequantized."""
        return self._cached(group, name, lambda: dequantize(self.database.load(group, name)).to(self.dtype))

    def change(self, group: LayerGroup, name: str) -> torch.Tensor:
        """(out, in): what a scheme adds to the dense weights."""

        def compute() -> torch.Tensor:
            return dequantize(self.database.load(group, name)).to(self.dtype).sub_(self.dense_weight(group))

        return self._cached(group, f"change {name}", compute)

    def _cached(self, group: LayerGroup, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = (group.name, name)
        if key not in self._cache:
            self._cache[key] = compute()
            self._cached_bytes += self._cache[key].nbytes
        self._cache.move_to_end(key)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return self._cache[key]

    def _set(self, group: LayerGroup, name: str) -> None:
        layers = self.layers[group.name]
        item = scheme(name)
        if item.is_dense:
            for layer in layers:
                layer.weight, layer.activation = layer.dense, None
            return
        parts = self.weight(group, name).split([member.out_features for member in group.members])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight, layer.activation = part, item.activation


def _replace(model: nn.Module, group: LayerGroup) -> tuple[ReferenceLinear, ...]:
    """Exchange a group's modules."""
    layers = []
    for member in group.members:
        module: Any = model.get_submodule(member.module)
        weight = module.weight.detach()
        layer = ReferenceLinear(weight.t() if member.transposed else weight, module.bias)
        parent, _, name = member.module.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers.append(layer)
    return tuple(layers)
